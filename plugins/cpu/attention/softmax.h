// Scores to weights, and results of blocks joined to one. Included by kernels.h, once per instruction set.

#pragma once

#include <cmath>

#include "attention/products.h"

namespace moevlm::attention::MOEVLM_ISA {

constexpr float kLog2e = 1.44269504f;

// Below 1/4 the first terms of its series, of which the next is 1e-8 of the result.
MOEVLM_INLINE Vec tanh(Vec x) {
  const Vec size = (Vec)magnitude(x), square = x * x;
  Vec series = fma(square, broadcast(62.0f / 2835), broadcast(-17.0f / 315));
  series = fma(series, square, broadcast(2.0f / 15));
  series = fma(series, square, broadcast(-1.0f / 3));
  const Vec small = fma(series * square, size, size);
  const Vec power = exp2(size * (-2 * kLog2e)), large = (1 - power) / (1 + power);
  const Ints sign = (Ints)x & INT32_MIN;
  return (Vec)((Ints)(size < 0.25f ? small : large) | sign);
}

// Turns a row's scores of a block into weights relative to the largest, 0 for what it does not see. key_scale and
// value_scale, [kBlock], belong to an int8 cache; softcap is in powers of two, or 0. The row sees something.
template <bool Quantized>
__attribute__((noinline)) void weigh(
    float* scores, Range seen, float softcap, const float* key_scale, const float* value_scale, float* top,
    float* total) {
  const Vec nothing = broadcast(-INFINITY);
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const int64_t begin = seen.begin / kLanes * kLanes;
  Vec largest_of_lane = nothing;
  for (int64_t j = begin; j < seen.end; j += kLanes) {
    Vec x = load(scores + j);
    if (Quantized) x = x * load(key_scale + j);
    if (softcap > 0) x = tanh(x) * softcap;
    if (j < seen.begin || j + kLanes > seen.end) {
      const Ints entry = lane + static_cast<int32_t>(j);
      x = (entry >= static_cast<int32_t>(seen.begin)) & (entry < static_cast<int32_t>(seen.end)) ? x : nothing;
    }
    store(scores + j, x);
    largest_of_lane = larger(largest_of_lane, x);
  }
  const float most = largest(largest_of_lane);
  Vec sums = {};
  for (int64_t j = begin; j < seen.end; j += kLanes) {
    const Vec weight = exp2(load(scores + j) - most);
    sums += weight;
    store(scores + j, Quantized ? weight * load(value_scale + j) : weight);
  }
  *top = most;
  *total = sum(sums);
}

// What is known of each row of a task so far; its sums lie in y.
struct Result {
  const Call& call;
  const Task& task;
  float top[kTileRows], total[kTileRows];

  Result(const Call& call, const Task& task) : call(call), task(task) {}

  // Joins a block's partial result to those of the blocks before it; with a row's last, y is done.
  __attribute__((noinline)) void add(int64_t block, const float* partial) {
    const int64_t rows = task.rows(), size = call.value_dim, entries = call.entries(task.sequence);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = r / task.heads, head = task.head + r % task.heads, position = task.position + token;
      const int64_t end_seen = call.end_seen(task.token + token, position, entries);
      const int64_t first = call.first_seen(position) / kBlock, last = (end_seen - 1) / kBlock;
      if (block < first || block > last) continue;
      const float* const sums = partial + r * size;
      float* const y = call.y + ((task.token + token) * call.heads + head) * size;
      const float other_top = partial[rows * size + r], other_total = partial[rows * (size + 1) + r];
      float before = 0, other = 1, end = 1;  // factors of what is there, of the block's sums, and of both together
      if (block == first) {
        top[r] = other_top;
        total[r] = other_total;
      } else if (other_top > top[r]) {
        before = power(top[r] - other_top);
        top[r] = other_top;
        total[r] = total[r] * before + other_total;
      } else {
        before = 1;
        other = power(other_top - top[r]);
        total[r] = total[r] + other_total * other;
      }
      if (block == last) end = finish(r, call.sinks ? call.sinks + head : nullptr);
      if (block == first) {
        for (int64_t d = 0; d < size; d += kLanes) store(y + d, load(sums + d) * end);
      } else {
        const Vec kept = broadcast(before);
        for (int64_t d = 0; d < size; d += kLanes) store(y + d, fma(load(y + d), kept, load(sums + d) * other) * end);
      }
    }
  }

 private:
  static float power(float x) { return exp2(broadcast(x))[0]; }

  // The factor that makes sums a result. A sink is an entry with this score and no value.
  float finish(int64_t row, const float* sink) const {
    if (!sink) return 1 / total[row];
    const float score = *sink * kLog2e;
    if (score > top[row]) {
      const float factor = power(top[row] - score);
      return factor / (total[row] * factor + 1);
    }
    return 1 / (total[row] + power(score - top[row]));
  }
};

}  // namespace moevlm::attention::MOEVLM_ISA
