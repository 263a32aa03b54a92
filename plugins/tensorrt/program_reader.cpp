#include "program_reader.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string_view>
#include <utility>
#include <vector>

#include "errors.h"

namespace moevlm::tensorrt {
namespace {

constexpr std::string_view kMagic = "MOEVLMGP";
constexpr uint32_t kVersion = 1;
constexpr uint32_t kFill = 0xFFFFFFFF;
constexpr uint32_t kMaxRank = 8, kMaxWarps = 32;
constexpr int64_t kMaxWorkspace = int64_t{1} << 44;
constexpr int64_t kMaxGrid[3] = {std::numeric_limits<int32_t>::max(), 65535, 65535};
constexpr int32_t kDtypes[] = {0, 1, 2, 3, 6, 7};

class Reader {
 public:
  explicit Reader(std::string_view bytes) : bytes_(bytes) {}

  std::string_view raw(size_t length, const char* what) {
    if (length > bytes_.size() - at_) invalid("the program ends at byte ", bytes_.size(), " in ", what);
    at_ += length;
    return bytes_.substr(at_ - length, length);
  }

  template <class T>
  T number(const char* what) {
    T value;
    std::memcpy(&value, raw(sizeof value, what).data(), sizeof value);
    return value;
  }

  uint32_t u32(const char* what) { return number<uint32_t>(what); }
  std::string_view blob(const char* what) { return raw(u32(what), what); }

  // A list's length, refused when so many items of at least `item` bytes cannot follow.
  uint32_t length(size_t item, const char* what) {
    const uint32_t count = u32(what);
    if (count > (bytes_.size() - at_) / item) invalid("the program ends within its ", count, " ", what);
    return count;
  }

  uint32_t index(size_t count, const char* what) {
    const uint32_t value = u32(what);
    require(value < count, what, value, count);
    return value;
  }

  static void require(bool holds, const char* what, uint32_t value, size_t count) {
    if (!holds) invalid(what, " ", value, " in the program (it has ", count, ")");
  }

  size_t left() const { return bytes_.size() - at_; }

 private:
  std::string_view bytes_;
  size_t at_ = 0;
};

constexpr size_t kCountSize = 5 * sizeof(int64_t);

Count read_count(Reader& in) {
  Count count;
  for (int64_t* value : {&count.slope, &count.offset, &count.divisor, &count.limit_slope, &count.limit})
    *value = in.number<int64_t>("a count");
  if (count.divisor < 1 || count.slope < 0 || count.offset < 0 || count.limit_slope < 0 || count.limit < 0)
    invalid("a count of the program is (", count.slope, " T + ", count.offset, ") / ", count.divisor, ", at most ",
            count.limit_slope, " T + ", count.limit, " (allowed: a divisor of 1 or more, no negative number)");
  return count;
}

std::vector<Tensor> read_tensors(Reader& in) {
  std::vector<Tensor> tensors(in.length(12, "tensors"));
  for (Tensor& tensor : tensors) {
    tensor.name = in.blob("a tensor's name");
    tensor.dtype = in.number<int32_t>("a dtype");
    if (std::find(std::begin(kDtypes), std::end(kDtypes), tensor.dtype) == std::end(kDtypes))
      invalid("tensor ", tensor.name, " of the program has dtype ", tensor.dtype, " (allowed: 0, 1, 2, 3, 6, 7)");
    tensor.shape.resize(in.length(sizeof(int64_t), "dimensions"));
    if (tensor.shape.size() > kMaxRank)
      invalid("tensor ", tensor.name, " of the program has ", tensor.shape.size(), " dimensions (allowed: up to 8)");
    for (int64_t& dim : tensor.shape) {
      dim = in.number<int64_t>("a dimension");
      if (dim < 1 && dim != kTokens) invalid("tensor ", tensor.name, " of the program has a dimension ", dim);
    }
  }
  return tensors;
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
    case ArgumentKind::kTokens:
    case ArgumentKind::kNull:
    case ArgumentKind::kConstant: break;
    default: invalid("kind ", kind, " of an argument in the program (allowed: 0 to 5)");
  }
  return {static_cast<ArgumentKind>(kind), index};
}

// Counts never fall, so what holds at 1 and at the most tokens holds between them.
void check_grid(const Count (&grid)[3], const Kernel& kernel, int64_t max_tokens) {
  for (int axis = 0; axis < 3; ++axis)
    for (const int64_t tokens : {int64_t{1}, max_tokens}) {
      const int64_t size = grid[axis].at(tokens);
      if (size < 1 || size > kMaxGrid[axis])
        invalid("kernel ", kernel.entry, " of the program has a grid of ", size, " along ", "xyz"[axis], " for ",
                tokens, " tokens (allowed: 1 to ", kMaxGrid[axis], ")");
    }
}

Variant read_variant(Reader& in, const Program& program, const Image& image, const std::vector<uint32_t>& parameters) {
  Variant variant;
  variant.max_tokens = in.u32("a variant");
  const uint32_t before = image.variants.empty() ? 0 : image.variants.back().max_tokens;
  if (variant.max_tokens <= before || variant.max_tokens > kMaxTokens)
    invalid("a variant of the program is for up to ", variant.max_tokens, " tokens (allowed: ", before + 1, " to ",
            kMaxTokens, ")");
  variant.buffers.resize(in.length(kCountSize, "buffers"));
  int64_t room = kMaxWorkspace;
  for (Count& buffer : variant.buffers) {
    buffer = read_count(in);
    const int64_t bytes = buffer.at(variant.max_tokens);
    if (bytes > room - int64_t{kAlignment})
      invalid("a variant of the program has buffers of over ", kMaxWorkspace, " bytes");
    room -= static_cast<int64_t>(aligned(bytes));
  }
  const uint32_t steps = in.length(4, "steps");
  for (uint32_t i = 0; i < steps; ++i) {
    const uint32_t kernel = in.u32("a step");
    if (kernel == kFill) {
      Fill fill;
      fill.buffer = in.index(variant.buffers.size(), "buffer");
      fill.value = in.u32("a fill");
      fill.words = read_count(in);
      variant.steps.emplace_back(fill);
      continue;
    }
    in.require(kernel < image.kernels.size(), "kernel", kernel, image.kernels.size());
    Launch launch{kernel, {}, {}};
    for (Count& count : launch.grid) count = read_count(in);
    check_grid(launch.grid, image.kernels[kernel], variant.max_tokens);
    const uint32_t arguments = in.length(8, "arguments");
    if (arguments != parameters[kernel])
      invalid("kernel ", image.kernels[kernel].entry, " of the program is launched with ", arguments,
              " arguments (it has ", parameters[kernel], " parameters)");
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
  const auto has_tokens = [](const Tensor& tensor) {
    return std::count(tensor.shape.begin(), tensor.shape.end(), kTokens) > 0;
  };
  if (std::none_of(program.inputs.begin(), program.inputs.end(), has_tokens))
    invalid("no input of the program has the number of tokens in its shape");
  const uint32_t images = in.length(12, "images");
  if (!images) invalid("the program has no image");
  for (uint32_t i = 0; i < images; ++i) {
    Image image = read_image(in, program);
    if (program.image(image.sm)) invalid("the program has two images for sm", image.sm);
    program.images.push_back(std::move(image));
  }
  if (in.left() == 1 && !program.bytes.back()) program.bytes.pop_back();
  else if (in.left()) invalid("the program has ", in.left(), " bytes after its end");
}

}  // namespace moevlm::tensorrt
