#include "plugin.h"

#include <algorithm>
#include <new>

#include "errors.h"
#include "shapes.h"

namespace moevlm::tensorrt {
namespace {

constexpr int32_t kSuccess = 0, kFailure = 1;
constexpr uint64_t kPointerAlignment = 16;  // which the kernels were compiled for

void check_address(const char* role, const std::string& name, const void* address) {
  const auto value = reinterpret_cast<uint64_t>(address);
  if (!value || value % kPointerAlignment)
    invalid(role, name, " is at address ", value, " (allowed: multiples of ", kPointerAlignment, ")");
}

}  // namespace

ProgramPlugin::ProgramPlugin(std::shared_ptr<const Program> program, abi::Phase phase)
    : program_(std::move(program)), phase_(phase) {
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
  const bool done = guarded(getPluginName(), [&] {
    const Sizes sizes = check(*program_, in, inputs, out, outputs);
    const auto current = enter();
    load();
    if (sizes != sizes_) prepare(sizes);
  });
  return done ? kSuccess : kFailure;
}

int32_t ProgramPlugin::enqueue(const abi::TensorDesc* in, const abi::TensorDesc*, const void* const* inputs,
                               void* const* outputs, void* workspace, abi::CudaStream* stream) noexcept {
  const bool done = guarded(getPluginName(), [&] {
    const Sizes sizes = sizes_of(*program_, in);
    const auto current = enter();
    if (!modules_) load();
    if (sizes != sizes_) prepare(sizes);
    run(inputs, outputs, static_cast<char*>(workspace), stream);
  });
  return done ? kSuccess : kFailure;
}

// Loads what it can already: a GPU that the engine has no kernels for shows when its execution context is made. A
// builder may have no GPU, or another than it builds for.
abi::Plugin* ProgramPlugin::attachToContext(abi::PluginResourceContext*) noexcept {
  std::unique_ptr<ProgramPlugin> copy;
  const bool done = guarded(getPluginName(), [&] {
    copy = std::make_unique<ProgramPlugin>(program_, phase_);
    if (phase_ == abi::Phase::kRuntime && driver().context()) copy->load();
  });
  return done ? copy.release() : nullptr;
}

const abi::Fields* ProgramPlugin::getFieldsToSerialize() noexcept { return &fields_; }

// A builder's thread may have no context yet; then it is the primary one until the end of the call.
std::optional<Current> ProgramPlugin::enter() {
  if (phase_ != abi::Phase::kBuild || driver().context()) return std::nullopt;
  if (!primary_) primary_ = std::make_shared<const PrimaryContext>();
  return std::optional<Current>(std::in_place, primary_->get());
}

// Into the current context; once in an execution context's life, unless it is used with another device.
void ProgramPlugin::load() {
  if (modules_ && modules_->context() == driver().context()) return;
  sizes_ = {};
  modules_ = Modules::load(program_);
}

void ProgramPlugin::prepare(const Sizes& sizes) {
  sizes_ = {};
  const auto is_size = [](int64_t size) { return size >= 1 && size <= kMaxSize; };
  variant_ = std::all_of(sizes.begin(), sizes.end(), is_size) ? modules_->image().variant(sizes) : nullptr;
  if (!variant_)
    invalid("its kernels for sm", modules_->image().sm, " are not for ", program_->describe(exactly(sizes)));
  offsets_.clear();
  workspace_ = 0;
  for (const Count& buffer : variant_->buffers) {
    offsets_.push_back(workspace_);
    workspace_ += aligned(buffer.at(sizes));
  }
  extents_.clear();
  size_t arguments = 0;
  for (const Step& step : variant_->steps) {
    Extent extent{};
    if (const auto* launch = std::get_if<Launch>(&step)) {
      for (int axis = 0; axis < 3; ++axis) extent.grid[axis] = static_cast<unsigned>(launch->grid[axis].at(sizes));
      arguments = std::max(arguments, launch->arguments.size());
    } else {
      const Fill& fill = std::get<Fill>(step);
      const int64_t words = fill.words.at(sizes), bytes = variant_->buffers[fill.buffer].at(sizes);
      if (words > bytes / 4) invalid("the program fills ", words, " words of a buffer of ", bytes, " bytes");
      extent.words = static_cast<size_t>(words);
    }
    extents_.push_back(extent);
  }
  values_.resize(arguments);
  parameters_.resize(arguments);
  for (size_t i = 0; i < arguments; ++i) parameters_[i] = &values_[i];
  sizes_ = sizes;
}

// TensorRT hands inputs over as const. Those that the program marks as written are written to all the same: a cache is
// an input of the network that no other layer reads, and only its address goes through here.
void ProgramPlugin::run(const void* const* inputs, void* const* outputs, char* workspace, abi::CudaStream* stream) {
  for (size_t i = 0; i < program_->inputs.size(); ++i) check_address("input ", program_->inputs[i].name, inputs[i]);
  for (size_t i = 0; i < program_->outputs.size(); ++i) check_address("output ", program_->outputs[i].name, outputs[i]);
  if (workspace_) check_address("", "the workspace", workspace);
  for (size_t s = 0; s < extents_.size(); ++s) {
    if (const auto* step = std::get_if<Launch>(&variant_->steps[s])) {
      for (size_t i = 0; i < step->arguments.size(); ++i)
        values_[i] = value(step->arguments[i], inputs, outputs, workspace);
      launch(*step, extents_[s], stream);
    } else if (extents_[s].words) {
      const Driver& cuda = driver();
      const Fill& fill = std::get<Fill>(variant_->steps[s]);
      const auto address = reinterpret_cast<CudaAddress>(workspace + offsets_[fill.buffer]);
      cuda.check(cuda.MemsetD32Async(address, fill.value, extents_[s].words, stream), "cuMemsetD32Async",
                 "the workspace");
    }
  }
}

void ProgramPlugin::launch(const Launch& launch, const Extent& extent, abi::CudaStream* stream) {
  const Driver& cuda = driver();
  const Kernel& kernel = modules_->image().kernels[launch.kernel];
  CudaFunction* const function = modules_->function(launch.kernel);
  const unsigned(&grid)[3] = extent.grid;
  const unsigned threads = kernel.warps * 32;
  if (!launch.overlaps) {
    cuda.check(cuda.LaunchKernel(function, grid[0], grid[1], grid[2], threads, 1, 1, kernel.shared, stream,
                                 parameters_.data(), nullptr),
               "cuLaunchKernel", kernel.entry);
    return;
  }
  LaunchAttribute overlaps{kProgrammaticStreamSerialization, {}, 1, {}};
  const LaunchConfig config{{grid[0], grid[1], grid[2]}, {threads, 1, 1}, kernel.shared, stream, &overlaps, 1};
  cuda.check(cuda.LaunchKernelEx(&config, function, parameters_.data(), nullptr), "cuLaunchKernelEx", kernel.entry);
}

// 64 bits whose lower half is a 32-bit parameter's value: the GPU's hosts are little-endian.
uint64_t ProgramPlugin::value(const Argument& argument, const void* const* inputs, void* const* outputs,
                              const char* workspace) const {
  switch (argument.kind) {
    case ArgumentKind::kInput: return reinterpret_cast<uint64_t>(inputs[argument.index]);
    case ArgumentKind::kOutput: return reinterpret_cast<uint64_t>(outputs[argument.index]);
    case ArgumentKind::kWorkspace: return reinterpret_cast<uint64_t>(workspace + offsets_[argument.index]);
    case ArgumentKind::kSymbol: return static_cast<uint64_t>(sizes_[argument.index]);
    case ArgumentKind::kConstant: return argument.index;
    case ArgumentKind::kNull: break;
  }
  return 0;
}

}  // namespace moevlm::tensorrt
