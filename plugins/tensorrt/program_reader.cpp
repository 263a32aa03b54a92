#include "program_reader.h"

#include <algorithm>
#include <string_view>
#include <utility>
#include <vector>

#include "errors.h"
#include "program_checks.h"
#include "reader.h"

namespace moevlm::tensorrt {
namespace {

constexpr std::string_view kMagic = "MOEVLMGP";
constexpr uint32_t kVersion = 2;
constexpr uint32_t kFill = 0xFFFFFFFF, kNoSymbol = 0xFFFFFFFF;
constexpr uint32_t kFirstHopperSm = 90;  // with launches that overlap, and tensor maps
constexpr uint32_t kMaxRank = 8, kMaxWarps = 32;
constexpr int64_t kMaxDimension = int64_t{1} << 40;
constexpr int32_t kDtypes[] = {0, 1, 2, 3, 6, 7};

constexpr size_t kLinearSize = (1 + kSymbolCount) * sizeof(int64_t);
constexpr size_t kCountSize = kLinearSize + sizeof(int64_t) + sizeof(uint32_t);  // without a limit
constexpr size_t kMapSize = kLinearSize + 6 * sizeof(uint32_t);                  // without dimensions

Linear read_linear(Reader& in, const Program& program) {
  Linear linear;
  linear.offset = in.number<int64_t>("a number");
  for (int64_t& coefficient : linear.coefficients) coefficient = in.number<int64_t>("a number");
  for (size_t s = 0; s < kSymbolCount; ++s)
    if (linear.coefficients[s] && !program.places[s])
      invalid("the program has ", text(linear), ", but no input has ", kSymbols[s], " in its shape");
  return linear;
}

Count read_count(Reader& in, const Program& program) {
  Count count{};
  count.value = read_linear(in, program);
  count.divisor = in.number<int64_t>("a divisor");
  count.has_limit = in.flag("whether a count has a limit");
  if (count.has_limit) count.limit = read_linear(in, program);
  if (count.divisor < 1 || has_negative(count.value) || has_negative(count.limit))
    invalid("a count of the program is (", text(count.value), ") / ", count.divisor, ", at most ",
            count.has_limit ? text(count.limit) : "any number",
            " (allowed: a divisor of 1 or more, no negative number)");
  return count;
}

Dimension read_dimension(Reader& in, const Tensor& tensor) {
  const uint32_t symbol = in.u32("a dimension");
  const int64_t value = in.number<int64_t>("a dimension");
  const bool is_symbol = symbol != kNoSymbol;
  if (is_symbol && symbol >= kSymbolCount)
    invalid("tensor ", tensor.name, " of the program has a symbol ", symbol, " (it has ", kSymbolCount, ")");
  if (value < !is_symbol || value > kMaxDimension)
    invalid("tensor ", tensor.name, " of the program has a dimension ",
            is_symbol ? join(kSymbols[symbol], " + ") : "", value, " (allowed: ", is_symbol ? 0 : 1, " to ",
            kMaxDimension, ")");
  return {is_symbol ? std::optional<size_t>(symbol) : std::nullopt, value};
}

int32_t read_dtype(Reader& in, const std::string& what) {
  const auto dtype = in.number<int32_t>("a dtype");
  if (std::find(std::begin(kDtypes), std::end(kDtypes), dtype) == std::end(kDtypes))
    invalid(what, " of the program has dtype ", dtype, " (allowed: 0, 1, 2, 3, 6, 7)");
  return dtype;
}

std::vector<Tensor> read_tensors(Reader& in) {
  std::vector<Tensor> tensors(in.length(16, "tensors"));
  for (Tensor& tensor : tensors) {
    tensor.name = in.blob("a tensor's name");
    tensor.dtype = read_dtype(in, join("tensor ", tensor.name));
    tensor.written = in.flag("whether a tensor is written");
    const uint32_t rank = in.length(sizeof(uint32_t) + sizeof(int64_t), "dimensions");
    if (rank > kMaxRank)
      invalid("tensor ", tensor.name, " of the program has ", rank, " dimensions (allowed: up to ", kMaxRank, ")");
    for (uint32_t i = 0; i < rank; ++i) tensor.shape.push_back(read_dimension(in, tensor));
  }
  return tensors;
}

// A symbol's size is that of the first input that has it.
void find_places(Program& program) {
  for (size_t i = 0; i < program.inputs.size(); ++i)
    for (size_t d = 0; d < program.inputs[i].shape.size(); ++d) {
      const Dimension& dimension = program.inputs[i].shape[d];
      if (dimension.symbol && !program.places[*dimension.symbol])
        program.places[*dimension.symbol] = Place{i, d, dimension.value};
    }
}

Kernel read_kernel(Reader& in) {
  Kernel kernel;
  kernel.entry = in.blob("a kernel's name");
  kernel.warps = in.u32("warps");
  if (kernel.warps < 1 || kernel.warps > kMaxWarps)
    invalid("kernel ", kernel.entry, " of the program has ", kernel.warps, " warps (allowed: 1 to ", kMaxWarps, ")");
  kernel.shared = in.u32("shared memory");
  return kernel;
}

Argument read_argument(Reader& in, const Program& program, const Variant& variant) {
  const uint32_t kind = in.u32("an argument");
  const uint32_t index = in.u32("an argument");
  switch (static_cast<ArgumentKind>(kind)) {
    case ArgumentKind::kInput: in.require(index < program.inputs.size(), "input", index, program.inputs.size()); break;
    case ArgumentKind::kOutput:
      in.require(index < program.outputs.size(), "output", index, program.outputs.size());
      break;
    case ArgumentKind::kWorkspace:
      in.require(index < variant.buffers.size(), "buffer", index, variant.buffers.size());
      break;
    case ArgumentKind::kSymbol:
      in.require(index < kSymbolCount, "symbol", index, kSymbolCount);
      if (!program.places[index]) invalid("a kernel of the program takes ", kSymbols[index], ", which no input has");
      break;
    case ArgumentKind::kTensorMap:
      in.require(index < variant.maps.size(), "tensor map", index, variant.maps.size());
      break;
    case ArgumentKind::kNull:
    case ArgumentKind::kConstant: break;
    default: invalid("kind ", kind, " of an argument in the program (allowed: 0 to 6)");
  }
  return {static_cast<ArgumentKind>(kind), index};
}

TensorMap read_map(Reader& in, const Program& program, const Image& image, const Variant& variant) {
  TensorMap map{};
  map.source = read_argument(in, program, variant);
  if (map.source.kind > ArgumentKind::kWorkspace)
    invalid("a tensor map of the program is of an argument of kind ", static_cast<uint32_t>(map.source.kind),
            " (allowed: 0 to 2)");
  map.dtype = read_dtype(in, "a tensor map");
  map.rows = read_linear(in, program);
  for (uint32_t i = in.length(sizeof(int64_t), "dimensions"); i; --i)
    map.inner.push_back(in.number<int64_t>("a dimension"));
  for (uint32_t i = in.length(sizeof(uint32_t), "sizes of a block"); i; --i) map.block.push_back(in.u32("a block"));
  map.swizzle = in.u32("a swizzle");
  if (image.sm < kFirstHopperSm)
    invalid("the program has a tensor map for sm", image.sm, " (allowed: from sm", kFirstHopperSm, " on)");
  return map;
}

Variant read_variant(Reader& in, const Program& program, const Image& image, const std::vector<uint32_t>& parameters) {
  Variant variant;
  for (uint32_t i = in.length(kLinearSize, "bounds"); i; --i) variant.bounds.push_back(read_linear(in, program));
  for (uint32_t i = in.length(kCountSize, "buffers"); i; --i) variant.buffers.push_back(read_count(in, program));
  Ranges ranges = program.possible();
  const bool is_reached = narrow(ranges, variant.bounds);  // what never runs may ask for anything
  if (is_reached) check_buffers(variant.buffers, program, ranges);
  for (uint32_t i = in.length(kMapSize, "tensor maps"); i; --i) {
    variant.maps.push_back(read_map(in, program, image, variant));
    if (is_reached) check_map(variant.maps.back(), program, ranges);
  }
  for (uint32_t i = in.length(4, "steps"); i; --i) {
    const uint32_t kernel = in.u32("a step");
    if (kernel == kFill) {
      Fill fill;
      fill.buffer = in.index(variant.buffers.size(), "buffer");
      fill.value = in.u32("a fill");
      fill.words = read_count(in, program);
      variant.steps.emplace_back(std::move(fill));
      continue;
    }
    in.require(kernel < image.kernels.size(), "kernel", kernel, image.kernels.size());
    const std::string& entry = image.kernels[kernel].entry;
    Launch launch{kernel, in.flag("whether a launch overlaps"), {}, {}};
    if (launch.overlaps && image.sm < kFirstHopperSm)
      invalid("kernel ", entry, " of the program overlaps on sm", image.sm, " (allowed: from sm", kFirstHopperSm,
              " on)");
    for (Count& count : launch.grid) count = read_count(in, program);
    if (is_reached) check_grid(launch.grid, image.kernels[kernel], program, ranges);
    const uint32_t arguments = in.length(8, "arguments");
    if (arguments != parameters[kernel])
      invalid("kernel ", entry, " of the program is launched with ", arguments, " arguments (it has ",
              parameters[kernel], " parameters)");
    for (uint32_t a = 0; a < arguments; ++a) launch.arguments.push_back(read_argument(in, program, variant));
    variant.steps.emplace_back(std::move(launch));
  }
  return variant;
}

Image read_image(Reader& in, const Program& program) {
  Image image;
  image.sm = in.u32("an image");
  const uint32_t kernels = in.length(20, "kernels");
  std::vector<uint32_t> parameters;
  for (uint32_t i = 0; i < kernels; ++i) {
    image.kernels.push_back(read_kernel(in));
    parameters.push_back(in.u32("parameters"));
    image.kernels.back().image = in.blob("a kernel's image");
  }
  const uint32_t variants = in.length(12, "variants");
  if (!variants) invalid("the program's image for sm", image.sm, " has no variant");
  for (uint32_t i = 0; i < variants; ++i) image.variants.push_back(read_variant(in, program, image, parameters));
  return image;
}

}  // namespace

void read_program(Program& program) {
  Reader in(program.bytes);
  if (in.left() < kMagic.size() || in.raw(kMagic.size(), "its magic") != kMagic)
    invalid("attribute program is no GPU program (it does not begin with ", kMagic, ")");
  const uint32_t version = in.u32("its version");
  if (version != kVersion) invalid("the program has version ", version, " (allowed: ", kVersion, ")");
  program.op = in.blob("its op");
  program.inputs = read_tensors(in);
  program.outputs = read_tensors(in);
  find_places(program);
  check_outputs(program);
  const uint32_t images = in.length(12, "images");
  if (!images) invalid("the program has no image");
  for (uint32_t i = 0; i < images; ++i) {
    Image image = read_image(in, program);
    if (program.image(image.sm)) invalid("the program has two images for sm", image.sm);
    program.images.push_back(std::move(image));
  }
  program.largest = find_largest(program);
  if (in.left() == 1 && !program.bytes.back()) program.bytes.pop_back();
  else if (in.left()) invalid("the program has ", in.left(), " bytes after its end");
}

}  // namespace moevlm::tensorrt
