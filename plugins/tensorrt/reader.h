// Little-endian bytes, taken from the front.
#pragma once
#include <cstdint>
#include <cstring>
#include <string_view>

#include "errors.h"

namespace moevlm::tensorrt {

// Every call throws std::invalid_argument where the bytes end too early, naming what was to be read.
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

  bool flag(const char* what) {
    const uint32_t value = u32(what);
    if (value > 1) invalid(what, " is ", value, " in the program (allowed: 0, 1)");
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

}  // namespace moevlm::tensorrt
