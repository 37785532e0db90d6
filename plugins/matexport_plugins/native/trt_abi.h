// The part of TensorRT's C++ ABI that a plugin of interface V3 needs, declared by hand: no NVIDIA header, no link to
// libnvinfer. It is the same from TensorRT 10.3 to 11.1 and in TensorRT-RTX 1.7.
//
// What counts are sizes and offsets of the plain structs, numbers of the enumerators, and the order of virtual functions
// (Itanium C++ ABI; a virtual destructor takes two entries). Names are TensorRT's own, so that the types' RTTI is too.
// Compiled with MATEXPORT_TRT_HEADERS, all of it comes from NVIDIA's headers instead: a compiler then checks ours.
#pragma once

#ifdef MATEXPORT_TRT_HEADERS
#include "NvInferRuntime.h"
#include "NvInferRuntimePlugin.h"
#else

#include <cstddef>
#include <cstdint>

struct CUstream_st;
using cudaStream_t = CUstream_st *;

namespace nvinfer1 {

using AsciiChar = char;

enum class DataType : int32_t { kFLOAT = 0, kHALF = 1, kINT8 = 2, kINT32 = 3, kBOOL = 4, kBF16 = 7 };
enum class TensorFormat : int32_t { kLINEAR = 0 };
enum class PluginFieldType : int32_t { kFLOAT32 = 1, kINT32 = 5 };
enum class PluginCapabilityType : int32_t { kCORE = 0, kBUILD = 1, kRUNTIME = 2 };
enum class TensorRTPhase : int32_t { kBUILD = 0, kRUNTIME = 1 };
enum class APILanguage : int32_t { kCPP = 0 };
enum class DimensionOperation : int32_t {
  kSUM, kPROD, kMAX, kMIN, kSUB, kEQUAL, kLESS, kFLOOR_DIV, kCEIL_DIV
};

struct Dims64 {
  static constexpr int32_t MAX_DIMS = 8;
  int32_t nbDims;
  int64_t d[MAX_DIMS];
};
using Dims = Dims64;

struct PluginTensorDesc {
  Dims dims;
  DataType type;
  TensorFormat format;
  float scale;
};
struct DynamicPluginTensorDesc {
  PluginTensorDesc desc;
  Dims min, max, opt;
};
struct PluginField {
  AsciiChar const *name = nullptr;
  void const *data = nullptr;
  PluginFieldType type{};
  int32_t length = 0;
};
struct PluginFieldCollection {
  int32_t nbFields;
  PluginField const *fields;
};
static_assert(sizeof(Dims) == 72 && sizeof(PluginTensorDesc) == 88 && sizeof(DynamicPluginTensorDesc) == 304 &&
                  offsetof(PluginTensorDesc, type) == 72 && offsetof(DynamicPluginTensorDesc, max) == 160 &&
                  sizeof(PluginField) == 24 && offsetof(PluginField, type) == 16 && sizeof(PluginFieldCollection) == 16,
              "layout of TensorRT's structs");

// Sizes that are known when shapes are. An object is a virtual destructor and a pointer to what implements it.
class IDimensionExpr;
namespace apiv {
class VRoot {
 public:
  virtual ~VRoot() noexcept = default;
};
class VDimensionExpr : public VRoot {
 public:
  virtual bool isConstant() const = 0;
  virtual int64_t getConstantValue() const = 0;
  virtual bool isSizeTensor() const = 0;
};
class VExprBuilder : public VRoot {
 public:
  virtual IDimensionExpr const *constant(int64_t) = 0;
  virtual IDimensionExpr const *operation(DimensionOperation, IDimensionExpr const &, IDimensionExpr const &) = 0;
  virtual IDimensionExpr const *declareSizeTensor(int32_t, IDimensionExpr const &, IDimensionExpr const &) = 0;
};
}  // namespace apiv
class IDimensionExpr {
 public:
  bool isConstant() const noexcept { return mImpl->isConstant(); }
  int64_t getConstantValue() const noexcept { return mImpl->getConstantValue(); }

 protected:
  virtual ~IDimensionExpr() noexcept = default;
  apiv::VDimensionExpr *mImpl = nullptr;
};
class IExprBuilder {
 public:
  IDimensionExpr const *constant(int64_t v) noexcept { return mImpl->constant(v); }
  IDimensionExpr const *operation(DimensionOperation op, IDimensionExpr const &a, IDimensionExpr const &b) noexcept {
    return mImpl->operation(op, a, b);
  }

 protected:
  virtual ~IExprBuilder() noexcept = default;
  apiv::VExprBuilder *mImpl = nullptr;
};
struct DimsExprs {
  int32_t nbDims;
  IDimensionExpr const *d[Dims::MAX_DIMS];
};

// An interface says its name and version, by which TensorRT knows what more it has.
struct InterfaceInfo {
  char const *kind;
  int32_t major, minor;
};
class IVersionedInterface {
 public:
  virtual APILanguage getAPILanguage() const noexcept { return APILanguage::kCPP; }
  virtual InterfaceInfo getInterfaceInfo() const noexcept = 0;
  virtual ~IVersionedInterface() noexcept = default;
};

class ILoggerFinder;
class IPluginResourceContext;

namespace v_1_0 {
class IPluginCapability : public IVersionedInterface {};
class IPluginCreatorInterface : public IVersionedInterface {};

class IPluginV3 : public IVersionedInterface {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN", 1, 0}; }
  virtual IPluginCapability *getCapabilityInterface(PluginCapabilityType) noexcept = 0;
  virtual IPluginV3 *clone() noexcept = 0;
};

class IPluginV3OneCore : public IPluginCapability {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_CORE", 1, 0}; }
  virtual AsciiChar const *getPluginName() const noexcept = 0;
  virtual AsciiChar const *getPluginVersion() const noexcept = 0;
  virtual AsciiChar const *getPluginNamespace() const noexcept = 0;
};

class IPluginV3OneBuild : public IPluginCapability {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_BUILD", 1, 0}; }
  virtual int32_t configurePlugin(DynamicPluginTensorDesc const *in, int32_t inputs, DynamicPluginTensorDesc const *out,
                                  int32_t outputs) noexcept = 0;
  virtual int32_t getOutputDataTypes(DataType *out, int32_t outputs, DataType const *in,
                                     int32_t inputs) const noexcept = 0;
  virtual int32_t getOutputShapes(DimsExprs const *in, int32_t inputs, DimsExprs const *shapes, int32_t shape_inputs,
                                  DimsExprs *out, int32_t outputs, IExprBuilder &) noexcept = 0;
  virtual bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const *tensors, int32_t inputs,
                                         int32_t outputs) noexcept = 0;
  virtual int32_t getNbOutputs() const noexcept = 0;
  virtual size_t getWorkspaceSize(DynamicPluginTensorDesc const *, int32_t, DynamicPluginTensorDesc const *,
                                  int32_t) const noexcept {
    return 0;
  }
  virtual int32_t getValidTactics(int32_t *, int32_t) noexcept { return 0; }
  virtual int32_t getNbTactics() noexcept { return 0; }
  virtual char const *getTimingCacheID() noexcept { return nullptr; }
  virtual int32_t getFormatCombinationLimit() noexcept { return 100; }
  virtual char const *getMetadataString() noexcept { return nullptr; }
};

class IPluginV3OneRuntime : public IPluginCapability {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_RUNTIME", 1, 0}; }
  virtual int32_t setTactic(int32_t) noexcept { return 0; }
  virtual int32_t onShapeChange(PluginTensorDesc const *in, int32_t inputs, PluginTensorDesc const *out,
                                int32_t outputs) noexcept = 0;
  virtual int32_t enqueue(PluginTensorDesc const *in, PluginTensorDesc const *out, void const *const *inputs,
                          void *const *outputs, void *workspace, cudaStream_t) noexcept = 0;
  virtual IPluginV3 *attachToContext(IPluginResourceContext *) noexcept = 0;
  virtual PluginFieldCollection const *getFieldsToSerialize() noexcept = 0;
};

class IPluginCreatorV3One : public IPluginCreatorInterface {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN CREATOR_V3ONE", 1, 0}; }
  virtual IPluginV3 *createPlugin(AsciiChar const *name, PluginFieldCollection const *, TensorRTPhase) noexcept = 0;
  virtual PluginFieldCollection const *getFieldNames() noexcept = 0;
  virtual AsciiChar const *getPluginName() const noexcept = 0;
  virtual AsciiChar const *getPluginVersion() const noexcept = 0;
  virtual AsciiChar const *getPluginNamespace() const noexcept = 0;
};
}  // namespace v_1_0

namespace v_2_0 {
class IPluginV3OneBuild : public v_1_0::IPluginV3OneBuild {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_BUILD", 2, 0}; }
  virtual int32_t getAliasedInput(int32_t) noexcept { return -1; }
};
}  // namespace v_2_0

using v_1_0::IPluginCapability;
using v_1_0::IPluginCreatorInterface;
using v_1_0::IPluginCreatorV3One;
using v_1_0::IPluginV3;
using v_1_0::IPluginV3OneBuild;
using v_1_0::IPluginV3OneCore;
using v_1_0::IPluginV3OneRuntime;
using IPluginV3OneBuildV2 = v_2_0::IPluginV3OneBuild;

}  // namespace nvinfer1
#endif
