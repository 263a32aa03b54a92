// The attention kernels for one instruction set: a file that includes this defines MOEVLM_ISA (a name), MOEVLM_LANES
// (floats in a vector), MOEVLM_REGISTERS (vectors) and MOEVLM_TILE_M (rows of the register tile), and has the compiler
// target set.

#include "attention/tile.h"

namespace moevlm::attention::MOEVLM_ISA {

template <class T>
void attend(const Call& call, const Task& task) {
  if (task.append) {
    const Range ours = {task.begin * kBlock, task.end * kBlock};
    const Range fresh = Range{task.position, task.position + task.tokens}.within(ours);
    append<T>(call, task.sequence, task.kv_head, fresh.begin, fresh.end);
  }
  Tile<T>(call, task).run();
}

inline void append(const Call& call, int64_t sequence, int64_t kv_head, int64_t begin, int64_t end) {
  (call.quantized ? append<int8_t> : append<float>)(call, sequence, kv_head, begin, end);
}

inline void attend(const Call& call, const Task& task) {
  (call.quantized ? attend<int8_t> : attend<float>)(call, task);
}

inline void combine(const Call& call, const Task& task, const float* partials) {
  Result result(call, task);
  const int64_t apart = Partial::floats(task.rows(), call.value_dim);
  for (int64_t block = task.begin; block < task.end; ++block) {
    result.add(block, partials + (block - task.begin) * apart);
  }
}

extern const Kernels kernels;
const Kernels kernels = {kLanes, append, attend, combine};

}  // namespace moevlm::attention::MOEVLM_ISA
