#include "program.h"

#include <algorithm>
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

size_t aligned(int64_t bytes) { return (static_cast<size_t>(bytes) + kAlignment - 1) / kAlignment * kAlignment; }

int64_t dtype_bytes(int32_t dtype) {
  constexpr int64_t kBytes[] = {4, 2, 1, 4, 1, 1, 1, 2};
  return kBytes[dtype];
}

void multiply(Wide& bytes, int64_t factor) { bytes = std::min(bytes * factor, Wide{1} << 62); }

Wide TensorMap::row_bytes() const {
  Wide bytes = dtype_bytes(dtype);
  for (const int64_t size : inner) multiply(bytes, size);
  return bytes;
}

bool Variant::holds(const Sizes& sizes) const { return holds_throughout(exactly(sizes)); }

bool Variant::holds_throughout(const Ranges& ranges) const {
  return std::all_of(bounds.begin(), bounds.end(), [&](const Linear& bound) { return bound.most(ranges) <= 0; });
}

size_t Variant::workspace(const Sizes& sizes) const {
  size_t bytes = 0;
  for (const Count& buffer : buffers) bytes += aligned(buffer.at(sizes));
  return bytes;
}

const Variant* Image::variant(const Sizes& sizes) const {
  for (const Variant& variant : variants)
    if (variant.holds(sizes)) return &variant;
  return nullptr;
}

bool Image::takes(const Ranges& ranges) const {
  return std::any_of(variants.begin(), variants.end(), [&](const Variant& v) { return v.holds_throughout(ranges); });
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

Ranges Program::possible() const {
  Ranges ranges;
  for (size_t s = 0; s < kSymbolCount; ++s) ranges[s] = {1, places[s] ? kLargest[s] : 1};
  return ranges;
}

std::string Program::describe(const Ranges& ranges) const {
  std::string all;
  for (size_t s = 0; s < kSymbolCount; ++s)
    if (places[s]) all += (all.empty() ? "" : ", ") + std::string(1, kSymbols[s]) + " = " + text(ranges[s]);
  return all;
}

// Buffers never shrink as sizes rise, so a variant takes most at the upper ends of what it may be run for.
size_t Program::workspace(const Ranges& ranges) const {
  size_t bytes = 0;
  for (const Image& image : images)
    for (const Variant& variant : image.variants) {
      Ranges within = ranges;
      if (narrow(within, variant.bounds)) bytes = std::max(bytes, variant.workspace(most(within)));
      if (variant.holds_throughout(ranges)) break;  // the next ones are not reached
    }
  return bytes;
}

}  // namespace moevlm::tensorrt
