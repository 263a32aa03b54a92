#include "program.h"

#include <algorithm>
#include <limits>
#include <mutex>

#include "program_reader.h"

namespace moevlm::tensorrt {
namespace {

// TensorRT's parsers hand an ONNX string over with or without a final zero.
bool is_same(std::string_view program, std::string_view bytes) {
  return bytes.substr(0, program.size()) == program &&
         (bytes.size() == program.size() || (bytes.size() == program.size() + 1 && !bytes.back()));
}

struct Known {
  std::mutex mutex;
  std::vector<std::weak_ptr<const Program>> programs;
};

// Never destroyed: plugins may outlive static objects.
Known& known() {
  static Known* const shared = new Known;
  return *shared;
}

}  // namespace

// 128 bits hold any product of two of the numbers.
int64_t Count::at(int64_t tokens) const {
  __extension__ using Wide = __int128;
  const Wide value = (Wide{slope} * tokens + offset + divisor - 1) / divisor;
  const Wide most = Wide{limit_slope} * tokens + limit;
  return static_cast<int64_t>(std::min({value, most, Wide{std::numeric_limits<int64_t>::max()}}));
}

size_t aligned(int64_t bytes) { return (static_cast<size_t>(bytes) + kAlignment - 1) / kAlignment * kAlignment; }

size_t Variant::workspace(int64_t tokens) const {
  size_t bytes = 0;
  for (const Count& buffer : buffers) bytes += aligned(buffer.at(tokens));
  return bytes;
}

const Variant* Image::variant(int64_t tokens) const {
  for (const Variant& variant : variants)
    if (tokens <= variant.max_tokens) return &variant;
  return nullptr;
}

std::shared_ptr<const Program> Program::read(std::string_view bytes) {
  Known& all = known();
  const std::lock_guard<std::mutex> lock(all.mutex);
  auto& programs = all.programs;
  programs.erase(std::remove_if(programs.begin(), programs.end(), [](const auto& p) { return p.expired(); }),
                 programs.end());
  for (const auto& other : programs)
    if (auto program = other.lock(); program && is_same(program->bytes, bytes)) return program;
  auto program = std::make_shared<Program>();
  program->bytes = bytes;
  read_program(*program);
  programs.push_back(program);
  return program;
}

const Image* Program::image(uint32_t sm) const {
  for (const Image& image : images)
    if (image.sm == sm) return &image;
  return nullptr;
}

int64_t Program::max_tokens() const {
  int64_t least = kMaxTokens;
  for (const Image& image : images) least = std::min<int64_t>(least, image.variants.back().max_tokens);
  return least;
}

size_t Program::workspace(int64_t tokens) const {
  size_t most = 0;
  for (const Image& image : images)
    for (const Variant& variant : image.variants) {
      most = std::max(most, variant.workspace(std::min<int64_t>(tokens, variant.max_tokens)));
      if (tokens <= variant.max_tokens) break;
    }
  return most;
}

}  // namespace moevlm::tensorrt
