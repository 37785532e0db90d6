// Drives the TensorRT plugins through their whole life without TensorRT: describe, types, shapes, formats, configure,
// workspace, serialise, clone, attach, new shapes, and a run compared with the recurrence in float64.
//
//   c++ -std=c++17 trt_harness.cc -o harness -ldl && ./harness LIBRARY        a library of kernels compiled for the CPU
//   nvcc -std=c++17 -x cu trt_harness.cc -o harness && ./harness LIBRARY      libmatexport_cuda.so on a machine with a GPU
//
// With -DMATEXPORT_TRT_HEADERS and NVIDIA's headers it is a check of trt_abi.h, with which the library was compiled.
#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "trt_abi.h"

using namespace nvinfer1;

#define CHECK(condition) \
  if (!(condition)) std::printf("line %d: not true: %s\n", __LINE__, #condition), std::exit(1)

namespace {

// ---------------------------------------------------------------------------------------------- memory for a kernel
class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(bytes ? bytes : 1) {
#ifdef __CUDACC__
    CHECK(cudaMalloc(&data_, bytes_) == cudaSuccess);
    CHECK(cudaMemset(data_, 0xff, bytes_) == cudaSuccess);
#else
    data_ = std::malloc(bytes_);
    std::memset(data_, 0xff, bytes_);  // NaN
#endif
  }
  Memory(const Memory &) = delete;
  ~Memory() {
#ifdef __CUDACC__
    cudaFree(data_);
#else
    std::free(data_);
#endif
  }
  void put(const void *from) {
#ifdef __CUDACC__
    CHECK(cudaMemcpy(data_, from, bytes_, cudaMemcpyHostToDevice) == cudaSuccess);
#else
    std::memcpy(data_, from, bytes_);
#endif
  }
  void get(void *to) {
#ifdef __CUDACC__
    CHECK(cudaDeviceSynchronize() == cudaSuccess);
    CHECK(cudaMemcpy(to, data_, bytes_, cudaMemcpyDeviceToHost) == cudaSuccess);
#else
    std::memcpy(to, data_, bytes_);
#endif
  }
  void *data() { return data_; }

 private:
  size_t bytes_;
  void *data_ = nullptr;
};

// ------------------------------------------------------------------------------------- sizes that are plain numbers
struct DimImpl : apiv::VDimensionExpr {
  int64_t value = 0;
  bool isConstant() const noexcept override { return true; }
  int64_t getConstantValue() const noexcept override { return value; }
  bool isSizeTensor() const noexcept override { return false; }
};
struct Dim : IDimensionExpr {
  DimImpl impl;
  explicit Dim(int64_t v) { impl.value = v, mImpl = &impl; }
};
struct BuilderImpl : apiv::VExprBuilder {
  std::deque<Dim> made;
  IDimensionExpr const *constant(int64_t v) noexcept override { return &made.emplace_back(v); }
  IDimensionExpr const *operation(DimensionOperation op, IDimensionExpr const &a, IDimensionExpr const &b) noexcept override {
    const int64_t x = a.getConstantValue(), y = b.getConstantValue();
    if (op == DimensionOperation::kSUB) return constant(x - y);
    CHECK(op == DimensionOperation::kFLOOR_DIV);
    return constant(x / y);
  }
  IDimensionExpr const *declareSizeTensor(int32_t, IDimensionExpr const &, IDimensionExpr const &) noexcept override {
    return nullptr;
  }
};
struct Builder : IExprBuilder {
  BuilderImpl impl;
  Builder() { mImpl = &impl; }
};

// --------------------------------------------------------------------------------------------------------- tensors
struct Tensor {
  DataType type;
  std::vector<int64_t> dims;
  std::vector<float> values;         // of floats
  std::vector<unsigned char> flags;  // of the mask

  size_t size() const {
    size_t n = 1;
    for (int64_t d : dims) n *= size_t(d);
    return n;
  }
  size_t bytes() const { return size() * (type == DataType::kBOOL ? 1 : 4); }
  PluginTensorDesc describe() const {
    PluginTensorDesc d = {};
    d.dims.nbDims = int32_t(dims.size());
    for (size_t i = 0; i < dims.size(); ++i) d.dims.d[i] = dims[i];
    d.type = type;
    return d;
  }
};
std::mt19937 generator(1);

Tensor random(std::vector<int64_t> dims, float scale = 1, float shift = 0) {
  Tensor t = {DataType::kFLOAT, std::move(dims), {}, {}};
  std::normal_distribution<float> normal;
  for (size_t i = t.size(); i--;) t.values.push_back(shift + scale * normal(generator));
  return t;
}
Tensor random_mask(std::vector<int64_t> dims) {
  Tensor t = {DataType::kBOOL, std::move(dims), {}, {}};
  for (size_t i = t.size(); i--;) t.flags.push_back(generator() % 4 != 0);
  return t;
}

// Both ops step by step in float64, after their READMEs; inputs in the order of the ops.
using Results = std::vector<std::vector<double>>;
Results scan(const std::vector<Tensor> &in, int64_t groups, double dt_max) {
  const int64_t b = in[0].dims[0], l = in[0].dims[1], h = in[2].dims[0], P = in[0].dims[2] / h, N = in[3].dims[2] / groups;
  Results out = {std::vector<double>(size_t(b * l * h * P)), {in[7].values.begin(), in[7].values.end()}};
  for (int64_t bt = 0; bt < b * l; ++bt)
    for (int64_t i = 0; i < h && in[8].flags[size_t(bt)]; ++i) {
      const double raw = double(in[1].values[size_t(bt * h + i)]) + in[6].values[size_t(i)];
      const double dt = std::fmin(std::log1p(std::exp(raw)), dt_max), decay = std::exp(dt * in[2].values[size_t(i)]);
      for (int64_t p = 0; p < P; ++p) {
        const size_t at = size_t((bt * h + i) * P + p);
        double y = double(in[5].values[size_t(i)]) * in[0].values[at];
        for (int64_t n = 0; n < N; ++n) {
          const size_t bc = size_t((bt * groups + i / (h / groups)) * N + n);
          double &S = out[1][size_t((((bt / l) * h + i) * N + n) * P + p)];
          S = decay * S + dt * in[3].values[bc] * in[0].values[at];
          y += in[4].values[bc] * S;
        }
        const double z = in[9].values[at];
        out[0][at] = y * z / (1 + std::exp(-z));
      }
    }
  return out;
}
Results convolve(const std::vector<Tensor> &in) {
  const int64_t b = in[0].dims[0], l = in[0].dims[1], c = in[0].dims[2], k = in[1].dims[2];
  Results out = {std::vector<double>(size_t(b * l * c)), {in[3].values.begin(), in[3].values.end()}};
  for (int64_t bt = 0; bt < b * l; ++bt)
    for (int64_t i = 0; i < c && in[4].flags[size_t(bt)]; ++i) {
      double *state = &out[1][size_t(((bt / l) * c + i) * (k - 1))], sum = in[2].values[size_t(i)];
      const double x = in[0].values[size_t(bt * c + i)];
      for (int64_t j = 0; j < k; ++j) sum += in[1].values[size_t(i * k + j)] * (j < k - 1 ? state[j] : x);
      for (int64_t j = 0; j < k - 1; ++j) state[j] = j < k - 2 ? state[j + 1] : x;
      out[0][size_t(bt * c + i)] = sum / (1 + std::exp(-sum));
    }
  return out;
}

// ------------------------------------------------------------------------------------------------------- a life
IPluginV3OneBuildV2 *build_of(IPluginV3 *p) {
  auto *capability = p->getCapabilityInterface(PluginCapabilityType::kBUILD);
  CHECK(capability && !std::strcmp(capability->getInterfaceInfo().kind, "PLUGIN_V3ONE_BUILD"));
  CHECK(capability->getInterfaceInfo().major == 2);
  return static_cast<IPluginV3OneBuildV2 *>(capability);
}
IPluginV3OneRuntime *runtime_of(IPluginV3 *p) {
  auto *capability = p->getCapabilityInterface(PluginCapabilityType::kRUNTIME);
  CHECK(capability && !std::strcmp(capability->getInterfaceInfo().kind, "PLUGIN_V3ONE_RUNTIME"));
  return static_cast<IPluginV3OneRuntime *>(capability);
}

void live(IPluginCreatorV3One *creator, const std::vector<Tensor> &in, const Results &want, bool in_place, int outs) {
  const bool is_scan = in.size() == 10;
  const int inputs = int(in.size()), all = inputs + outs, state_at = is_scan ? 7 : 3;
  // created from the attributes of a node
  int32_t groups = 2, alias = in_place, wrong = 0, final_state = outs - 1;
  float limit[2] = {0.f, 0.5f};
  const PluginField given[] = {{"groups", &groups, PluginFieldType::kINT32, 1},
                               {"in_place", &alias, PluginFieldType::kINT32, 1},
                               {"final_state", &final_state, PluginFieldType::kINT32, 1},
                               {"dt_limit", limit, PluginFieldType::kFLOAT32, 2}};
  const PluginFieldCollection fields = {4, given};
  IPluginV3 *plugin = creator->createPlugin("node", &fields, TensorRTPhase::kBUILD);
  CHECK(plugin && !std::strcmp(plugin->getInterfaceInfo().kind, "PLUGIN"));
  const PluginField bad[] = {{"groups", &wrong, PluginFieldType::kINT32, 1}};
  const PluginFieldCollection bad_fields = {1, bad};
  CHECK(!creator->createPlugin("node", &bad_fields, TensorRTPhase::kBUILD) || !is_scan);
  auto *core = static_cast<IPluginV3OneCore *>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
  CHECK(!std::strcmp(core->getInterfaceInfo().kind, "PLUGIN_V3ONE_CORE"));
  CHECK(!std::strcmp(core->getPluginName(), creator->getPluginName()));
  CHECK(!std::strcmp(core->getPluginNamespace(), "ai.matexport") && !std::strcmp(core->getPluginVersion(), "1"));

  // built: types, shapes, formats, workspace
  IPluginV3OneBuildV2 *build = build_of(plugin);
  std::vector<DataType> types;
  for (const Tensor &t : in) types.push_back(t.type);
  DataType out_types[2];
  for (DataType x : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
    types[0] = x;
    out_types[1] = DataType::kINT8;  // of an output that is not there it says nothing
    CHECK(build->getNbOutputs() == outs && build->getOutputDataTypes(out_types, outs, types.data(), inputs) == 0);
    CHECK(out_types[0] == x && out_types[1] == (outs == 2 ? DataType::kFLOAT : DataType::kINT8));
  }
  Builder sizes;
  std::vector<DimsExprs> in_sizes(in.size());
  for (size_t i = 0; i < in.size(); ++i) {
    in_sizes[i].nbDims = int32_t(in[i].dims.size());
    for (size_t j = 0; j < in[i].dims.size(); ++j) in_sizes[i].d[j] = sizes.impl.constant(in[i].dims[j]);
  }
  DimsExprs out_sizes[2];
  CHECK(build->getOutputShapes(in_sizes.data(), inputs, nullptr, 0, out_sizes, outs, sizes) == 0);
  std::vector<Tensor> out(size_t(outs), Tensor{});
  for (int o = 0; o < outs; ++o) {
    const Tensor &like = o ? in[size_t(state_at)] : in[0];
    CHECK(out_sizes[o].nbDims == int32_t(like.dims.size()));
    for (size_t j = 0; j < like.dims.size(); ++j) CHECK(out_sizes[o].d[j]->getConstantValue() == like.dims[j]);
    out[size_t(o)] = like;
  }
  CHECK(build->getOutputShapes(in_sizes.data(), 2, nullptr, 0, out_sizes, outs, sizes) != 0);
  CHECK(build->getAliasedInput(1) == (in_place ? state_at : -1) && build->getAliasedInput(0) == -1);
  std::vector<DynamicPluginTensorDesc> io(size_t(all), DynamicPluginTensorDesc{});
  for (int i = 0; i < all; ++i) {
    io[size_t(i)].desc = (i < inputs ? in[size_t(i)] : out[size_t(i - inputs)]).describe();
    io[size_t(i)].min = io[size_t(i)].opt = io[size_t(i)].max = io[size_t(i)].desc.dims;
  }
  for (int i = 0; i < all; ++i) CHECK(build->supportsFormatCombination(i, io.data(), inputs, outs));
  for (int i = 0; i < all; ++i) {  // one wrong type, or another format
    std::vector<DynamicPluginTensorDesc> other = io;
    other[size_t(i)].desc.type = DataType::kINT32;
    CHECK(!build->supportsFormatCombination(i, other.data(), inputs, outs));
    other = io;
    other[size_t(i)].desc.format = static_cast<TensorFormat>(1);
    CHECK(!build->supportsFormatCombination(i, other.data(), inputs, outs));
  }
  io[0].desc.type = DataType::kHALF;  // then y is that too, and what is as long as x; states and parameters are not
  CHECK(build->supportsFormatCombination(0, io.data(), inputs, outs));
  CHECK(!build->supportsFormatCombination(inputs, io.data(), inputs, outs));
  CHECK(outs == 1 || build->supportsFormatCombination(inputs + 1, io.data(), inputs, outs));
  CHECK(build->supportsFormatCombination(1, io.data(), inputs, outs) == !is_scan);
  io[0].desc.type = DataType::kFLOAT;
  CHECK(build->configurePlugin(io.data(), inputs, io.data() + inputs, outs) == 0);
  const size_t workspace = build->getWorkspaceSize(io.data(), inputs, io.data() + inputs, outs);
  CHECK(build->getNbTactics() == 0 && build->getTimingCacheID() == nullptr);

  // serialised, and made again from that; then cloned and attached
  const PluginFieldCollection *saved = runtime_of(plugin)->getFieldsToSerialize();
  CHECK(saved && saved->nbFields == (is_scan ? 4 : 1));
  IPluginV3 *loaded = creator->createPlugin("node", saved, TensorRTPhase::kRUNTIME);
  delete plugin;
  CHECK(loaded);
  IPluginV3 *copy = loaded->clone();
  delete loaded;
  IPluginV3 *attached = runtime_of(copy)->attachToContext(nullptr);
  delete copy;
  CHECK(attached);

  // run
  IPluginV3OneRuntime *runtime = runtime_of(attached);
  std::vector<PluginTensorDesc> descs, out_descs;
  for (const Tensor &t : out) out_descs.push_back(t.describe());
  for (const Tensor &t : in) descs.push_back(t.describe());
  std::vector<PluginTensorDesc> misfit = descs;
  misfit[size_t(state_at)].dims.d[1] += 1;
  CHECK(runtime->onShapeChange(misfit.data(), inputs, out_descs.data(), outs) != 0);
  CHECK(runtime->onShapeChange(descs.data(), inputs, out_descs.data(), outs) == 0);
  std::deque<Memory> memory;
  std::vector<const void *> pointers;
  for (const Tensor &t : in) {
    memory.emplace_back(t.bytes());
    memory.back().put(t.type == DataType::kBOOL ? static_cast<const void *>(t.flags.data()) : t.values.data());
    pointers.push_back(memory.back().data());
  }
  Memory y(out[0].bytes()), state(in[size_t(state_at)].bytes()), scratch(workspace);
  Memory &final_memory = in_place ? memory[size_t(state_at)] : state;
  void *const outputs[] = {y.data(), outs == 2 ? final_memory.data() : nullptr};
  const int status = runtime->enqueue(descs.data(), out_descs.data(), pointers.data(), outputs, scratch.data(), nullptr);
  if (status) std::printf("enqueue: %d\n", status);
  CHECK(status == 0);
  y.get(out[0].values.data());
  if (outs == 2) final_memory.get(out[1].values.data());
  for (size_t o = 0; o < size_t(outs); ++o) {
    double largest = 0, worst = 0;
    for (size_t i = 0; i < want[o].size(); ++i) {
      largest = std::fmax(largest, std::fabs(want[o][i]));
      const double e = std::fabs(out[o].values[i] - want[o][i]);
      if (!(e <= worst)) worst = std::isnan(e) ? std::numeric_limits<double>::infinity() : e;
    }
    CHECK(worst <= 1e-5 * largest);
  }
  std::printf("%s%s: one life, right results\n", creator->getPluginName(),
              in_place ? ", state in place" : outs == 1 ? ", without the state" : "");
  delete attached;
}

}  // namespace

int main(int argc, char **argv) {
  void *library = argc > 1 ? dlopen(argv[1], RTLD_NOW) : nullptr;
  if (!library) return std::printf("cannot load: %s\n", argc > 1 ? dlerror() : "no library was named"), 1;
  using Creators = IPluginCreatorInterface *const *(*)(int32_t &);
  int32_t count = 0;
  IPluginCreatorInterface *const *creators = reinterpret_cast<Creators>(dlsym(library, "getCreators"))(count);
  CHECK(count == 2 && dlsym(library, "setLoggerFinder"));
  for (int i = 0; i < count; ++i) CHECK(!std::strcmp(creators[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE"));
  auto *scan_creator = static_cast<IPluginCreatorV3One *>(creators[0]);
  auto *conv_creator = static_cast<IPluginCreatorV3One *>(creators[1]);
  CHECK(!std::strcmp(scan_creator->getPluginName(), "Mamba2Scan") && scan_creator->getFieldNames()->nbFields == 4);
  CHECK(!std::strcmp(conv_creator->getPluginName(), "CausalConv1d") && conv_creator->getFieldNames()->nbFields == 1);
  for (int64_t l : {1, 150, 700})
    for (bool in_place : {false, true}) {
      const int64_t b = 2, h = 4, P = 24, N = 16, gn = 2 * N;
      std::vector<Tensor> in = {random({b, l, h * P}), random({b, l, h}, 2, -1), random({h}), random({b, l, gn}),
                                random({b, l, gn}, 0.25f), random({h}), random({h}), random({b, h, N, P}),
                                random_mask({b, l}), random({b, l, h * P})};
      for (float &a : in[2].values) a = -std::exp(a);
      live(scan_creator, in, scan(in, 2, 0.5), in_place, 2);
      if (!in_place) live(scan_creator, in, scan(in, 2, 0.5), false, 1);
      in = {random({b, l, 40}), random({40, 1, 4}), random({40}), random({b, 40, 3}), random_mask({b, l})};
      live(conv_creator, in, convolve(in), in_place, 2);
    }
}
