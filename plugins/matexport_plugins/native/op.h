// What the ops have in common: their entry in ONNX Runtime, checks with clear messages, memory kept between calls.
#pragma once

#include <atomic>
#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "isa.h"
#include "ort_abi.h"

namespace matexport {

__attribute__((format(printf, 2, 3))) inline ort::Status refuse(ort::Api api, const char *format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return api.error(ort::kInvalidArgument, text);
}

// Working memory that a kernel keeps from one call to the next. Several threads may run one kernel at a time: whoever
// comes first gets the kept block, the others get one of their own.
class Workspace {
 public:
  ~Workspace() { std::free(kept_.load()); }

  struct Block {
    size_t floats;
    alignas(64) float data[1];
  };
  Block *take(size_t floats) {
    Block *block = kept_.exchange(nullptr);
    if (block && block->floats >= floats) return block;
    std::free(block);
    const size_t bytes = (sizeof(Block) + floats * sizeof(float) + 63) / 64 * 64;
    block = static_cast<Block *>(std::aligned_alloc(64, bytes));
    if (block) block->floats = floats;
    return block;
  }
  void give_back(Block *block) { std::free(kept_.exchange(block)); }

 private:
  std::atomic<Block *> kept_{nullptr};
};

struct Input {
  int type, characteristic;
};

template <class K>
void op_destroy(void *kernel) {
  static_cast<K *>(kernel)->~K();
  std::free(kernel);
}

// The OrtCustomOp of a kernel class K with: kName, kInputs, kOutputs (the first is required, others optional), a
// constructor (Api, const Kernels &), `Status configure(info)` and `Status compute(context)`.
template <class K>
ort::CustomOp custom_op() {
  using ort::CustomOp;
  CustomOp op = {};
  op.version = ort::kApiVersion;
  op.name = [](const CustomOp *) { return K::kName; };
  op.provider = [](const CustomOp *) { return "CPUExecutionProvider"; };
  op.input_type = [](const CustomOp *, size_t i) { return K::kInputs[i].type; };
  op.input_count = [](const CustomOp *) { return sizeof K::kInputs / sizeof K::kInputs[0]; };
  op.output_type = [](const CustomOp *, size_t) { return ort::kFloat; };
  op.output_count = [](const CustomOp *) { return K::kOutputs; };
  op.destroy = op_destroy<K>;
  op.input_characteristic = [](const CustomOp *, size_t i) { return K::kInputs[i].characteristic; };
  op.output_characteristic = [](const CustomOp *, size_t i) { return i == 0 ? ort::kRequired : ort::kOptional; };
  op.input_memory = [](const CustomOp *, size_t) { return 0; };
  op.variadic_input_minimum = op.variadic_input_homogeneous = [](const CustomOp *) { return 1; };
  op.variadic_output_minimum = op.variadic_output_homogeneous = [](const CustomOp *) { return 1; };
  op.create = [](const CustomOp *, const void *table, const void *info, void **kernel) -> ort::Status {
    const ort::Api api(table);
    char problem[128];
    const Kernels *kernels = choose_kernels(problem, sizeof problem);
    if (!kernels) return refuse(api, "%s: %s", K::kName, problem);
    void *memory = std::malloc(sizeof(K));
    if (!memory) return api.error(ort::kRuntimeException, "matexport: out of memory");
    K *made = new (memory) K(api, *kernels);
    ort::Status s = made->configure(info);
    if (s) op_destroy<K>(made), made = nullptr;
    *kernel = made;
    return s;
  };
  op.compute = [](void *kernel, void *context) { return static_cast<K *>(kernel)->compute(context); };
  op.since_version = [](const CustomOp *) { return 1; };
  op.until_version = [](const CustomOp *) { return INT_MAX; };
  return op;
}

}  // namespace matexport
