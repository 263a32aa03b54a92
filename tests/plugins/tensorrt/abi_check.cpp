// Compiled where TensorRT's headers are: holds plugins/tensorrt/abi.h to them. Prints what differs.
#include <cstdio>
#include <cstring>
#include <type_traits>

#include <NvInferRuntime.h>

// Both headers have nvinfer1::IVersionedInterface.
#define nvinfer1 ours
#include "abi.h"
#undef nvinfer1

namespace theirs = nvinfer1;
using namespace moevlm;

namespace {

int wrong = 0;

void same(const char* what, long long mine, long long official) {
  if (mine == official) return;
  std::printf("%s is %lld in abi.h, %lld in TensorRT %d.%d\n", what, mine, official, NV_TENSORRT_MAJOR,
              NV_TENSORRT_MINOR);
  ++wrong;
}

// A virtual function's place: pointers to members hold its offset in the vtable.
template <class Function>
long long slot(Function function) {
  ptrdiff_t words[2];
  static_assert(sizeof(function) == sizeof(words));
  std::memcpy(words, &function, sizeof(words));
#ifdef __aarch64__
  return words[0];
#else
  return words[0] - 1;
#endif
}

template <class E>
constexpr long long number(E value) {
  return static_cast<long long>(value);
}

}  // namespace

#define SLOT(mine, official, name) same(#mine "::" #name, slot(&abi::mine::name), slot(&theirs::official::name))
#define SIZE(mine, official) same("the size of " #mine, sizeof(abi::mine), sizeof(theirs::official))
#define MEMBER(mine, official, m, o) same(#mine "::" #m, offsetof(abi::mine, m), offsetof(theirs::official, o))
#define VALUE(mine, official) same(#mine, number(abi::mine), number(theirs::official))

int main() {
  VALUE(DataType::kFloat32, DataType::kFLOAT);
  VALUE(DataType::kFloat16, DataType::kHALF);
  VALUE(DataType::kInt8, DataType::kINT8);
  VALUE(DataType::kInt32, DataType::kINT32);
  VALUE(DataType::kFloat8, DataType::kFP8);
  VALUE(DataType::kBfloat16, DataType::kBF16);
  VALUE(TensorFormat::kLinear, TensorFormat::kLINEAR);
  VALUE(FieldType::kInt8, PluginFieldType::kINT8);
  VALUE(FieldType::kInt32, PluginFieldType::kINT32);
  VALUE(FieldType::kChar, PluginFieldType::kCHAR);
  VALUE(FieldType::kUnknown, PluginFieldType::kUNKNOWN);
  VALUE(Phase::kBuild, TensorRTPhase::kBUILD);
  VALUE(Phase::kRuntime, TensorRTPhase::kRUNTIME);
  VALUE(Capability::kCore, PluginCapabilityType::kCORE);
  VALUE(Capability::kBuild, PluginCapabilityType::kBUILD);
  VALUE(Capability::kRuntime, PluginCapabilityType::kRUNTIME);
  VALUE(Language::kCpp, APILanguage::kCPP);
  VALUE(DimensionOperation::kSum, DimensionOperation::kSUM);
  VALUE(Severity::kError, ILogger::Severity::kERROR);
  VALUE(kMaxDims, Dims::MAX_DIMS);

  SIZE(Dims, Dims);
  MEMBER(Dims, Dims, count, nbDims);
  MEMBER(Dims, Dims, d, d);
  SIZE(TensorDesc, PluginTensorDesc);
  MEMBER(TensorDesc, PluginTensorDesc, type, type);
  MEMBER(TensorDesc, PluginTensorDesc, format, format);
  MEMBER(TensorDesc, PluginTensorDesc, scale, scale);
  SIZE(DynamicTensorDesc, DynamicPluginTensorDesc);
  MEMBER(DynamicTensorDesc, DynamicPluginTensorDesc, min, min);
  MEMBER(DynamicTensorDesc, DynamicPluginTensorDesc, max, max);
  MEMBER(DynamicTensorDesc, DynamicPluginTensorDesc, opt, opt);
  SIZE(Field, PluginField);
  MEMBER(Field, PluginField, name, name);
  MEMBER(Field, PluginField, data, data);
  MEMBER(Field, PluginField, type, type);
  MEMBER(Field, PluginField, length, length);
  SIZE(Fields, PluginFieldCollection);
  MEMBER(Fields, PluginFieldCollection, fields, fields);
  SIZE(DimsExprs, DimsExprs);
  MEMBER(DimsExprs, DimsExprs, d, d);
  SIZE(InterfaceInfo, InterfaceInfo);
  SIZE(ExprBuilder, IExprBuilder);
  SLOT(ExprBuilderImpl, apiv::VExprBuilder, constant);
  SLOT(ExprBuilderImpl, apiv::VExprBuilder, operation);

  SLOT(Versioned, IVersionedInterface, getAPILanguage);
  SLOT(Versioned, IVersionedInterface, getInterfaceInfo);
  SIZE(Plugin, IPluginV3);
  SLOT(Plugin, IPluginV3, getCapabilityInterface);
  SLOT(Plugin, IPluginV3, clone);
  SLOT(PluginCore, IPluginV3OneCore, getPluginName);
  SLOT(PluginCore, IPluginV3OneCore, getPluginVersion);
  SLOT(PluginCore, IPluginV3OneCore, getPluginNamespace);
  SLOT(PluginBuild, IPluginV3OneBuild, configurePlugin);
  SLOT(PluginBuild, IPluginV3OneBuild, getOutputDataTypes);
  SLOT(PluginBuild, IPluginV3OneBuild, getOutputShapes);
  SLOT(PluginBuild, IPluginV3OneBuild, supportsFormatCombination);
  SLOT(PluginBuild, IPluginV3OneBuild, getNbOutputs);
  SLOT(PluginBuild, IPluginV3OneBuild, getWorkspaceSize);
  SLOT(PluginBuild, IPluginV3OneBuild, getValidTactics);
  SLOT(PluginBuild, IPluginV3OneBuild, getNbTactics);
  SLOT(PluginBuild, IPluginV3OneBuild, getTimingCacheID);
  SLOT(PluginBuild, IPluginV3OneBuild, getFormatCombinationLimit);
  SLOT(PluginBuild, IPluginV3OneBuild, getMetadataString);
  SLOT(PluginRuntime, IPluginV3OneRuntime, setTactic);
  SLOT(PluginRuntime, IPluginV3OneRuntime, onShapeChange);
  SLOT(PluginRuntime, IPluginV3OneRuntime, enqueue);
  SLOT(PluginRuntime, IPluginV3OneRuntime, attachToContext);
  SLOT(PluginRuntime, IPluginV3OneRuntime, getFieldsToSerialize);
  SLOT(Creator, IPluginCreatorV3One, createPlugin);
  SLOT(Creator, IPluginCreatorV3One, getFieldNames);
  SLOT(Creator, IPluginCreatorV3One, getPluginName);
  SLOT(Creator, IPluginCreatorV3One, getPluginVersion);
  SLOT(Creator, IPluginCreatorV3One, getPluginNamespace);

  constexpr bool versioned = std::is_base_of_v<theirs::IVersionedInterface, theirs::ILogger>;
  same("loggers that are versioned", NV_TENSORRT_MAJOR > 10, versioned);
  same("logger finders that are versioned", versioned,
       std::is_base_of_v<theirs::IVersionedInterface, theirs::ILoggerFinder>);
  if (versioned) {
    SLOT(Logger11, ILogger, log);
    SLOT(LoggerFinder11, ILoggerFinder, findLogger);
  } else {
    SLOT(Logger10, ILogger, log);
    SLOT(LoggerFinder10, ILoggerFinder, findLogger);
  }

  return wrong != 0;
}
