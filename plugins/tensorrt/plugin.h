// A TensorRT plugin that runs a program: what every op is.
#pragma once
#include <memory>
#include <optional>
#include <vector>

#include "abi.h"
#include "modules.h"
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
  // A step at certain sizes: a launch's grid, or the words of a fill.
  struct Extent {
    unsigned grid[3];
    size_t words;
  };

  const abi::DimensionExpr* size(size_t symbol, int64_t plus, const abi::DimsExprs* in,
                                 abi::ExprBuilderImpl& builder) const;
  std::optional<Current> enter();
  void load();
  void prepare(const Sizes& sizes);
  void run(const void* const* inputs, void* const* outputs, char* workspace, abi::CudaStream* stream);
  void launch(const Launch& launch, const Extent& extent, abi::CudaStream* stream);
  uint64_t value(const Argument& argument, const void* const* inputs, void* const* outputs,
                 const char* workspace) const;

  std::shared_ptr<const Program> program_;
  abi::Phase phase_;
  std::shared_ptr<const PrimaryContext> primary_;  // outlives the modules in it
  std::shared_ptr<const Modules> modules_;
  Sizes sizes_{};  // what the following was made for; zeros for nothing
  const Variant* variant_ = nullptr;
  std::vector<size_t> offsets_;  // of the buffers in the workspace
  size_t workspace_ = 0;         // bytes of them all
  std::vector<Extent> extents_;  // of the steps
  std::vector<uint64_t> values_;
  std::vector<void*> parameters_;  // to values_
  abi::Field field_;
  abi::Fields fields_;
};

}  // namespace moevlm::tensorrt
