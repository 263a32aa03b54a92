// The attention kernels for one instruction set: a file that includes this defines MOEVLM_ISA (a name), MOEVLM_LANES
// (floats in a vector) and MOEVLM_TILE_M (rows of the register tile), and has the compiler target set.

#include "cached_attention/few_rows.h"
#include "cached_attention/many_rows.h"

namespace moevlm::MOEVLM_ISA {

template <class T>
void attend(const Attention& call, const Task& task) {
  if (task.append) {
    const int64_t position = call.position[task.sequence];
    const int64_t first = task.begin > position ? task.begin : position;
    if (first < task.end) append<T>(call, task.sequence, task.kv_head, first - position, task.end - first);
  }
  const bool few = task.rows() <= kFewRows;
  switch (call.head_dim) {
    case 64: return (few ? attend_few_rows<T, 64> : attend_many_rows<T, 64>)(call, task);
    case 128: return (few ? attend_few_rows<T, 128> : attend_many_rows<T, 128>)(call, task);
    default: return (few ? attend_few_rows<T, 0> : attend_many_rows<T, 0>)(call, task);
  }
}

inline void append(const Attention& call, int64_t sequence, int64_t kv_head, int64_t token, int64_t tokens) {
  (call.quantized ? append<int8_t> : append<float>)(call, sequence, kv_head, token, tokens);
}

inline void attend(const Attention& call, const Task& task) {
  (call.quantized ? attend<int8_t> : attend<float>)(call, task);
}

extern const Kernels kernels;
const Kernels kernels = {kLanes, append, attend, combine};

}  // namespace moevlm::MOEVLM_ISA
