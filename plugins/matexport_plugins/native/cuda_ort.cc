// Mamba2Scan and CausalConv1d as operators of ONNX Runtime on CUDA: attributes, checks, and the calls of matexport_cuda.h.
#include "cuda_ort.h"

#include <climits>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <iterator>

#include "matexport_cuda.h"

// What cuda_library.cu has beside its plain C interface: memory in the order of a stream.
extern "C" void *matexport_cuda_allocate(size_t bytes, void *stream);
extern "C" void matexport_cuda_release(void *memory, void *stream);

#ifndef MATEXPORT_PROVIDER
#define MATEXPORT_PROVIDER "CUDAExecutionProvider"
#endif

namespace matexport {
namespace {

using ort::CustomOp, ort::kBool, ort::kFloat, ort::Status, ort::Tensor;

struct Input {
  const char *name;
  int type;  // 0: that of x
  size_t rank;
  bool optional;
};
constexpr Input kScanInputs[] = {
    {"x", 0, 3, false},       {"dt_raw", 0, 3, false},     {"A", kFloat, 1, false},    {"B", 0, 3, false},
    {"C", 0, 3, false},       {"D", kFloat, 1, false},     {"dt_bias", kFloat, 1, false}, {"state", kFloat, 4, true},
    {"mask", kBool, 2, true}, {"z", 0, 3, true},
};
constexpr Input kConvInputs[] = {
    {"x", 0, 3, false}, {"weight", kFloat, 3, false}, {"bias", kFloat, 1, false}, {"state", kFloat, 3, true},
    {"mask", kBool, 2, true},
};
constexpr int kElementTypes[] = {ort::kFloat, ort::kFloat16, ort::kBfloat16};  // in the order of MATEXPORT_FLOAT32 ...

struct Kernel {
  ort::Api api;
  int64_t groups = 1;
  float dt_limit[2] = {0.f, INFINITY};

  __attribute__((format(printf, 2, 3))) Status refuse(const char *format, ...) const {
    char text[256];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return api.error(ort::kInvalidArgument, text);
  }

  // Reads all inputs, whose ranks have to be those in the table.
  template <size_t kCount>
  Status read(void *context, const char *op, const Input (&inputs)[kCount], Tensor *tensors) const {
    for (size_t i = 0; i < kCount; ++i) {
      if (Status s = api.input(context, i, &tensors[i])) return s;
      if (tensors[i].data && tensors[i].rank != inputs[i].rank)
        return refuse("%s: %s has %zu axes and needs %zu", op, inputs[i].name, tensors[i].rank, inputs[i].rank);
    }
    return nullptr;
  }
  struct Fit {
    int input;
    int64_t dims[4];
  };
  template <size_t kCount, size_t kFits>
  Status fit(const char *op, const Input (&inputs)[kCount], const Tensor *tensors, const Fit (&fits)[kFits]) const {
    for (const Fit &f : fits)
      for (size_t i = 0; tensors[f.input].data && i < inputs[f.input].rank; ++i)
        if (tensors[f.input].dims[i] != f.dims[i])
          return refuse("%s: axis %zu of %s is %lld, and %lld would fit", op, i, inputs[f.input].name,
                        (long long)tensors[f.input].dims[i], (long long)f.dims[i]);
    return nullptr;
  }
  Status result(const char *op, int status) const {
    return status ? refuse("%s: %s", op, matexport_cuda_error(status)) : nullptr;
  }

  Status scan(void *context, int type) const {
    const char *op = "Mamba2Scan";
    Tensor in[std::size(kScanInputs)], y, state;
    if (Status s = read(context, op, kScanInputs, in)) return s;
    matexport_scan p = {};
    p.batch = in[0].dims[0], p.length = in[0].dims[1], p.heads = in[2].dims[0], p.groups = groups;
    p.dt_min = dt_limit[0], p.dt_max = dt_limit[1];
    if (p.length < 1) return refuse("%s: x has no steps; its length must be at least 1", op);
    if (p.heads < 1 || p.heads % groups || in[0].dims[2] < 1 || in[0].dims[2] % p.heads)
      return refuse("%s: A has %lld heads, which must divide the %lld channels of x and be divisible by the %lld groups",
                    op, (long long)p.heads, (long long)in[0].dims[2], (long long)groups);
    p.P = in[0].dims[2] / p.heads, p.N = in[3].dims[2] / groups;
    if (p.N < 1 || in[3].dims[2] % groups)
      return refuse("%s: the last axis of B (%lld) is not divisible by the %lld groups", op, (long long)in[3].dims[2],
                    (long long)groups);
    const int64_t b = p.batch, l = p.length, h = p.heads, gn = in[3].dims[2];
    const Fit fits[] = {{1, {b, l, h}}, {3, {b, l, gn}}, {4, {b, l, gn}},          {5, {h}},
                        {6, {h}},       {8, {b, l}},     {7, {b, h, p.N, p.P}}, {9, {b, l, in[0].dims[2]}}};
    if (Status s = fit(op, kScanInputs, in, fits)) return s;
    y.rank = 3, y.dims[0] = b, y.dims[1] = l, y.dims[2] = in[0].dims[2];
    state.rank = 4, state.dims[0] = b, state.dims[1] = h, state.dims[2] = p.N, state.dims[3] = p.P;
    if (Status s = api.output(context, 0, &y)) return s;
    if (Status s = api.output(context, 1, &state)) return s;
    p.x = in[0].data, p.dt_raw = in[1].data, p.A = in[2].floats(), p.B = in[3].data, p.C = in[4].data;
    p.D = in[5].floats(), p.dt_bias = in[6].floats(), p.state = in[7].floats();
    p.mask = static_cast<const unsigned char *>(in[8].data), p.z = in[9].data, p.y = y.data;
    p.final_state = state.floats();
    void *stream = api.gpu_stream(context), *memory = nullptr;
    const size_t bytes = matexport_cuda_scan_workspace(&p, type);
    if (bytes && !(memory = matexport_cuda_allocate(bytes, stream)))
      return api.error(ort::kRuntimeException, "Mamba2Scan: out of GPU memory");
    const int status = matexport_cuda_scan(&p, type, memory, stream);
    if (memory) matexport_cuda_release(memory, stream);
    return result(op, status);
  }

  Status conv(void *context, int type) const {
    const char *op = "CausalConv1d";
    Tensor in[std::size(kConvInputs)], y, state;
    if (Status s = read(context, op, kConvInputs, in)) return s;
    matexport_conv p = {};
    p.batch = in[0].dims[0], p.length = in[0].dims[1], p.channels = in[0].dims[2], p.k = in[1].dims[2];
    if (p.length < 1) return refuse("%s: x has no steps; its length must be at least 1", op);
    if (p.k < 1 || p.k > 256) return refuse("%s: %lld taps, and 1 to 256 are possible", op, (long long)p.k);
    const Fit fits[] = {{1, {p.channels, 1, p.k}}, {2, {p.channels}}, {3, {p.batch, p.channels, p.k - 1}},
                        {4, {p.batch, p.length}}};
    if (Status s = fit(op, kConvInputs, in, fits)) return s;
    y.rank = state.rank = 3;
    y.dims[0] = p.batch, y.dims[1] = p.length, y.dims[2] = p.channels;
    state.dims[0] = p.batch, state.dims[1] = p.channels, state.dims[2] = p.k - 1;
    if (Status s = api.output(context, 0, &y)) return s;
    if (Status s = api.output(context, 1, &state)) return s;
    p.x = in[0].data, p.weight = in[1].floats(), p.bias = in[2].floats(), p.state = in[3].floats();
    p.mask = static_cast<const unsigned char *>(in[4].data), p.y = y.data, p.final_state = state.floats();
    return result(op, matexport_cuda_conv(&p, type, api.gpu_stream(context)));
  }
};

// The OrtCustomOp of an op for x of type kType.
template <bool kScan, int kType>
constexpr CustomOp make_op() {
  CustomOp op = {};
  op.version = ort::kApiVersion;
  op.name = [](const CustomOp *) { return kScan ? "Mamba2Scan" : "CausalConv1d"; };
  op.provider = [](const CustomOp *) { return MATEXPORT_PROVIDER; };
  op.input_count = [](const CustomOp *) { return kScan ? std::size(kScanInputs) : std::size(kConvInputs); };
  op.input_type = [](const CustomOp *, size_t i) {
    const int type = (kScan ? kScanInputs : kConvInputs)[i].type;
    return type ? type : kElementTypes[kType];
  };
  op.input_characteristic = [](const CustomOp *, size_t i) {
    return (kScan ? kScanInputs : kConvInputs)[i].optional ? ort::kOptional : ort::kRequired;
  };
  op.input_memory = [](const CustomOp *, size_t) { return 0; };
  op.output_count = [](const CustomOp *) { return size_t(2); };
  op.output_type = [](const CustomOp *, size_t i) { return i == 0 ? kElementTypes[kType] : kFloat; };
  op.output_characteristic = [](const CustomOp *, size_t i) { return i == 0 ? ort::kRequired : ort::kOptional; };
  op.variadic_input_minimum = op.variadic_input_homogeneous = [](const CustomOp *) { return 1; };
  op.variadic_output_minimum = op.variadic_output_homogeneous = [](const CustomOp *) { return 1; };
  op.create = [](const CustomOp *, const void *table, const void *info, void **kernel) -> Status {
    Kernel k{ort::Api(table)};
    if (kScan) {
      k.api.attribute(info, "groups", &k.groups);
      if (k.groups < 1) return k.refuse("Mamba2Scan: groups must be at least 1");
      if (!k.api.attribute(info, "dt_limit", k.dt_limit, 2) || !(k.dt_limit[0] <= k.dt_limit[1]))
        return k.refuse("Mamba2Scan: dt_limit must be two numbers, the smaller one first");
    }
    Kernel *made = static_cast<Kernel *>(std::malloc(sizeof(Kernel)));
    if (!made) return k.api.error(ort::kRuntimeException, "matexport: out of memory");
    *made = k;
    *kernel = made;
    return nullptr;
  };
  op.destroy = [](void *kernel) { std::free(kernel); };
  op.compute = [](void *kernel, void *context) {
    return kScan ? static_cast<Kernel *>(kernel)->scan(context, kType)
                 : static_cast<Kernel *>(kernel)->conv(context, kType);
  };
  op.since_version = [](const CustomOp *) { return 1; };
  op.until_version = [](const CustomOp *) { return INT_MAX; };
  return op;
}

}  // namespace

const CustomOp kCudaOpTable[kCudaOps] = {
    make_op<true, MATEXPORT_FLOAT32>(),  make_op<true, MATEXPORT_FLOAT16>(),  make_op<true, MATEXPORT_BFLOAT16>(),
    make_op<false, MATEXPORT_FLOAT32>(), make_op<false, MATEXPORT_FLOAT16>(), make_op<false, MATEXPORT_BFLOAT16>(),
};

}  // namespace matexport
