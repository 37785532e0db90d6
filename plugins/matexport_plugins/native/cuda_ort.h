// The ops for ONNX Runtime's CUDA provider (cuda_ort.cc): one for each op and type of tensor.
#pragma once

#include "ort_abi.h"

namespace matexport {

constexpr int kCudaOps = 6;
extern const ort::CustomOp kCudaOpTable[kCudaOps];

}  // namespace matexport
