// The part of TensorRT's plugin interface (IPluginV3, Itanium C++ ABI) that the library needs, so that building it
// takes a compiler and nothing else.
//
// Calls go through vtables, so what counts is the order of virtual functions and the layout of structs, which are the
// same in TensorRT 10 and 11, TensorRT-RTX 1 and the lean runtimes; names are ours. What differs there: loggers, see
// `Logger11`, and the build interface's second version, whose additions nothing here uses.
#pragma once
#include <cstddef>
#include <cstdint>

namespace moevlm::abi {

enum class Language : int32_t { kCpp = 0, kPython = 1 };

struct InterfaceInfo {
  const char* kind;
  int32_t major;
  int32_t minor;
};

}  // namespace moevlm::abi

namespace nvinfer1 {

// The root of most interfaces. It has TensorRT's own name, by which its objects are recognized.
struct IVersionedInterface {
  virtual moevlm::abi::Language getAPILanguage() const noexcept { return moevlm::abi::Language::kCpp; }
  virtual moevlm::abi::InterfaceInfo getInterfaceInfo() const noexcept = 0;
  virtual ~IVersionedInterface() noexcept = default;
};

}  // namespace nvinfer1

namespace moevlm::abi {

using Versioned = nvinfer1::IVersionedInterface;

enum class DataType : int32_t { kFloat32 = 0, kFloat16 = 1, kInt8 = 2, kInt32 = 3, kFloat8 = 6, kBfloat16 = 7 };
enum class TensorFormat : int32_t { kLinear = 0 };
enum class FieldType : int32_t { kInt8 = 3, kInt32 = 5, kChar = 6, kUnknown = 8 };
enum class Phase : int32_t { kBuild = 0, kRuntime = 1 };
enum class Capability : int32_t { kCore = 0, kBuild = 1, kRuntime = 2 };
enum class DimensionOperation : int32_t { kSum = 0 };
enum class Severity : int32_t { kInternalError = 0, kError = 1, kWarning = 2, kInfo = 3, kVerbose = 4 };

constexpr int32_t kMaxDims = 8;

struct Dims {
  int32_t count;
  int64_t d[kMaxDims];
};

struct TensorDesc {
  Dims dims;
  DataType type;
  TensorFormat format;
  float scale;
};

// While an engine is built: dims with -1 where they vary, and the bounds of an optimization profile.
struct DynamicTensorDesc {
  TensorDesc desc;
  Dims min;
  Dims max;
  Dims opt;
};

// length: of `data` in items of `type`.
struct Field {
  const char* name;
  const void* data;
  FieldType type;
  int32_t length;
};

struct Fields {
  int32_t count;
  const Field* fields;
};

struct CudaStream;
struct PluginResourceContext;

// A dimension while shapes are inferred, owned by TensorRT.
struct DimensionExpr;

struct DimsExprs {
  int32_t count;
  const DimensionExpr* d[kMaxDims];
};

// TensorRT's objects are a pair of vtable and implementation; the public classes forward to the latter.
struct ExprBuilderImpl {
  virtual ~ExprBuilderImpl() = default;
  virtual const DimensionExpr* constant(int64_t value) = 0;
  virtual const DimensionExpr* operation(DimensionOperation, const DimensionExpr&, const DimensionExpr&) = 0;
};

struct ExprBuilder {
  virtual ~ExprBuilder() = default;
  ExprBuilderImpl* impl;
};

struct PluginCapability : Versioned {};

struct Plugin : Versioned {
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN", 1, 0}; }
  virtual PluginCapability* getCapabilityInterface(Capability) noexcept = 0;
  virtual Plugin* clone() noexcept = 0;
};

struct PluginCore : PluginCapability {
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_CORE", 1, 0}; }
  virtual const char* getPluginName() const noexcept = 0;
  virtual const char* getPluginVersion() const noexcept = 0;
  virtual const char* getPluginNamespace() const noexcept = 0;
};

struct PluginBuild : PluginCapability {
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_BUILD", 1, 0}; }
  virtual int32_t configurePlugin(const DynamicTensorDesc* in, int32_t inputs, const DynamicTensorDesc* out,
                                  int32_t outputs) noexcept = 0;
  virtual int32_t getOutputDataTypes(DataType* out, int32_t outputs, const DataType* in,
                                     int32_t inputs) const noexcept = 0;
  virtual int32_t getOutputShapes(const DimsExprs* in, int32_t inputs, const DimsExprs* shape_inputs,
                                  int32_t shape_count, DimsExprs* out, int32_t outputs,
                                  ExprBuilder& builder) noexcept = 0;
  virtual bool supportsFormatCombination(int32_t position, const DynamicTensorDesc* tensors, int32_t inputs,
                                         int32_t outputs) noexcept = 0;
  virtual int32_t getNbOutputs() const noexcept = 0;
  virtual size_t getWorkspaceSize(const DynamicTensorDesc* in, int32_t inputs, const DynamicTensorDesc* out,
                                  int32_t outputs) const noexcept = 0;
  virtual int32_t getValidTactics(int32_t*, int32_t) noexcept { return 0; }
  virtual int32_t getNbTactics() noexcept { return 0; }
  virtual const char* getTimingCacheID() noexcept { return nullptr; }
  virtual int32_t getFormatCombinationLimit() noexcept { return 100; }
  virtual const char* getMetadataString() noexcept { return nullptr; }
};

struct PluginRuntime : PluginCapability {
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_RUNTIME", 1, 0}; }
  virtual int32_t setTactic(int32_t) noexcept { return 0; }
  virtual int32_t onShapeChange(const TensorDesc* in, int32_t inputs, const TensorDesc* out,
                                int32_t outputs) noexcept = 0;
  virtual int32_t enqueue(const TensorDesc* in, const TensorDesc* out, const void* const* inputs, void* const* outputs,
                          void* workspace, CudaStream* stream) noexcept = 0;
  virtual Plugin* attachToContext(PluginResourceContext*) noexcept = 0;
  virtual const Fields* getFieldsToSerialize() noexcept = 0;
};

struct CreatorInterface : Versioned {};

struct Creator : CreatorInterface {
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN CREATOR_V3ONE", 1, 0}; }
  virtual Plugin* createPlugin(const char* name, const Fields* fields, Phase phase) noexcept = 0;
  virtual const Fields* getFieldNames() noexcept = 0;
  virtual const char* getPluginName() const noexcept = 0;
  virtual const char* getPluginVersion() const noexcept = 0;
  virtual const char* getPluginNamespace() const noexcept = 0;
};

// Loggers of TensorRT 11 and TensorRT-RTX 1.7 derive from Versioned, those of TensorRT 10 do not.
struct Logger10 {
  virtual void log(Severity severity, const char* message) noexcept = 0;
  virtual ~Logger10() = default;
};

struct LoggerFinder10 {
  virtual Logger10* findLogger() = 0;
  virtual ~LoggerFinder10() = default;
};

struct Logger11 : Versioned {
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"ILogger", 1, 0}; }
  virtual void log(Severity severity, const char* message) noexcept = 0;
};

struct LoggerFinder11 : Versioned {
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"ILoggerFinder", 1, 0}; }
  virtual Logger11* findLogger() = 0;
};

static_assert(sizeof(void*) == 8, "a 64-bit platform");
static_assert(sizeof(Dims) == 72 && offsetof(Dims, d) == 8);
static_assert(sizeof(TensorDesc) == 88 && offsetof(TensorDesc, type) == 72 && offsetof(TensorDesc, format) == 76);
static_assert(sizeof(DynamicTensorDesc) == 304 && offsetof(DynamicTensorDesc, min) == 88 &&
              offsetof(DynamicTensorDesc, max) == 160 && offsetof(DynamicTensorDesc, opt) == 232);
static_assert(sizeof(Field) == 24 && offsetof(Field, data) == 8 && offsetof(Field, type) == 16 &&
              offsetof(Field, length) == 20);
static_assert(sizeof(Fields) == 16 && offsetof(Fields, fields) == 8);
static_assert(sizeof(DimsExprs) == 72 && offsetof(DimsExprs, d) == 8);
static_assert(sizeof(InterfaceInfo) == 16 && offsetof(InterfaceInfo, major) == 8);
static_assert(sizeof(ExprBuilder) == 16 && sizeof(Plugin) == 8);

}  // namespace moevlm::abi
