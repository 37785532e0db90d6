// Mamba2Scan and CausalConv1d as TensorRT plugins (IPluginV3), for TensorRT 10.3 and newer and TensorRT-RTX.
//
// Inputs and outputs are those of the ops. Optional inputs that a node leaves out are not there, and are told apart by
// type and rank: the mask is bool, the scan's state has four axes. Field `in_place` (default 0): the final state is
// written where the state is read, which TensorRT allows with its preview feature for aliased plugin I/O only. Field
// `final_state` (default 1) of the scan: whether it has that output. It can be larger than x.
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <new>

#include "matexport_cuda.h"
#include "trt_abi.h"

namespace {

using namespace nvinfer1;
constexpr char kNamespace[] = "ai.matexport", kVersion[] = "1";

struct Attributes {
  int32_t groups = 1, in_place = 0, final_state = 1;
  float dt_limit[2] = {0.f, INFINITY};
};

int type_of(DataType t) {
  if (t == DataType::kFLOAT) return MATEXPORT_FLOAT32;
  if (t == DataType::kHALF) return MATEXPORT_FLOAT16;
  return t == DataType::kBF16 ? int(MATEXPORT_BFLOAT16) : int(MATEXPORT_BAD_TYPE);
}

// Where the optional inputs are; -1 where they are not.
struct Optional {
  int state = -1, mask = -1, z = -1;

  template <class TypeAt, class RankAt>
  Optional(bool scan, int count, TypeAt type, RankAt rank) {
    for (int i = scan ? 7 : 3; i < count; ++i) {
      if (type(i) == DataType::kBOOL) mask = i;
      else if (scan && rank(i) == 3) z = i;
      else state = i;
    }
  }
};
Optional optional_inputs(bool scan, const PluginTensorDesc *in, int count) {
  return Optional(scan, count, [=](int i) { return in[i].type; }, [=](int i) { return in[i].dims.nbDims; });
}
Optional optional_inputs(bool scan, const DynamicPluginTensorDesc *in, int count) {
  return Optional(scan, count, [=](int i) { return in[i].desc.type; }, [=](int i) { return in[i].desc.dims.nbDims; });
}

// Sizes from the shapes of the required inputs. False where they do not fit each other.
bool scan_sizes(const Dims &x, const Dims &A, const Dims &B, const Attributes &a, matexport_scan *p) {
  if (x.nbDims != 3 || A.nbDims != 1 || B.nbDims != 3 || A.d[0] < 1 || x.d[2] % A.d[0] || A.d[0] % a.groups ||
      B.d[2] % a.groups)
    return false;
  p->batch = x.d[0], p->length = x.d[1], p->heads = A.d[0], p->groups = a.groups;
  p->N = B.d[2] / a.groups, p->P = x.d[2] / A.d[0];
  p->dt_min = a.dt_limit[0], p->dt_max = a.dt_limit[1];
  return true;
}
bool is(const Dims &dims, std::initializer_list<int64_t> wanted) {
  if (dims.nbDims != int(wanted.size())) return false;
  for (int i = 0; i < dims.nbDims; ++i)
    if (dims.d[i] != wanted.begin()[i]) return false;
  return true;
}

template <bool kScan>
class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuildV2, public IPluginV3OneRuntime {
  static constexpr int kRequired = kScan ? 7 : 3;

 public:
  explicit Plugin(const Attributes &a) : a_(a) {}

  IPluginCapability *getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore *>(this);
      case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild *>(this);
      case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime *>(this);
    }
    return nullptr;
  }
  IPluginV3 *clone() noexcept override {
    Plugin *p = new (std::nothrow) Plugin(a_);
    if (p) p->inputs_ = inputs_, p->state_ = state_;
    return p;
  }
  IPluginV3 *attachToContext(IPluginResourceContext *) noexcept override { return clone(); }

  AsciiChar const *getPluginName() const noexcept override { return kScan ? "Mamba2Scan" : "CausalConv1d"; }
  AsciiChar const *getPluginVersion() const noexcept override { return kVersion; }
  AsciiChar const *getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return a_.final_state ? 2 : 1; }
  int32_t getOutputDataTypes(DataType *out, int32_t, DataType const *in, int32_t inputs) const noexcept override {
    if (inputs < kRequired) return 1;
    out[0] = in[0];
    if (a_.final_state) out[1] = DataType::kFLOAT;
    return 0;
  }
  int32_t getOutputShapes(DimsExprs const *in, int32_t inputs, DimsExprs const *, int32_t, DimsExprs *out, int32_t,
                          IExprBuilder &make) noexcept override {
    if (inputs < kRequired || in[0].nbDims != 3) return 1;
    const auto divide = [&](IDimensionExpr const *a, IDimensionExpr const *b) {
      return make.operation(DimensionOperation::kFLOOR_DIV, *a, *b);
    };
    out[0] = in[0];
    if (kScan && !a_.final_state) return 0;
    if (kScan) {
      if (in[2].nbDims != 1 || in[3].nbDims != 3) return 1;
      out[1].nbDims = 4;
      out[1].d[0] = in[0].d[0], out[1].d[1] = in[2].d[0];
      out[1].d[2] = divide(in[3].d[2], make.constant(a_.groups)), out[1].d[3] = divide(in[0].d[2], in[2].d[0]);
    } else {
      if (in[1].nbDims != 3) return 1;
      out[1].nbDims = 3;
      out[1].d[0] = in[0].d[0], out[1].d[1] = in[0].d[2];
      out[1].d[2] = make.operation(DimensionOperation::kSUB, *in[1].d[2], *make.constant(1));
    }
    // Optional inputs have to be known for the aliases, and here they are, but for their types. The mask has two axes.
    for (int i = kRequired; i < inputs; ++i)
      if (in[i].nbDims == (kScan ? 4 : 3)) state_ = i;
    return 0;
  }
  bool supportsFormatCombination(int32_t at, DynamicPluginTensorDesc const *io, int32_t inputs,
                                 int32_t) noexcept override {
    const PluginTensorDesc &t = io[at].desc;
    if (t.format != TensorFormat::kLINEAR) return false;
    const DataType x = io[0].desc.type;
    if (at == 0) return type_of(x) >= 0;
    if (at >= inputs) return t.type == (at == inputs ? x : DataType::kFLOAT);
    if (at >= kRequired)
      return t.dims.nbDims == 2 ? t.type == DataType::kBOOL
                                : t.type == (kScan && t.dims.nbDims == 3 ? x : DataType::kFLOAT);
    const bool like_x = kScan && (at == 1 || at == 3 || at == 4);  // dt_raw, B, C
    return t.type == (like_x ? x : DataType::kFLOAT);
  }
  int32_t configurePlugin(DynamicPluginTensorDesc const *in, int32_t inputs, DynamicPluginTensorDesc const *,
                          int32_t) noexcept override {
    inputs_ = inputs;
    state_ = optional_inputs(kScan, in, inputs).state;
    return inputs < kRequired;
  }
  size_t getWorkspaceSize(DynamicPluginTensorDesc const *in, int32_t, DynamicPluginTensorDesc const *,
                          int32_t) const noexcept override {
    matexport_scan p = {};
    if (!kScan || !scan_sizes(in[0].max, in[2].max, in[3].max, a_, &p)) return 0;
    return matexport_cuda_scan_most_workspace(&p, type_of(in[0].desc.type));
  }
  int32_t getAliasedInput(int32_t output) noexcept override { return output == 1 && a_.in_place ? state_ : -1; }

  int32_t onShapeChange(PluginTensorDesc const *in, int32_t inputs, PluginTensorDesc const *, int32_t) noexcept override {
    inputs_ = inputs;
    return kScan ? check_scan(in) : check_conv(in);
  }
  int32_t enqueue(PluginTensorDesc const *in, PluginTensorDesc const *, void const *const *inputs, void *const *outputs,
                  void *workspace, cudaStream_t stream) noexcept override {
    const Optional at = optional_inputs(kScan, in, inputs_);
    const auto given = [=](int i) { return i < 0 ? nullptr : inputs[i]; };
    const auto floats = [=](int i) { return static_cast<const float *>(given(i)); };
    const auto mask = static_cast<const unsigned char *>(given(at.mask));
    if (kScan) {
      matexport_scan p = {};
      if (!scan_sizes(in[0].dims, in[2].dims, in[3].dims, a_, &p)) return MATEXPORT_BAD_SIZES;
      p.x = inputs[0], p.dt_raw = inputs[1], p.A = floats(2), p.B = inputs[3], p.C = inputs[4], p.D = floats(5);
      p.dt_bias = floats(6), p.state = floats(at.state), p.mask = mask, p.z = given(at.z);
      p.y = outputs[0], p.final_state = a_.final_state ? static_cast<float *>(outputs[1]) : nullptr;
      return matexport_cuda_scan(&p, type_of(in[0].type), workspace, stream);
    }
    matexport_conv p = {};
    const Dims &x = in[0].dims, &weight = in[1].dims;
    p.batch = x.d[0], p.length = x.d[1], p.channels = x.d[2], p.k = weight.d[2];
    p.x = inputs[0], p.weight = floats(1), p.bias = floats(2), p.state = floats(at.state), p.mask = mask;
    p.y = outputs[0], p.final_state = static_cast<float *>(outputs[1]);
    return matexport_cuda_conv(&p, type_of(in[0].type), stream);
  }
  PluginFieldCollection const *getFieldsToSerialize() noexcept override {
    int n = 0;
    fields_[n++] = {"in_place", &a_.in_place, PluginFieldType::kINT32, 1};
    if (kScan) {
      fields_[n++] = {"groups", &a_.groups, PluginFieldType::kINT32, 1};
      fields_[n++] = {"final_state", &a_.final_state, PluginFieldType::kINT32, 1};
      fields_[n++] = {"dt_limit", a_.dt_limit, PluginFieldType::kFLOAT32, 2};
    }
    collection_ = {n, fields_};
    return &collection_;
  }

 private:
  int check_scan(const PluginTensorDesc *in) const {
    matexport_scan p = {};
    if (inputs_ < kRequired || !scan_sizes(in[0].dims, in[2].dims, in[3].dims, a_, &p)) return 1;
    const Optional at = optional_inputs(true, in, inputs_);
    const int64_t b = p.batch, l = p.length, h = p.heads, gn = in[3].dims.d[2];
    return !(is(in[1].dims, {b, l, h}) && is(in[3].dims, {b, l, gn}) && is(in[4].dims, {b, l, gn}) &&
             is(in[5].dims, {h}) && is(in[6].dims, {h}) && (at.mask < 0 || is(in[at.mask].dims, {b, l})) &&
             (at.state < 0 || is(in[at.state].dims, {b, h, p.N, p.P})) &&
             (at.z < 0 || is(in[at.z].dims, {b, l, in[0].dims.d[2]})));
  }
  int check_conv(const PluginTensorDesc *in) const {
    if (inputs_ < kRequired || in[0].dims.nbDims != 3 || in[1].dims.nbDims != 3) return 1;
    const Optional at = optional_inputs(false, in, inputs_);
    const int64_t b = in[0].dims.d[0], l = in[0].dims.d[1], c = in[0].dims.d[2], k = in[1].dims.d[2];
    return !(is(in[1].dims, {c, 1, k}) && is(in[2].dims, {c}) && (at.mask < 0 || is(in[at.mask].dims, {b, l})) &&
             (at.state < 0 || is(in[at.state].dims, {b, c, k - 1})));
  }

  Attributes a_;
  int inputs_ = 0, state_ = -1;
  PluginField fields_[4];
  PluginFieldCollection collection_{};
};

template <bool kScan>
class Creator final : public IPluginCreatorV3One {
 public:
  IPluginV3 *createPlugin(AsciiChar const *, PluginFieldCollection const *given, TensorRTPhase) noexcept override {
    Attributes a;
    for (int i = 0; given && i < given->nbFields; ++i) {
      const PluginField &f = given->fields[i];
      if (!f.data) continue;
      const bool number = f.type == PluginFieldType::kINT32 && f.length == 1;
      if (!std::strcmp(f.name, "groups") && number) std::memcpy(&a.groups, f.data, 4);
      if (!std::strcmp(f.name, "in_place") && number) std::memcpy(&a.in_place, f.data, 4);
      if (!std::strcmp(f.name, "final_state") && number && kScan) std::memcpy(&a.final_state, f.data, 4);
      if (!std::strcmp(f.name, "dt_limit")) {
        if (f.type != PluginFieldType::kFLOAT32 || f.length != 2) return nullptr;
        std::memcpy(a.dt_limit, f.data, 8);
      }
    }
    if (a.groups < 1 || !(a.dt_limit[0] <= a.dt_limit[1])) return nullptr;
    return new (std::nothrow) Plugin<kScan>(a);
  }
  PluginFieldCollection const *getFieldNames() noexcept override { return &names_; }
  AsciiChar const *getPluginName() const noexcept override { return kScan ? "Mamba2Scan" : "CausalConv1d"; }
  AsciiChar const *getPluginVersion() const noexcept override { return kVersion; }
  AsciiChar const *getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  PluginField fields_[4] = {{"in_place", nullptr, PluginFieldType::kINT32, 1},
                            {"groups", nullptr, PluginFieldType::kINT32, 1},
                            {"final_state", nullptr, PluginFieldType::kINT32, 1},
                            {"dt_limit", nullptr, PluginFieldType::kFLOAT32, 2}};
  PluginFieldCollection names_ = {kScan ? 4 : 1, fields_};
};

}  // namespace

#define PLUGIN_EXPORT extern "C" __attribute__((visibility("default")))

// What IPluginRegistry::loadLibrary looks for.
PLUGIN_EXPORT IPluginCreatorInterface *const *getCreators(int32_t &count) {
  static Creator<true> scan;
  static Creator<false> conv;
  static IPluginCreatorInterface *const creators[] = {&scan, &conv};
  count = 2;
  return creators;
}
PLUGIN_EXPORT void setLoggerFinder(ILoggerFinder *) {}
