// What a plugin runs: the kernels of one op and their launches, as plugins/gpu/program.py describes them.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "sizes.h"

namespace moevlm::tensorrt {

constexpr size_t kAlignment = 256;  // of a buffer in the workspace
constexpr size_t kMaxMapRank = 5;

// A number, or a symbol plus a number.
struct Dimension {
  std::optional<size_t> symbol;
  int64_t value;
};

// written: kernels write to it, though it is an input.
struct Tensor {
  std::string name;
  int32_t dtype;
  bool written;
  std::vector<Dimension> shape;
};

enum class ArgumentKind : uint32_t { kInput, kOutput, kWorkspace, kSymbol, kNull, kConstant, kTensorMap };

struct Argument {
  ArgumentKind kind;
  uint32_t index;
};

// A dense array [rows, inner...] at an input, an output or a buffer, which a kernel loads in blocks through the tensor
// memory accelerator. swizzle: bytes over which a block's rows are permuted in shared memory, 0 for not at all.
struct TensorMap {
  Argument source;
  int32_t dtype;
  Linear rows;
  std::vector<int64_t> inner;
  std::vector<uint32_t> block;
  uint32_t swizzle;

  Wide row_bytes() const;
};

// overlaps: it may begin while the step before it ends, for which its kernel waits itself.
struct Launch {
  uint32_t kernel;
  bool overlaps;
  std::array<Count, 3> grid;
  std::vector<Argument> arguments;
};

struct Fill {
  uint32_t buffer;
  uint32_t value;
  Count words;
};

using Step = std::variant<Launch, Fill>;

// For sizes at which no bound is above 0.
struct Variant {
  std::vector<Linear> bounds;
  std::vector<Count> buffers;
  std::vector<TensorMap> maps;
  std::vector<Step> steps;

  bool holds(const Sizes& sizes) const;
  bool holds_throughout(const Ranges& ranges) const;
  size_t workspace(const Sizes& sizes) const;
};

struct Kernel {
  std::string entry;
  uint32_t warps;
  uint32_t shared;
  std::string_view image;  // in Program::bytes
};

struct Image {
  uint32_t sm;
  std::vector<Kernel> kernels;
  std::vector<Variant> variants;

  // The first that holds; null if none does.
  const Variant* variant(const Sizes& sizes) const;
  // Whether one of them holds throughout, so that none of those sizes is without.
  bool takes(const Ranges& ranges) const;
};

// The input and its dimension that give a symbol its size, once `plus` is taken away.
struct Place {
  size_t input, dimension;
  int64_t plus;
};

struct Program {
  std::string bytes;
  std::string op;
  std::vector<Tensor> inputs;
  std::vector<Tensor> outputs;
  std::vector<Image> images;
  std::array<std::optional<Place>, kSymbolCount> places;  // of the symbols that it has
  Sizes largest;  // that every image has a variant for, each symbol by itself

  // Throws std::invalid_argument that says what is wrong and where. The same bytes give the same object, as long as
  // somebody has it: a model's layers share one program.
  static std::shared_ptr<const Program> read(std::string_view bytes);

  // An input or output.
  const Tensor& tensor(const Argument& argument) const {
    return (argument.kind == ArgumentKind::kInput ? inputs : outputs)[argument.index];
  }
  // Null if there is none for this compute capability.
  const Image* image(uint32_t sm) const;
  // All that a symbol may be: 1 to kLargest, and 1 where the program has no such symbol.
  Ranges possible() const;
  // "T = 5, N = 1..4", of the symbols that it has.
  std::string describe(const Ranges& ranges) const;
  // For sizes within these ranges, on any of the GPUs.
  size_t workspace(const Ranges& ranges) const;
};

size_t aligned(int64_t bytes);
int64_t dtype_bytes(int32_t dtype);         // of the dtypes that a program may have
void multiply(Wide& bytes, int64_t factor);  // up to 2^62, which is more than there ever is

}  // namespace moevlm::tensorrt
