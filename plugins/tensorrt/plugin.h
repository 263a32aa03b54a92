// A TensorRT plugin that runs a program: what every op is.
#pragma once
#include <memory>

#include "abi.h"
#include "execution.h"
#include "program.h"

namespace moevlm::tensorrt {

// One layer of a network, or of an engine in one execution context; each has its own state and shares only what does
// not change: the program, and the kernels loaded into a CUDA context.
//
// While TensorRT builds an engine it may run a layer on made-up inputs, to time it. Kernels take that: they clamp every
// index that they read (an expert, a page, a position, the bounds of a sequence) to what it indexes.
class ProgramPlugin final : public abi::Plugin,
                            public abi::PluginCore,
                            public abi::PluginBuild,
                            public abi::PluginRuntime {
 public:
  static constexpr const char* kVersion = "1";
  static constexpr const char* kNamespace = "";  // found from any domain, and before a function of that name
  static constexpr const char* kField = "program";

  ProgramPlugin(std::shared_ptr<const Program> program, abi::Phase phase);

  abi::PluginCapability* getCapabilityInterface(abi::Capability type) noexcept override;
  abi::Plugin* clone() noexcept override;

  const char* getPluginName() const noexcept override { return program_->op.c_str(); }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t configurePlugin(const abi::DynamicTensorDesc* in, int32_t inputs, const abi::DynamicTensorDesc* out,
                          int32_t outputs) noexcept override;
  int32_t getOutputDataTypes(abi::DataType* out, int32_t outputs, const abi::DataType* in,
                             int32_t inputs) const noexcept override;
  int32_t getOutputShapes(const abi::DimsExprs* in, int32_t inputs, const abi::DimsExprs* shape_inputs,
                          int32_t shape_count, abi::DimsExprs* out, int32_t outputs,
                          abi::ExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const abi::DynamicTensorDesc* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override;
  int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(program_->outputs.size()); }
  size_t getWorkspaceSize(const abi::DynamicTensorDesc* in, int32_t inputs, const abi::DynamicTensorDesc* out,
                          int32_t outputs) const noexcept override;

  int32_t onShapeChange(const abi::TensorDesc* in, int32_t inputs, const abi::TensorDesc* out,
                        int32_t outputs) noexcept override;
  int32_t enqueue(const abi::TensorDesc* in, const abi::TensorDesc* out, const void* const* inputs,
                  void* const* outputs, void* workspace, abi::CudaStream* stream) noexcept override;
  abi::Plugin* attachToContext(abi::PluginResourceContext*) noexcept override;
  const abi::Fields* getFieldsToSerialize() noexcept override;

 private:
  const abi::DimensionExpr* size(size_t symbol, int64_t plus, const abi::DimsExprs* in,
                                 abi::ExprBuilderImpl& builder) const;

  std::shared_ptr<const Program> program_;
  abi::Phase phase_;
  Execution execution_;
  abi::Field field_;
  abi::Fields fields_;
};

}  // namespace moevlm::tensorrt
