// The kernels of Candidates, included once per instruction set.
#include "sampling/candidates.h"
#include "simd/vector.h"

namespace moevlm::sampling::MOEVLM_ISA {

using namespace moevlm::MOEVLM_ISA;

inline void maxima(const float* logits, int64_t vectors, int64_t blocks, float* maxima) {
  constexpr int chains = 4;
  const Vec nothing = Vec{} - __builtin_inff();
  for (int64_t b = 0; b < blocks; ++b) {
    Vec most[chains] = {nothing, nothing, nothing, nothing};
    int64_t v = vectors * b / blocks;
    const int64_t end = vectors * (b + 1) / blocks;
    for (; v + chains <= end; v += chains) {
#pragma GCC unroll 4
      for (int i = 0; i < chains; ++i) most[i] = larger(load(logits + (v + i) * kLanes), most[i]);  // NaN: the second
    }
    for (; v < end; ++v) most[0] = larger(load(logits + v * kLanes), most[0]);
    store(maxima + b * kLanes, larger(larger(most[0], most[1]), larger(most[2], most[3])));
  }
}

inline int64_t collect(const float* logits, int64_t size, float threshold, float most, int32_t* ids, int64_t capacity,
                       double* sum_of_all) {
  constexpr int64_t strip = 32;  // vectors in one float sum
  const Vec limit = Vec{} + threshold;
  int64_t found = 0;
  double total = 0;
  const auto keep = [&](int64_t id) {
    if (found < capacity) ids[found] = static_cast<int32_t>(id);
    ++found;
  };
  int64_t i = 0;
  while (i + kLanes <= size) {
    const int64_t left = (size - i) / kLanes, end = i + (left < strip ? left : strip) * kLanes;
    Vec sums = {};
    for (; i < end; i += kLanes) {
      const Vec x = load(logits + i);
      sums += exp2((x - most) * 1.44269504f);
      for (uint32_t lanes = not_less(x, limit); lanes; lanes &= lanes - 1) keep(i + __builtin_ctz(lanes));
    }
    total += sum(sums);
  }
  for (; i < size; ++i) {
    total += exp2((Vec{} + (logits[i] - most)) * 1.44269504f)[0];
    if (!(logits[i] < threshold)) keep(i);
  }
  *sum_of_all = total;
  return found;
}

extern const Kernels kernels;
const Kernels kernels = {kLanes, maxima, collect};

}  // namespace moevlm::sampling::MOEVLM_ISA
