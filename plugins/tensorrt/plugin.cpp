#include "plugin.h"

#include <algorithm>
#include <new>

#include "errors.h"
#include "shapes.h"

namespace moevlm::tensorrt {
namespace {

constexpr int32_t kSuccess = 0, kFailure = 1;

}  // namespace

ProgramPlugin::ProgramPlugin(std::shared_ptr<const Program> program, abi::Phase phase)
    : program_(std::move(program)), phase_(phase), execution_(program_, phase == abi::Phase::kBuild) {
  field_ = {kField, program_->bytes.data(), abi::FieldType::kInt8, static_cast<int32_t>(program_->bytes.size())};
  fields_ = {1, &field_};
}

abi::PluginCapability* ProgramPlugin::getCapabilityInterface(abi::Capability type) noexcept {
  switch (type) {
    case abi::Capability::kCore: return static_cast<abi::PluginCore*>(this);
    case abi::Capability::kBuild: return static_cast<abi::PluginBuild*>(this);
    case abi::Capability::kRuntime: return static_cast<abi::PluginRuntime*>(this);
  }
  return nullptr;
}

abi::Plugin* ProgramPlugin::clone() noexcept {
  ProgramPlugin* copy = nullptr;
  guarded(getPluginName(), [&] { copy = new ProgramPlugin(program_, phase_); });
  return copy;
}

int32_t ProgramPlugin::configurePlugin(const abi::DynamicTensorDesc* in, int32_t inputs,
                                       const abi::DynamicTensorDesc* out, int32_t outputs) noexcept {
  return guarded(getPluginName(), [&] { check(*program_, in, inputs, out, outputs); }) ? kSuccess : kFailure;
}

int32_t ProgramPlugin::getOutputDataTypes(abi::DataType* out, int32_t outputs, const abi::DataType*,
                                      int32_t inputs) const noexcept {
  const bool done = guarded(getPluginName(), [&] {
    check_counts(*program_, inputs, outputs);
    for (const Tensor& tensor : program_->outputs) *out++ = static_cast<abi::DataType>(tensor.dtype);
  });
  return done ? kSuccess : kFailure;
}

int32_t ProgramPlugin::getOutputShapes(const abi::DimsExprs* in, int32_t inputs, const abi::DimsExprs*, int32_t,
                                   abi::DimsExprs* out, int32_t outputs, abi::ExprBuilder& builder) noexcept {
  const bool done = guarded(getPluginName(), [&] {
    check_counts(*program_, inputs, outputs);
    for (const Tensor& tensor : program_->outputs) {
      out->count = static_cast<int32_t>(tensor.shape.size());
      for (size_t i = 0; i < tensor.shape.size(); ++i) {
        const auto& [symbol, value] = tensor.shape[i];
        out->d[i] = symbol ? size(*symbol, value, in, *builder.impl) : builder.impl->constant(value);
      }
      ++out;
    }
  });
  return done ? kSuccess : kFailure;
}

// The dimension that is the symbol and so much more.
const abi::DimensionExpr* ProgramPlugin::size(size_t symbol, int64_t plus, const abi::DimsExprs* in,
                                              abi::ExprBuilderImpl& builder) const {
  const Place& place = *program_->places[symbol];
  const Tensor& input = program_->inputs[place.input];
  if (in[place.input].count != static_cast<int32_t>(input.shape.size()))
    invalid("input ", input.name, " has ", in[place.input].count, " dimensions (allowed: ", input.shape.size(), ")");
  const abi::DimensionExpr& given = *in[place.input].d[place.dimension];
  if (plus == place.plus) return &given;
  return builder.operation(abi::DimensionOperation::kSum, given, *builder.constant(plus - place.plus));
}

bool ProgramPlugin::supportsFormatCombination(int32_t position, const abi::DynamicTensorDesc* tensors, int32_t inputs,
                                              int32_t outputs) noexcept {
  return guarded(getPluginName(), [&] { check_counts(*program_, inputs, outputs); }) && [&] {
    const Tensor& tensor = position < inputs ? program_->inputs[position] : program_->outputs[position - inputs];
    const abi::TensorDesc& given = tensors[position].desc;
    return given.format == abi::TensorFormat::kLinear && static_cast<int32_t>(given.type) == tensor.dtype;
  }();
}

size_t ProgramPlugin::getWorkspaceSize(const abi::DynamicTensorDesc* in, int32_t, const abi::DynamicTensorDesc*,
                                       int32_t) const noexcept {
  return program_->workspace(ranges_of(*program_, in));
}

int32_t ProgramPlugin::onShapeChange(const abi::TensorDesc* in, int32_t inputs, const abi::TensorDesc* out,
                                     int32_t outputs) noexcept {
  const bool done = guarded(getPluginName(), [&] { execution_.prepare(check(*program_, in, inputs, out, outputs)); });
  return done ? kSuccess : kFailure;
}

int32_t ProgramPlugin::enqueue(const abi::TensorDesc* in, const abi::TensorDesc*, const void* const* inputs,
                               void* const* outputs, void* workspace, abi::CudaStream* stream) noexcept {
  const Pointers pointers{inputs, outputs, static_cast<char*>(workspace)};
  const bool done = guarded(getPluginName(), [&] { execution_.run(sizes_of(*program_, in), pointers, stream); });
  return done ? kSuccess : kFailure;
}

// Loads what it can already: a GPU that the engine has no kernels for shows when its execution context is made. A
// builder may have no GPU, or another than it builds for.
abi::Plugin* ProgramPlugin::attachToContext(abi::PluginResourceContext*) noexcept {
  std::unique_ptr<ProgramPlugin> copy;
  const bool done = guarded(getPluginName(), [&] {
    copy = std::make_unique<ProgramPlugin>(program_, phase_);
    if (phase_ == abi::Phase::kRuntime && driver().context()) copy->execution_.load();
  });
  return done ? copy.release() : nullptr;
}

const abi::Fields* ProgramPlugin::getFieldsToSerialize() noexcept { return &fields_; }

}  // namespace moevlm::tensorrt
