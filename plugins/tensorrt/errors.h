// Errors as exceptions inside the library, and how they leave it.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace moevlm::tensorrt {

template <class... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

template <class... Parts>
[[noreturn]] void invalid(const Parts&... parts) {
  throw std::invalid_argument(join(parts...));
}

// To TensorRT's logger, or to stderr where there is none; also kept for moevlm_plugin_error.
void report(const char* op, const char* what) noexcept;

// Runs body; reports what it throws. Whether it threw nothing.
template <class Body>
bool guarded(const char* op, Body body) noexcept {
  try {
    body();
    return true;
  } catch (const std::exception& error) {
    report(op, error.what());
  } catch (...) {
    report(op, "internal error");
  }
  return false;
}

}  // namespace moevlm::tensorrt
