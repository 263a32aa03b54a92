// Where errors go: to the logger that TensorRT names, and to whoever asks for the last one.
#include <cxxabi.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <typeinfo>

#include "abi.h"
#include "errors.h"

#define MOEVLM_EXPORT extern "C" __attribute__((visibility("default")))

namespace moevlm::tensorrt {
namespace {

std::atomic<void*> finder{nullptr};

std::string& last_error() {
  thread_local std::string error;
  return error;
}

// Whether an object of TensorRT has IVersionedInterface at the root, told by its run-time type. Without one it is taken
// for TensorRT 10's, whose first function is in TensorRT 11 one that returns 0 and does nothing.
bool is_versioned(const void* object) {
  const auto* const* const* table = static_cast<const std::type_info* const* const*>(object);
  const std::type_info* type = (*table)[-1];
  while (type) {
    if (!std::strcmp(type->name(), typeid(moevlm::abi::Versioned).name())) return true;
    const auto* derived = dynamic_cast<const __cxxabiv1::__si_class_type_info*>(type);
    type = derived ? derived->__base_type : nullptr;
  }
  return false;
}

bool log(const char* message) {
  using namespace moevlm::abi;
  void* const found = finder;
  if (!found) return false;
  void* logger = is_versioned(found) ? static_cast<void*>(static_cast<LoggerFinder11*>(found)->findLogger())
                                     : static_cast<void*>(static_cast<LoggerFinder10*>(found)->findLogger());
  if (!logger) return false;
  if (is_versioned(logger))
    static_cast<Logger11*>(logger)->log(Severity::kError, message);
  else
    static_cast<Logger10*>(logger)->log(Severity::kError, message);
  return true;
}

}  // namespace

void report(const char* op, const char* what) noexcept {
  try {
    const std::string message = join(op, ": ", what);
    last_error() = message;
    if (!log(message.c_str())) std::fprintf(stderr, "%s\n", message.c_str());
  } catch (...) {
    std::fprintf(stderr, "%s: %s\n", op, what);
  }
}

}  // namespace moevlm::tensorrt

MOEVLM_EXPORT void setLoggerFinder(void* finder) { moevlm::tensorrt::finder = finder; }

// The last error of this thread, until the next; empty if there was none.
MOEVLM_EXPORT const char* moevlm_plugin_error() { return moevlm::tensorrt::last_error().c_str(); }
