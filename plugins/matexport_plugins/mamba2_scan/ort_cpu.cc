// Mamba2Scan as an operator of ONNX Runtime: attributes, checks, and the order of the parallel parts.
#include "ort_cpu.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "../native/op.h"

namespace matexport {
namespace {

using ort::kBool, ort::kFloat, ort::kOptional, ort::kRequired;

constexpr int64_t kSerialState = 1 << 14;  // a single step over fewer floats is not worth waking threads

class Mamba2Scan {
 public:
  static constexpr char kName[] = "Mamba2Scan";
  static constexpr Input kInputs[] = {
      {kFloat, kRequired}, {kFloat, kRequired}, {kFloat, kRequired}, {kFloat, kRequired}, {kFloat, kRequired},
      {kFloat, kRequired}, {kFloat, kRequired}, {kFloat, kOptional}, {kBool, kOptional},  {kFloat, kOptional},
  };
  static constexpr size_t kOutputs = 2;

  Mamba2Scan(ort::Api api, const Kernels &kernels) : api_(api), kernels_(kernels) {}

  ort::Status configure(const void *info) {
    api_.attribute(info, "groups", &groups_);
    if (groups_ < 1) return refuse(api_, "Mamba2Scan: groups must be at least 1");
    if (!api_.attribute(info, "dt_limit", dt_limit_, 2) || !(dt_limit_[0] <= dt_limit_[1]))
      return refuse(api_, "Mamba2Scan: dt_limit must be two numbers, the smaller one first");
    int64_t bf16 = 0;
    api_.attribute(info, "bfloat16", &bf16);
    bf16_ = bf16 && has_bf16_dots(kernels_);
    return nullptr;
  }

  ort::Status compute(void *context) {
    ort::Tensor in[std::size(kInputs)], out[kOutputs];
    for (size_t i = 0; i < std::size(in); ++i)
      if (ort::Status s = api_.input(context, i, &in[i])) return s;
    ScanProblem p = {};
    if (ort::Status s = check(in, &p)) return s;
    out[0] = in[0];
    out[1].rank = 4;
    const int64_t state_dims[] = {p.batch, p.heads, p.N, p.P};
    std::copy(std::begin(state_dims), std::end(state_dims), out[1].dims);
    for (size_t i = 0; i < kOutputs; ++i) {
      out[i].data = nullptr;
      if (ort::Status s = api_.output(context, i, &out[i])) return s;
    }
    p.x = in[0].floats(), p.dt_raw = in[1].floats(), p.A = in[2].floats(), p.B = in[3].floats(), p.C = in[4].floats();
    p.D = in[5].floats(), p.dt_bias = in[6].floats(), p.state = in[7].floats(), p.mask = in[8].bools();
    p.z = in[9].floats(), p.y = out[0].floats(), p.final_state = out[1].floats();
    p.dt_min = dt_limit_[0], p.dt_max = dt_limit_[1];
    p.bf16 = bf16_ && p.N % 16 == 0 && p.N <= kMaxPairedState;
    return run(context, &p);
  }

 private:
  ort::Status run(void *context, ScanProblem *p) {
    const size_t heads = size_t(p->batch * p->heads);
    if (p->length == 1) {
      if (int64_t(heads) * p->N * p->P >= kSerialState) return api_.parallel(context, kernels_.scan_step, heads, p);
      for (size_t i = 0; i < heads; ++i) kernels_.scan_step(p, i);
      return nullptr;
    }
    Workspace::Block *block = workspace_.take(kernels_.scan_plan(p));
    if (!block) return api_.error(ort::kRuntimeException, "Mamba2Scan: out of memory");
    p->scratch = block->data;
    const int64_t chunks = (p->length + kChunk - 1) / kChunk;
    ort::Status s = nullptr;
    for (p->first = 0; p->first < chunks && !s; p->first += p->panel) {
      p->chunks = std::min(p->panel, chunks - p->first);
      s = api_.parallel(context, kernels_.scan_prepare, size_t(p->batch * p->groups * p->chunks), p);
      if (!s) s = api_.parallel(context, kernels_.scan_heads, heads / size_t(p->unit), p);
    }
    workspace_.give_back(block);
    return s;
  }

  // Takes the sizes from x, A and B; every other input has to fit them.
  ort::Status check(const ort::Tensor *in, ScanProblem *p) const {
    const ort::Tensor &x = in[0], &A = in[2], &B = in[3];
    if (x.rank != 3 || A.rank != 1 || B.rank != 3)
      return refuse(api_, "Mamba2Scan: x, A, B need 3, 1, 3 axes, not %zu, %zu, %zu", x.rank, A.rank, B.rank);
    p->batch = x.dims[0], p->length = x.dims[1], p->heads = A.dims[0], p->groups = groups_;
    if (p->length < 1) return refuse(api_, "Mamba2Scan: x has no steps; its length must be at least 1");
    if (p->heads < 1 || p->heads % groups_ || x.dims[2] % p->heads || x.dims[2] == 0)
      return refuse(api_, "Mamba2Scan: A has %lld heads, which must divide the %lld channels of x and be divisible by "
                    "the %lld groups", (long long)p->heads, (long long)x.dims[2], (long long)groups_);
    p->P = x.dims[2] / p->heads, p->N = B.dims[2] / groups_;
    if (p->N < 1 || B.dims[2] % groups_)
      return refuse(api_, "Mamba2Scan: the last axis of B (%lld) is not divisible by the %lld groups",
                    (long long)B.dims[2], (long long)groups_);
    const int64_t b = p->batch, l = p->length, h = p->heads, gn = B.dims[2];
    const struct {
      const char *name;
      int index;
      size_t rank;
      int64_t dims[4];
    } wanted[] = {{"dt_raw", 1, 3, {b, l, h}}, {"B", 3, 3, {b, l, gn}},       {"C", 4, 3, {b, l, gn}},
                  {"D", 5, 1, {h}},            {"dt_bias", 6, 1, {h}},        {"state", 7, 4, {b, h, p->N, p->P}},
                  {"mask", 8, 2, {b, l}},      {"z", 9, 3, {b, l, x.dims[2]}}};
    for (const auto &w : wanted) {
      const ort::Tensor &t = in[w.index];
      if (!t.data) continue;
      if (t.rank != w.rank) return refuse(api_, "Mamba2Scan: %s has %zu axes and needs %zu", w.name, t.rank, w.rank);
      for (size_t i = 0; i < w.rank; ++i)
        if (t.dims[i] != w.dims[i])
          return refuse(api_, "Mamba2Scan: axis %zu of %s is %lld, and %lld would fit x, A and B", i, w.name,
                        (long long)t.dims[i], (long long)w.dims[i]);
    }
    return nullptr;
  }

  ort::Api api_;
  const Kernels &kernels_;
  Workspace workspace_;
  int64_t groups_ = 1;
  float dt_limit_[2] = {0.f, INFINITY};
  bool bf16_ = false;
};

const ort::CustomOp kOp = custom_op<Mamba2Scan>();

}  // namespace

const ort::CustomOp *mamba2_scan_op() { return &kOp; }

}  // namespace matexport
