// A TensorRT plugin that runs a program: what both ops are.
#pragma once
#include <memory>
#include <vector>

#include "abi.h"
#include "modules.h"
#include "program.h"

namespace moevlm::tensorrt {

// One layer of a network, or of an engine in one execution context; each has its own state and shares only what does
// not change: the program, and the kernels loaded into a CUDA context.
class MoePlugin final : public abi::Plugin, public abi::PluginCore, public abi::PluginBuild, public abi::PluginRuntime {
 public:
  static constexpr const char* kVersion = "1";
  static constexpr const char* kNamespace = "";  // found from any domain, and before a function of that name
  static constexpr const char* kField = "program";

  MoePlugin(std::shared_ptr<const Program> program, abi::Phase phase);

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
  // A step for a certain number of tokens: a launch's grid, or the words of a fill.
  struct Size {
    unsigned grid[3];
    size_t words;
  };

  void load();
  void prepare(int64_t tokens);
  void run(const void* const* inputs, void* const* outputs, char* workspace, abi::CudaStream* stream);
  uint64_t value(const Argument& argument, const void* const* inputs, void* const* outputs,
                 const char* workspace) const;

  std::shared_ptr<const Program> program_;
  abi::Phase phase_;
  std::shared_ptr<const Modules> modules_;
  int64_t tokens_ = 0;  // what the following was made for
  const Variant* variant_ = nullptr;
  std::vector<size_t> offsets_;  // of the buffers in the workspace
  std::vector<Size> sizes_;      // of the steps
  std::vector<uint64_t> values_;
  std::vector<void*> parameters_;  // to values_
  abi::Field field_;
  abi::Fields fields_;
};

}  // namespace moevlm::tensorrt
