// What a plugin runs: the kernels of one op and their launches, as plugins/gpu/program.py describes them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace moevlm::tensorrt {

constexpr int64_t kTokens = -1;  // in a shape: the number of tokens T
constexpr uint32_t kMaxTokens = std::numeric_limits<int32_t>::max();
constexpr size_t kAlignment = 256;

struct Tensor {
  std::string name;
  int32_t dtype;
  std::vector<int64_t> shape;
};

// min(ceil((slope * T + offset) / divisor), limit_slope * T + limit); never negative, and never falls as T rises.
struct Count {
  int64_t slope, offset, divisor, limit_slope, limit;
  int64_t at(int64_t tokens) const;
};

enum class ArgumentKind : uint32_t { kInput, kOutput, kWorkspace, kTokens, kNull, kConstant };

struct Argument {
  ArgumentKind kind;
  uint32_t index;
};

struct Launch {
  uint32_t kernel;
  Count grid[3];
  std::vector<Argument> arguments;
};

struct Fill {
  uint32_t buffer;
  uint32_t value;
  Count words;
};

using Step = std::variant<Launch, Fill>;

struct Variant {
  uint32_t max_tokens;
  std::vector<Count> buffers;
  std::vector<Step> steps;

  size_t workspace(int64_t tokens) const;
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

  // The first with room for so many tokens; null if none has.
  const Variant* variant(int64_t tokens) const;
};

struct Program {
  std::string bytes;
  std::string op;
  std::vector<Tensor> inputs;
  std::vector<Tensor> outputs;
  std::vector<Image> images;

  // Throws std::invalid_argument that says what is wrong and where. The same bytes give the same object, as long as
  // somebody has it: a model's layers share one program.
  static std::shared_ptr<const Program> read(std::string_view bytes);

  // Null if there is none for this compute capability.
  const Image* image(uint32_t sm) const;
  // The most tokens that every image takes.
  int64_t max_tokens() const;
  // For up to so many tokens, on any of the GPUs.
  size_t workspace(int64_t tokens) const;
};

size_t aligned(int64_t bytes);

}  // namespace moevlm::tensorrt
