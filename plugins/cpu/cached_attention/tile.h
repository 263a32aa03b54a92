// The rows of a task and their online softmax. Included by kernels.h, once per instruction set.

#pragma once

#include "cached_attention/cache.h"

namespace moevlm::MOEVLM_ISA {

constexpr float kNothing = -1e30f;  // the score of an entry that a row does not see: its weight is exactly 0

// The rows of a task: their queries, and what is known of their result so far.
struct Tile {
  int64_t rows;  // the heads of a token, token by token
  int64_t size;  // head_dim
  alignas(64) float q[kTileFloats];
  alignas(64) float sums[kTileFloats];
  float top[kTileRows];   // maximum score
  float total[kTileRows]; // sum of weights

  // Queries are scaled so that scores are powers of two. Rows from `rows` on, up to the next multiple of the
  // register tile's, are zero.
  void fill(const Attention& call, const Task& task, int64_t padded) {
    const int64_t width = (call.heads + 2 * call.kv_heads) * call.head_dim;
    rows = task.rows();
    size = call.head_dim;
    const float scale = 1.44269504f / std::sqrt(static_cast<float>(size));
    for (int64_t t = 0; t < task.tokens; ++t) {
      const int64_t row = task.sequence * call.length + task.token + t;
      for (int64_t h = 0; h < task.heads; ++h) {
        const float* x = call.qkv + row * width + (task.head + h) * size;
        prepare(call, x, call.q_norm, row, scale, q + (t * task.heads + h) * size);
      }
    }
    std::memset(q + rows * size, 0, (padded - rows) * size * sizeof(float));
    std::memset(sums, 0, padded * size * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) {
      top[r] = kNothing;
      total[r] = 0;
    }
  }

  // Turns a block's scores of a row into weights, and rescales what was summed before. `seen` of `padded` scores
  // count. key_scale and value_scale belong to an int8 cache.
  template <bool Quantized>
  void weigh(int64_t row, float* scores, int64_t seen, int64_t padded, const float* key_scale,
             const float* value_scale) {
    if (Quantized) {
      for (int64_t j = 0; j < seen; j += kLanes) store(scores + j, load(scores + j) * load(key_scale + j));
    }
    for (int64_t j = seen > 0 ? seen : 0; j < padded; ++j) scores[j] = kNothing;
    Vec maximum = Vec{} + top[row];
    for (int64_t j = 0; j < padded; j += kLanes) maximum = larger(maximum, load(scores + j));
    const float before = top[row], now = largest(maximum);
    if (now <= kNothing) {  // the row sees none of the block
      for (int64_t j = 0; j < padded; j += kLanes) store(scores + j, Vec{});
      return;
    }
    Vec sums_of_weights = {};
    for (int64_t j = 0; j < padded; j += kLanes) {
      const Vec weight = exp2(load(scores + j) - now);
      sums_of_weights += weight;
      store(scores + j, Quantized ? weight * load(value_scale + j) : weight);
    }
    if (now > before) {
      const float factor = exp2(Vec{} + (before - now))[0];
      total[row] *= factor;
      for (int64_t d = 0; d < size; d += kLanes) store(sums + row * size + d, load(sums + row * size + d) * factor);
    }
    top[row] = now;
    total[row] += sum(sums_of_weights);
  }

  void finish(const Attention& call, const Task& task) const {
    if (task.partial) {
      std::memcpy(task.partial, sums, rows * size * sizeof(float));
      std::memcpy(task.partial + rows * size, top, rows * sizeof(float));
      std::memcpy(task.partial + rows * (size + 1), total, rows * sizeof(float));
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = task.sequence * call.length + task.token + r / task.heads;
      float* y = call.y + (row * call.heads + task.head + r % task.heads) * size;
      const float factor = 1 / total[r];
      for (int64_t d = 0; d < size; d += kLanes) store(y + d, load(sums + r * size + d) * factor);
    }
  }
};

inline void combine(const Attention& call, const Task& task, const float* partials, int64_t count) {
  const int64_t size = call.head_dim, rows = task.rows();
  const int64_t apart = Partial::floats(rows, size);
  for (int64_t r = 0; r < rows; ++r) {
    float top = kNothing;
    for (int64_t i = 0; i < count; ++i) {
      const float other = partials[i * apart + rows * size + r];
      top = other > top ? other : top;
    }
    const int64_t row = task.sequence * call.length + task.token + r / task.heads;
    float* y = call.y + (row * call.heads + task.head + r % task.heads) * size;
    float total = 0;
    for (int64_t d = 0; d < size; d += kLanes) store(y + d, Vec{});
    for (int64_t i = 0; i < count; ++i) {
      const float* partial = partials + i * apart;
      const float factor = exp2(Vec{} + (partial[rows * size + r] - top))[0];
      total += factor * partial[rows * (size + 1) + r];
      for (int64_t d = 0; d < size; d += kLanes) store(y + d, load(y + d) + load(partial + r * size + d) * factor);
    }
    const float factor = 1 / total;
    for (int64_t d = 0; d < size; d += kLanes) store(y + d, load(y + d) * factor);
  }
}

}  // namespace moevlm::MOEVLM_ISA
