#include "execution.h"

#include <algorithm>

#include "errors.h"

namespace moevlm::tensorrt {
namespace {

constexpr uint64_t kPointerAlignment = 16;  // which the kernels were compiled for

void check_address(const char* role, const std::string& name, const void* address) {
  const auto value = reinterpret_cast<uint64_t>(address);
  if (!value || value % kPointerAlignment)
    invalid(role, name, " is at address ", value, " (allowed: multiples of ", kPointerAlignment, ")");
}

}  // namespace

void Pointers::check(const Program& program, bool has_workspace) const {
  for (size_t i = 0; i < program.inputs.size(); ++i) check_address("input ", program.inputs[i].name, inputs[i]);
  for (size_t i = 0; i < program.outputs.size(); ++i) check_address("output ", program.outputs[i].name, outputs[i]);
  if (has_workspace) check_address("", "the workspace", workspace);
}

std::optional<Current> Execution::enter() {
  if (!is_build_ || driver().context()) return std::nullopt;
  if (!primary_) primary_ = std::make_shared<const PrimaryContext>();
  return std::optional<Current>(std::in_place, primary_->get());
}

void Execution::load() {
  if (modules_ && modules_->context() == driver().context()) return;
  sizes_ = {};
  modules_ = Modules::load(program_);
}

void Execution::prepare(const Sizes& sizes) {
  const auto current = enter();
  load();
  if (sizes != sizes_) lay_out(sizes);
}

void Execution::lay_out(const Sizes& sizes) {
  sizes_ = {};
  bool are_possible = true;
  for (size_t s = 0; s < kSymbolCount; ++s) are_possible &= sizes[s] >= 1 && sizes[s] <= kLargest[s];
  variant_ = are_possible ? modules_->image().variant(sizes) : nullptr;
  if (!variant_)
    invalid("its kernels for sm", modules_->image().sm, " are not for ", program_->describe(exactly(sizes)));
  offsets_.clear();
  workspace_ = 0;
  for (const Count& buffer : variant_->buffers) {
    offsets_.push_back(workspace_);
    workspace_ += aligned(buffer.at(sizes));
  }
  lay_out_maps(sizes);
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
  sizes_ = sizes;
}

// Kernels load all that a map says there is.
void Execution::lay_out_maps(const Sizes& sizes) {
  maps_.clear();
  for (const TensorMap& map : variant_->maps) {
    const Wide rows = map.rows.at(sizes), mapped = rows * map.row_bytes();
    if (mapped > bytes_of(map.source, sizes))
      invalid("the program maps more of ", name_of(map.source), " than there is for ",
              program_->describe(exactly(sizes)));
    maps_.emplace_back(map, static_cast<int64_t>(rows));
  }
}

std::string Execution::name_of(const Argument& source) const {
  if (source.kind == ArgumentKind::kWorkspace) return join("buffer ", source.index);
  return program_->tensor(source).name;
}

Wide Execution::bytes_of(const Argument& source, const Sizes& sizes) const {
  if (source.kind == ArgumentKind::kWorkspace) return variant_->buffers[source.index].at(sizes);
  const Tensor& tensor = program_->tensor(source);
  Wide bytes = dtype_bytes(tensor.dtype);
  for (const auto& [symbol, value] : tensor.shape) multiply(bytes, value + (symbol ? sizes[*symbol] : 0));
  return bytes;
}

void Execution::run(const Sizes& sizes, const Pointers& pointers, void* stream) {
  const auto current = enter();
  if (!modules_) load();
  if (sizes != sizes_) lay_out(sizes);
  pointers.check(*program_, workspace_ > 0);
  const Driver& cuda = driver();
  for (size_t i = 0; i < maps_.size(); ++i) {
    const Argument& source = variant_->maps[i].source;
    if (const CudaResult result = maps_[i].encode(value(source, pointers)))
      cuda.check(result, "cuTensorMapEncodeTiled", name_of(source));
  }
  for (size_t s = 0; s < extents_.size(); ++s) {
    if (const auto* step = std::get_if<Launch>(&variant_->steps[s])) {
      launch(*step, extents_[s], pointers, stream);
    } else if (extents_[s].words) {
      const Fill& fill = std::get<Fill>(variant_->steps[s]);
      const auto address = reinterpret_cast<CudaAddress>(pointers.workspace + offsets_[fill.buffer]);
      cuda.check(cuda.MemsetD32Async(address, fill.value, extents_[s].words, stream), "cuMemsetD32Async",
                 "the workspace");
    }
  }
}

void Execution::launch(const Launch& launch, const Extent& extent, const Pointers& pointers, void* stream) {
  for (size_t i = 0; i < launch.arguments.size(); ++i) {
    const Argument& argument = launch.arguments[i];
    values_[i] = value(argument, pointers);
    parameters_[i] = argument.kind == ArgumentKind::kTensorMap ? maps_[argument.index].parameter() : &values_[i];
  }
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
uint64_t Execution::value(const Argument& argument, const Pointers& pointers) const {
  switch (argument.kind) {
    case ArgumentKind::kInput: return reinterpret_cast<uint64_t>(pointers.inputs[argument.index]);
    case ArgumentKind::kOutput: return reinterpret_cast<uint64_t>(pointers.outputs[argument.index]);
    case ArgumentKind::kWorkspace: return reinterpret_cast<uint64_t>(pointers.workspace + offsets_[argument.index]);
    case ArgumentKind::kSymbol: return static_cast<uint64_t>(sizes_[argument.index]);
    case ArgumentKind::kConstant: return argument.index;
    case ArgumentKind::kTensorMap:
    case ArgumentKind::kNull: break;
  }
  return 0;
}

}  // namespace moevlm::tensorrt
