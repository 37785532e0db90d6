// CausalConv1d on the CPU: what the operator (ort_cpu.cc) and its kernels (ort_cpu_kernel.h) agree on.
#pragma once

#include <cstddef>
#include <cstdint>

namespace matexport {

namespace ort {
struct CustomOp;
}

constexpr int kConvRows = 32;     // steps in one part of the parallel work
constexpr int kMaxKernel = 256;   // longest kernel

// Shapes as in README.md. Pointers to optional inputs and outputs may be null.
struct ConvProblem {
  const float *x, *weight, *bias, *state;
  const bool *mask;
  float *y, *final_state;
  int64_t batch, length, channels, k;
  const float *taps;     // weight as (k, channels)
  const float *history;  // state as (batch, k - 1, channels)
};

// Fills rows[0 .. k - 2] with what lies before step `end` of batch entry b, oldest first: its last k - 1 real inputs,
// and the state's where there are fewer. Static, so that every instruction set keeps its own (see native/vectors.h).
static inline void rows_before(const ConvProblem &p, int64_t b, int64_t end, const float **rows) {
  int64_t missing = p.k - 1;
  for (int64_t t = end - 1; t >= 0 && missing > 0; --t)
    if (!p.mask || p.mask[b * p.length + t]) rows[--missing] = p.x + (b * p.length + t) * p.channels;
  for (int64_t taken = 1; missing > 0; ++taken)
    rows[--missing] = p.history + (b * (p.k - 1) + p.k - 1 - taken) * p.channels;
}

const ort::CustomOp *causal_conv1d_op();

}  // namespace matexport
