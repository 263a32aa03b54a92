// Parallel loops without knowing whose threads run them: ONNX Runtime's pool in an operator, the test's own otherwise.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace moevlm {

struct Pool {
  void* self;
  int64_t threads;  // no more than these run at once
  // Calls task(argument, i) once for every i < total, in any order, on any threads; returns when all are done.
  void (*run)(void* self, size_t total, void (*task)(void* argument, size_t i), void* argument);
};

template <class Body>
void parallel_for(const Pool& pool, int64_t total, Body&& body) {
  if (total == 1) {
    body(int64_t{0});
  } else if (total > 1) {
    using Plain = std::remove_reference_t<Body>;
    pool.run(
        pool.self, total, [](void* argument, size_t i) { (*static_cast<Plain*>(argument))(static_cast<int64_t>(i)); },
        &body);
  }
}

}  // namespace moevlm
