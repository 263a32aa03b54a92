#include "plugin.h"

#include <algorithm>
#include <new>

#include "errors.h"
#include "shapes.h"

namespace moevlm::tensorrt {
namespace {

constexpr int32_t kSuccess = 0, kFailure = 1;
constexpr uint64_t kPointerAlignment = 16;  // which the kernels were compiled for

void check_address(const char* role, const Tensor& tensor, const void* address) {
  const auto value = reinterpret_cast<uint64_t>(address);
  if (!value || value % kPointerAlignment)
    invalid(role, " ", tensor.name, " is at address ", value, " (allowed: multiples of ", kPointerAlignment, ")");
}

}  // namespace

MoePlugin::MoePlugin(std::shared_ptr<const Program> program, abi::Phase phase)
    : program_(std::move(program)), phase_(phase) {
  field_ = {kField, program_->bytes.data(), abi::FieldType::kInt8, static_cast<int32_t>(program_->bytes.size())};
  fields_ = {1, &field_};
}

abi::PluginCapability* MoePlugin::getCapabilityInterface(abi::Capability type) noexcept {
  switch (type) {
    case abi::Capability::kCore: return static_cast<abi::PluginCore*>(this);
    case abi::Capability::kBuild: return static_cast<abi::PluginBuild*>(this);
    case abi::Capability::kRuntime: return static_cast<abi::PluginRuntime*>(this);
  }
  return nullptr;
}

abi::Plugin* MoePlugin::clone() noexcept {
  MoePlugin* copy = nullptr;
  guarded(getPluginName(), [&] { copy = new MoePlugin(program_, phase_); });
  return copy;
}

int32_t MoePlugin::configurePlugin(const abi::DynamicTensorDesc* in, int32_t inputs, const abi::DynamicTensorDesc* out,
                                   int32_t outputs) noexcept {
  return guarded(getPluginName(), [&] { check(*program_, in, inputs, out, outputs); }) ? kSuccess : kFailure;
}

int32_t MoePlugin::getOutputDataTypes(abi::DataType* out, int32_t outputs, const abi::DataType*,
                                      int32_t inputs) const noexcept {
  const bool done = guarded(getPluginName(), [&] {
    check_counts(*program_, inputs, outputs);
    for (const Tensor& tensor : program_->outputs) *out++ = static_cast<abi::DataType>(tensor.dtype);
  });
  return done ? kSuccess : kFailure;
}

int32_t MoePlugin::getOutputShapes(const abi::DimsExprs* in, int32_t inputs, const abi::DimsExprs*, int32_t,
                                   abi::DimsExprs* out, int32_t outputs, abi::ExprBuilder& builder) noexcept {
  const bool done = guarded(getPluginName(), [&] {
    check_counts(*program_, inputs, outputs);
    const TokensAt at = tokens_at(*program_);
    if (in[at.input].count <= static_cast<int32_t>(at.dimension))
      invalid("input ", program_->inputs[at.input].name, " has ", in[at.input].count, " dimensions (allowed: ",
              program_->inputs[at.input].shape.size(), ")");
    for (const Tensor& tensor : program_->outputs) {
      out->count = static_cast<int32_t>(tensor.shape.size());
      for (size_t i = 0; i < tensor.shape.size(); ++i)
        out->d[i] = tensor.shape[i] == kTokens ? in[at.input].d[at.dimension] : builder.impl->constant(tensor.shape[i]);
      ++out;
    }
  });
  return done ? kSuccess : kFailure;
}

bool MoePlugin::supportsFormatCombination(int32_t position, const abi::DynamicTensorDesc* tensors, int32_t inputs,
                                          int32_t outputs) noexcept {
  return guarded(getPluginName(), [&] { check_counts(*program_, inputs, outputs); }) && [&] {
    const Tensor& tensor = position < inputs ? program_->inputs[position] : program_->outputs[position - inputs];
    const abi::TensorDesc& given = tensors[position].desc;
    return given.format == abi::TensorFormat::kLinear && static_cast<int32_t>(given.type) == tensor.dtype;
  }();
}

size_t MoePlugin::getWorkspaceSize(const abi::DynamicTensorDesc* in, int32_t, const abi::DynamicTensorDesc*,
                                   int32_t) const noexcept {
  const TokensAt at = tokens_at(*program_);
  return program_->workspace(in[at.input].max.d[at.dimension]);
}

int32_t MoePlugin::onShapeChange(const abi::TensorDesc* in, int32_t inputs, const abi::TensorDesc* out,
                                 int32_t outputs) noexcept {
  const bool done = guarded(getPluginName(), [&] {
    const int64_t tokens = check(*program_, in, inputs, out, outputs);
    load();
    prepare(tokens);
  });
  return done ? kSuccess : kFailure;
}

int32_t MoePlugin::enqueue(const abi::TensorDesc* in, const abi::TensorDesc*, const void* const* inputs,
                           void* const* outputs, void* workspace, abi::CudaStream* stream) noexcept {
  const bool done = guarded(getPluginName(), [&] {
    const TokensAt at = tokens_at(*program_);
    const int64_t tokens = in[at.input].dims.d[at.dimension];
    if (!modules_) load();
    if (tokens != tokens_) prepare(tokens);
    run(inputs, outputs, static_cast<char*>(workspace), stream);
  });
  return done ? kSuccess : kFailure;
}

// Loads what it can already: a GPU that the engine has no kernels for shows when its execution context is made. A
// builder may have no GPU, or another than it builds for.
abi::Plugin* MoePlugin::attachToContext(abi::PluginResourceContext*) noexcept {
  std::unique_ptr<MoePlugin> copy;
  const bool done = guarded(getPluginName(), [&] {
    copy = std::make_unique<MoePlugin>(program_, phase_);
    if (phase_ == abi::Phase::kRuntime && driver().context()) copy->load();
  });
  return done ? copy.release() : nullptr;
}

const abi::Fields* MoePlugin::getFieldsToSerialize() noexcept { return &fields_; }

// Into the current context; once in an execution context's life, unless it is used with another device.
void MoePlugin::load() {
  if (modules_ && modules_->context() == driver().context()) return;
  tokens_ = 0;
  modules_ = Modules::load(program_);
}

void MoePlugin::prepare(int64_t tokens) {
  tokens_ = 0;
  variant_ = tokens < 1 ? nullptr : modules_->image().variant(tokens);
  if (!variant_) invalid("it was given ", tokens, " tokens (allowed: 1 to ", program_->max_tokens(), ")");
  offsets_.clear();
  size_t offset = 0;
  for (const Count& buffer : variant_->buffers) {
    offsets_.push_back(offset);
    offset += aligned(buffer.at(tokens));
  }
  sizes_.clear();
  size_t arguments = 0;
  for (const Step& step : variant_->steps) {
    Size size{};
    if (const auto* launch = std::get_if<Launch>(&step)) {
      for (int axis = 0; axis < 3; ++axis) size.grid[axis] = static_cast<unsigned>(launch->grid[axis].at(tokens));
      arguments = std::max(arguments, launch->arguments.size());
    } else {
      const Fill& fill = std::get<Fill>(step);
      const int64_t words = fill.words.at(tokens), bytes = variant_->buffers[fill.buffer].at(tokens);
      if (words > bytes / 4) invalid("the program fills ", words, " words of a buffer of ", bytes, " bytes");
      size.words = static_cast<size_t>(words);
    }
    sizes_.push_back(size);
  }
  values_.resize(arguments);
  parameters_.resize(arguments);
  for (size_t i = 0; i < arguments; ++i) parameters_[i] = &values_[i];
  tokens_ = tokens;
}

void MoePlugin::run(const void* const* inputs, void* const* outputs, char* workspace, abi::CudaStream* stream) {
  for (size_t i = 0; i < program_->inputs.size(); ++i) check_address("input", program_->inputs[i], inputs[i]);
  for (size_t i = 0; i < program_->outputs.size(); ++i) check_address("output", program_->outputs[i], outputs[i]);
  const Driver& cuda = driver();
  const std::vector<Kernel>& kernels = modules_->image().kernels;
  for (size_t s = 0; s < sizes_.size(); ++s) {
    const Size& size = sizes_[s];
    if (const auto* launch = std::get_if<Launch>(&variant_->steps[s])) {
      const Kernel& kernel = kernels[launch->kernel];
      for (size_t i = 0; i < launch->arguments.size(); ++i)
        values_[i] = value(launch->arguments[i], inputs, outputs, workspace);
      cuda.check(cuda.LaunchKernel(modules_->function(launch->kernel), size.grid[0], size.grid[1], size.grid[2],
                                   kernel.warps * 32, 1, 1, kernel.shared, stream, parameters_.data(), nullptr),
                 "cuLaunchKernel", kernel.entry);
    } else if (size.words) {
      const Fill& fill = std::get<Fill>(variant_->steps[s]);
      const auto address = reinterpret_cast<CudaAddress>(workspace + offsets_[fill.buffer]);
      cuda.check(cuda.MemsetD32Async(address, fill.value, size.words, stream), "cuMemsetD32Async", "the workspace");
    }
  }
}

// 64 bits whose lower half is a 32-bit parameter's value: the GPU's hosts are little-endian.
uint64_t MoePlugin::value(const Argument& argument, const void* const* inputs, void* const* outputs,
                          const char* workspace) const {
  switch (argument.kind) {
    case ArgumentKind::kInput: return reinterpret_cast<uint64_t>(inputs[argument.index]);
    case ArgumentKind::kOutput: return reinterpret_cast<uint64_t>(outputs[argument.index]);
    case ArgumentKind::kWorkspace: return reinterpret_cast<uint64_t>(workspace + offsets_[argument.index]);
    case ArgumentKind::kTokens: return static_cast<uint64_t>(tokens_);
    case ArgumentKind::kConstant: return argument.index;
    case ArgumentKind::kNull: break;
  }
  return 0;
}

}  // namespace moevlm::tensorrt
