// Scores to weights, and results of blocks joined to one. Included by kernels.h, once per instruction set.

#pragma once

#include <cmath>

#include "attention/products.h"

namespace moevlm::attention::MOEVLM_ISA {

constexpr float kLog2e = 1.44269504f;

// Below 1/4 the first terms of its series, of which the next is 1e-8 of the result.
MOEVLM_INLINE Vec tanh(Vec x) {
  const Vec size = (Vec)magnitude(x), square = x * x;
  Vec series = fma(square, Vec{} + 62.0f / 2835, Vec{} - 17.0f / 315);
  series = fma(series, square, Vec{} + 2.0f / 15);
  series = fma(series, square, Vec{} - 1.0f / 3);
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
  const Vec nothing = Vec{} - INFINITY;
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

  float* y(int64_t row) const {
    const int64_t token = task.token + row / task.heads;
    return call.y + (token * call.heads + task.head + row % task.heads) * call.value_dim;
  }

  // Of all entries.
  Range seen(int64_t row) const {
    const int64_t position = task.position + row / task.heads;
    return {call.first_seen(position), position + 1};
  }

  // Blocks come in their order.
  __attribute__((noinline)) void add(int64_t block, const float* partial) {
    const int64_t rows = task.rows(), size = call.value_dim;
    for (int64_t r = 0; r < rows; ++r) {
      const Range mine = seen(r);
      if (block < mine.begin / kBlock || block > (mine.end - 1) / kBlock) continue;
      const float *sums = partial + r * size, other = partial[rows * size + r];
      const float weight = partial[rows * (size + 1) + r];
      float* to = y(r);
      if (block == mine.begin / kBlock) {
        top[r] = other;
        total[r] = weight;
        std::memcpy(to, sums, size * sizeof(float));
      } else if (other > top[r]) {
        const Vec factor = exp2(Vec{} + (top[r] - other));
        top[r] = other;
        total[r] = total[r] * factor[0] + weight;
        for (int64_t d = 0; d < size; d += kLanes) store(to + d, fma(load(to + d), factor, load(sums + d)));
      } else {
        const Vec factor = exp2(Vec{} + (other - top[r]));
        total[r] += weight * factor[0];
        for (int64_t d = 0; d < size; d += kLanes) store(to + d, fma(load(sums + d), factor, load(to + d)));
      }
    }
  }

  __attribute__((noinline)) void finish() {
    for (int64_t r = 0; r < task.rows(); ++r) {
      float scale = 1;
      if (call.sinks) {  // an entry with this score and no value
        const float sink = call.sinks[task.head + r % task.heads] * kLog2e;
        if (sink > top[r]) {
          scale = exp2(Vec{} + (top[r] - sink))[0];
          total[r] = total[r] * scale + 1;
        } else {
          total[r] += exp2(Vec{} + (sink - top[r]))[0];
        }
      }
      float* to = y(r);
      const float factor = scale / total[r];
      for (int64_t d = 0; d < call.value_dim; d += kLanes) store(to + d, load(to + d) * factor);
    }
  }
};

}  // namespace moevlm::attention::MOEVLM_ISA
