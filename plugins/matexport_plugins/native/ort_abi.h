// The part of ONNX Runtime's C ABI that a custom op needs, declared by hand: no ONNX Runtime header, no link to it.
//
// OrtApi is an append-only table of function pointers, so a slot number is enough to call a function. OrtCustomOp is a
// struct of fixed layout, asserted below. Both are the same from API 17 (ONNX Runtime 1.17) to the newest.
#pragma once

#include <cstddef>
#include <cstdint>

#define MATEXPORT_EXPORT extern "C" __attribute__((visibility("default")))

namespace matexport::ort {

constexpr uint32_t kApiVersion = 17;  // the lowest with KernelContext_ParallelFor
constexpr int kFloat = 1, kBool = 9, kFloat16 = 10, kBfloat16 = 16;  // ONNXTensorElementDataType
constexpr int kRequired = 0, kOptional = 1;
constexpr int kInvalidArgument = 2, kRuntimeException = 6;

using Status = void *;  // null: success

struct ApiBase {
  const void *(*get_api)(uint32_t version);  // null: this version is not known
  const char *(*version)();
};

struct CustomOp {
  uint32_t version;
  void *(*create_v1)(const CustomOp *, const void *api, const void *info);  // not used
  const char *(*name)(const CustomOp *);
  const char *(*provider)(const CustomOp *);
  int (*input_type)(const CustomOp *, size_t);
  size_t (*input_count)(const CustomOp *);
  int (*output_type)(const CustomOp *, size_t);
  size_t (*output_count)(const CustomOp *);
  void (*compute_v1)(void *kernel, void *context);  // not used
  void (*destroy)(void *kernel);
  int (*input_characteristic)(const CustomOp *, size_t);
  int (*output_characteristic)(const CustomOp *, size_t);
  int (*input_memory)(const CustomOp *, size_t);
  int (*variadic_input_minimum)(const CustomOp *);
  int (*variadic_input_homogeneous)(const CustomOp *);
  int (*variadic_output_minimum)(const CustomOp *);
  int (*variadic_output_homogeneous)(const CustomOp *);
  Status (*create)(const CustomOp *, const void *api, const void *info, void **kernel);
  Status (*compute)(void *kernel, void *context);
  Status (*infer_shape)(const CustomOp *, void *context);  // may be null
  int (*since_version)(const CustomOp *);
  int (*until_version)(const CustomOp *);
  void *in_place_and_alias[4];  // API 18 and later
};
static_assert(sizeof(void *) != 8 ||
                  (offsetof(CustomOp, name) == 16 && offsetof(CustomOp, destroy) == 72 &&
                   offsetof(CustomOp, create) == 136 && offsetof(CustomOp, compute) == 144 &&
                   offsetof(CustomOp, until_version) == 168 && sizeof(CustomOp) == 208),
              "layout of OrtCustomOp");

// An input or output tensor; data is null if it is absent.
struct Tensor {
  static constexpr size_t kMaxRank = 8;
  void *data = nullptr;
  int64_t dims[kMaxRank] = {};
  size_t rank = 0;

  float *floats() const { return static_cast<float *>(data); }
  bool *bools() const { return static_cast<bool *>(data); }
};

class Api {
 public:
  explicit Api(const void *table = nullptr) : table_(static_cast<void *const *>(table)) {}
  explicit operator bool() const { return table_ != nullptr; }

  // `text` is copied.
  Status error(int code, const char *text) const { return call<Status, int, const char *>(0, code, text); }

  // Reads an attribute; leaves `value` as it is where the node has none.
  void attribute(const void *info, const char *name, int64_t *value) const {
    release_status(call<Status, const void *, const char *, int64_t *>(86, info, name, value));
  }
  // True if there are exactly `count` numbers or the attribute is absent, which leaves `values` as they are.
  bool attribute(const void *info, const char *name, float *values, size_t count) const {
    size_t found = 0;
    using Type = const void *;
    Status s = call<Status, Type, const char *, float *, size_t *>(162, info, name, nullptr, &found);
    if (s || found != count) {
      release_status(s);
      return s != nullptr || found == 0;
    }
    s = call<Status, Type, const char *, float *, size_t *>(162, info, name, values, &found);
    release_status(s);
    return s == nullptr;
  }

  Status input(const void *context, size_t index, Tensor *tensor) const {
    size_t count = 0;
    if (Status s = call<Status, const void *, size_t *>(88, context, &count)) return s;
    const void *value = nullptr;
    if (index >= count) return nullptr;
    if (Status s = call<Status, const void *, size_t, const void **>(90, context, index, &value)) return s;
    if (!value) return nullptr;
    if (Status s = shape(value, tensor)) return s;
    return data(value, tensor);
  }
  // Allocates output `index` of the shape in `tensor`; leaves data null if nobody asked for it.
  Status output(void *context, size_t index, Tensor *tensor) const {
    size_t count = 0;
    if (Status s = call<Status, const void *, size_t *>(89, context, &count)) return s;
    void *value = nullptr;
    if (index >= count) return nullptr;
    if (Status s = call<Status, void *, size_t, const int64_t *, size_t, void **>(91, context, index, tensor->dims,
                                                                                tensor->rank, &value))
      return s;
    return value ? data(value, tensor) : nullptr;
  }

  // Runs task(argument, i) for i < count on the session's own threads, and waits.
  Status parallel(const void *context, void (*task)(void *, size_t), size_t count, void *argument) const {
    using Task = void (*)(void *, size_t);
    if (count == 0) return nullptr;
    return call<Status, const void *, Task, size_t, size_t, void *>(274, context, task, count, 0, argument);
  }

  // The CUDA stream in which a kernel of the CUDA provider has to work; null for kernels of the CPU.
  void *gpu_stream(const void *context) const {
    void *stream = nullptr;
    release_status(call<Status, const void *, void **>(193, context, &stream));
    return stream;
  }

  Status create_domain(const char *name, void **domain) const {
    return call<Status, const char *, void **>(26, name, domain);
  }
  Status add_op(void *domain, const CustomOp *op) const {
    return call<Status, void *, const CustomOp *>(27, domain, op);
  }
  Status add_domain(void *options, void *domain) const { return call<Status, void *, void *>(28, options, domain); }

 private:
  template <class Result, class... Arguments>
  Result call(int slot, Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(table_[slot])(arguments...);
  }
  void release_status(Status s) const {
    if (s) call<void, Status>(93, s);
  }
  Status data(const void *value, Tensor *tensor) const {
    if (Status s = call<Status, const void *, void **>(51, value, &tensor->data)) return s;
    static char nothing[64];  // an empty tensor may have no memory, but is there
    if (!tensor->data) tensor->data = nothing;
    return nullptr;
  }
  Status shape(const void *value, Tensor *tensor) const {
    void *info = nullptr;
    if (Status s = call<Status, const void *, void **>(65, value, &info)) return s;
    Status s = call<Status, const void *, size_t *>(61, info, &tensor->rank);
    if (!s && tensor->rank > Tensor::kMaxRank) s = error(kInvalidArgument, "matexport: an input has too many axes");
    if (!s) s = call<Status, const void *, int64_t *, size_t>(62, info, tensor->dims, tensor->rank);
    call<void, void *>(99, info);
    return s;
  }

  void *const *table_;
};

}  // namespace matexport::ort
