// CausalConv1d as an operator of ONNX Runtime: checks, layouts, and the parallel part.
#include "ort_cpu.h"

#include <algorithm>
#include <iterator>

#include "../native/op.h"

namespace matexport {
namespace {

using ort::kBool, ort::kFloat, ort::kOptional, ort::kRequired;

class CausalConv1d {
 public:
  static constexpr char kName[] = "CausalConv1d";
  static constexpr Input kInputs[] = {
      {kFloat, kRequired}, {kFloat, kRequired}, {kFloat, kRequired}, {kFloat, kOptional}, {kBool, kOptional},
  };
  static constexpr size_t kOutputs = 2;

  CausalConv1d(ort::Api api, const Kernels &kernels) : api_(api), kernels_(kernels) {}

  ort::Status configure(const void *) { return nullptr; }

  ort::Status compute(void *context) {
    ort::Tensor in[std::size(kInputs)], out[kOutputs];
    for (size_t i = 0; i < std::size(in); ++i)
      if (ort::Status s = api_.input(context, i, &in[i])) return s;
    ConvProblem p = {};
    if (ort::Status s = check(in, &p)) return s;
    out[0] = in[0];
    out[1].rank = 3;
    out[1].dims[0] = p.batch, out[1].dims[1] = p.channels, out[1].dims[2] = p.k - 1;
    for (size_t i = 0; i < kOutputs; ++i) {
      out[i].data = nullptr;
      if (ort::Status s = api_.output(context, i, &out[i])) return s;
    }
    p.x = in[0].floats(), p.weight = in[1].floats(), p.bias = in[2].floats(), p.state = in[3].floats();
    p.mask = in[4].bools(), p.y = out[0].floats(), p.final_state = out[1].floats();
    if (p.length == 1) {
      for (int64_t b = 0; b < p.batch; ++b) kernels_.conv_step(&p, size_t(b));
      return nullptr;
    }
    return run(context, &p);
  }

 private:
  ort::Status run(void *context, ConvProblem *p) {
    const int64_t C = p->channels, k = p->k, before = k - 1;
    Workspace::Block *block = workspace_.take(size_t((k + p->batch * before) * C));
    if (!block) return api_.error(ort::kRuntimeException, "CausalConv1d: out of memory");
    float *taps = block->data, *history = taps + k * C;
    transpose(p->weight, C, k, taps);
    for (int64_t b = 0; b < p->batch; ++b) {
      if (p->state)
        transpose(p->state + b * before * C, C, before, history + b * before * C);
      else
        std::fill_n(history + b * before * C, before * C, 0.f);
    }
    p->taps = taps, p->history = history;
    const int64_t blocks = (p->length + kConvRows - 1) / kConvRows;
    ort::Status s = api_.parallel(context, kernels_.conv_rows, size_t(p->batch * blocks), p);
    if (!s && p->final_state) {
      const float *rows[kMaxKernel];
      for (int64_t b = 0; b < p->batch; ++b) {
        rows_before(*p, b, p->length, rows);
        float *state = p->final_state + b * before * C;
        for (int64_t c = 0; c < C; ++c)
          for (int64_t i = 0; i < before; ++i) state[c * before + i] = rows[i][c];
      }
    }
    workspace_.give_back(block);
    return s;
  }

  static void transpose(const float *source, int64_t rows, int64_t columns, float *target) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) target[c * rows + r] = source[r * columns + c];
  }

  // Takes the sizes from x and weight; every other input has to fit them.
  ort::Status check(const ort::Tensor *in, ConvProblem *p) const {
    const ort::Tensor &x = in[0], &weight = in[1];
    if (x.rank != 3 || weight.rank != 3)
      return refuse(api_, "CausalConv1d: x and weight need 3 axes, not %zu and %zu", x.rank, weight.rank);
    p->batch = x.dims[0], p->length = x.dims[1], p->channels = x.dims[2], p->k = weight.dims[2];
    if (p->length < 1) return refuse(api_, "CausalConv1d: x has no steps; its length must be at least 1");
    if (p->k < 1 || p->k > kMaxKernel)
      return refuse(api_, "CausalConv1d: %lld taps, and 1 to %d are possible", (long long)p->k, kMaxKernel);
    const struct {
      const char *name;
      int index;
      size_t rank;
      int64_t dims[3];
    } wanted[] = {{"weight", 1, 3, {p->channels, 1, p->k}},
                  {"bias", 2, 1, {p->channels}},
                  {"state", 3, 3, {p->batch, p->channels, p->k - 1}},
                  {"mask", 4, 2, {p->batch, p->length}}};
    for (const auto &w : wanted) {
      const ort::Tensor &t = in[w.index];
      if (!t.data) continue;
      if (t.rank != w.rank) return refuse(api_, "CausalConv1d: %s has %zu axes and needs %zu", w.name, t.rank, w.rank);
      for (size_t i = 0; i < w.rank; ++i)
        if (t.dims[i] != w.dims[i])
          return refuse(api_, "CausalConv1d: axis %zu of %s is %lld, and %lld would fit x and weight", i, w.name,
                        (long long)t.dims[i], (long long)w.dims[i]);
    }
    return nullptr;
  }

  ort::Api api_;
  const Kernels &kernels_;
  Workspace workspace_;
};

const ort::CustomOp kOp = custom_op<CausalConv1d>();

}  // namespace

const ort::CustomOp *causal_conv1d_op() { return &kOp; }

}  // namespace matexport
