// Decoding: a task with few rows waits for memory. It reads each key and value once, in the cache's order, for all rows.
// Included by kernels.h, once per instruction set.

#pragma once

#include "cached_attention/tile.h"

namespace moevlm::MOEVLM_ISA {

constexpr int64_t kFewRows = 16, kFewRowsBlock = 256;
static_assert(kFewRows <= kTileRows && kFewRows * kMaxHeadDim <= kTileFloats && kFewRowsBlock % kLanes == 0);
// Rows of float fill whole lines and processors foresee them, read in order: read side by side, they came at half the
// bandwidth. Rows of int8 end within a line and take longer to multiply than to fetch: they are read side by side, and
// asked for so many bytes ahead.
constexpr int64_t kAhead = 16384;

template <int N>
struct Constant {
  static constexpr int value = N;
};

// scores[M][count] = q[M][size] . keys. May write up to kLanes - 1 scores too many.
template <int M, class T>
MOEVLM_INLINE void dot(const float* q, const T* keys, int64_t stride, int64_t count, int64_t size, float* scores, int64_t ahead) {
  constexpr int K = kLanes / M;
  for (int64_t j = 0; j < count; j += K) {
    const T* key[K];
    Vec sums[kLanes] = {};
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) key[k] = keys + (j + k < count ? j + k : count - 1) * stride;
    if constexpr (sizeof(T) == 1) {
      for (int64_t d = 0; d < size; d += kLanes) {
        Vec x[K];
#pragma GCC unroll 16
        for (int k = 0; k < K; ++k) x[k] = load(key[k] + d);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const Vec row = load(q + m * size + d);
#pragma GCC unroll 16
          for (int k = 0; k < K; ++k) sums[m * K + k] += row * x[k];
        }
      }
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) {
        for (int64_t d = 0; d < size; d += 64) prefetch(key[k] + d, kAhead);
      }
    } else {
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) {
        for (int64_t d = 0; d < size; d += kLanes) {
          const Vec x = load(key[k] + d);
#pragma GCC unroll 16
          for (int m = 0; m < M; ++m) sums[m * K + k] += load(q + m * size + d) * x;
        }
      }
    }
    alignas(64) float result[kLanes];
    store(result, lane_sums(sums));
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) std::memcpy(scores + m * ahead + j, result + m * K, K * sizeof(float));
  }
}

// sums[M][size] += weights[M][count] times values[count][size], in strips of as many vectors as registers hold.
template <int M, int N, int64_t Ahead, class T>
MOEVLM_INLINE void add_values(const float* weights, int64_t weights_stride, const T* values, int64_t stride, int64_t count,
        int64_t size, float* sums) {
  int64_t d = 0;
  for (; d + N * kLanes <= size; d += N * kLanes) {
    multiply<M, N, true, Ahead>(weights, weights_stride, values + d, stride, sums + d, size, count);
  }
  for (; d < size; d += kLanes) {
    multiply<M, 1, true, Ahead>(weights, weights_stride, values + d, stride, sums + d, size, count);
  }
}

// Size is head_dim, so that loops over it have no ends to find at run time; 0: any.
template <class T, int64_t Size>
void attend_few_rows(const Attention& call, const Task& task) {
  const Rows<T> keys(call, call.key, task.sequence, task.kv_head), values(call, call.value, task.sequence, task.kv_head);
  constexpr int64_t ahead = kFewRowsBlock + kLanes;
  Tile tile;
  alignas(64) float scores[kFewRows * ahead], key_scale[kFewRowsBlock], value_scale[kFewRowsBlock];
  tile.fill(call, task, task.rows());
  const int64_t size = Size ? Size : call.head_dim;
  for (int64_t begin = task.begin; begin < task.end; begin += kFewRowsBlock) {
    const int64_t count = task.end - begin < kFewRowsBlock ? task.end - begin : kFewRowsBlock;
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    int64_t r = 0;
    const auto dots = [&](auto m) {
      constexpr int M = decltype(m)::value;
      for (; r + M <= tile.rows; r += M) {
        dot<M>(tile.q + r * size, keys.row(begin), keys.stride, count, size, scores + r * ahead, ahead);
      }
    };
    if constexpr (kLanes >= 4) dots(Constant<4>());
    dots(Constant<2>()), dots(Constant<1>());
    if (Rows<T>::quantized) {
      for (int64_t j = 0; j < padded; ++j) {
        key_scale[j] = j < count ? keys.scale(begin + j) : 0;
        value_scale[j] = j < count ? values.scale(begin + j) : 0;
      }
    }
    for (r = 0; r < tile.rows; ++r) {
      const int64_t last = call.position[task.sequence] + task.token + r / task.heads;
      const int64_t seen = last + 1 - begin < count ? last + 1 - begin : count;
      tile.weigh<Rows<T>::quantized>(r, scores + r * ahead, seen, padded, key_scale, value_scale);
    }
    // Few enough values at a time that all rows find them in the first-level cache.
    constexpr int64_t some = 32;
    constexpr int sums = kLanes == 16 ? 16 : 8;  // vectors of the result in registers
    for (int64_t j = 0; j < count; j += some) {
      const int64_t part = count - j < some ? count - j : some;
      const T* first = values.row(begin + j);
      r = 0;
      const auto add = [&](auto m, auto n) {
        constexpr int M = decltype(m)::value, N = decltype(n)::value;
        for (; r + M <= tile.rows; r += M) {
          const float* weights = scores + r * ahead + j;
          float* result = tile.sums + r * size;
          if (Rows<T>::quantized && r == 0) {
            add_values<M, N, kAhead>(weights, ahead, first, values.stride, part, size, result);
          } else {
            add_values<M, N, 0>(weights, ahead, first, values.stride, part, size, result);
          }
        }
      };
      // Two rows rather than four where that takes a value of floats from end to end, in order.
      if (Rows<T>::quantized || size < sums / 2 * kLanes) add(Constant<4>(), Constant<sums / 4>());
      add(Constant<2>(), Constant<sums / 2>()), add(Constant<1>(), Constant<sums>());
    }
  }
  tile.finish(call, task);
}

}  // namespace moevlm::MOEVLM_ISA
