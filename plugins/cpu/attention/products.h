// The two products of attention in tiles of registers: M rows against N vectors at a time. Every result is a chain of
// multiply-adds of its own, so neither M nor N changes a bit. Included by kernels.h, once per instruction set.

#pragma once

#include "attention/pages.h"

namespace moevlm::attention::MOEVLM_ISA {

constexpr int64_t kDepth = 64;  // dimensions in one chain of a score: the rounding of longer ones shows

using moevlm::MOEVLM_ISA::larger;

// Not std::min and std::max: the linker keeps one copy of those, for whatever processor it was compiled.
MOEVLM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
MOEVLM_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Entries, of a sequence or of a block, from begin up to end.
struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
  Range within(Range other) const { return {larger(begin, other.begin), smaller(end, other.end)}; }
};

// A power of two of vectors, so that M times as many sums, a vector each, and one factor fit the registers.
constexpr int vectors(int m, int most) {
  int n = most;
  while (n > 1 && m * n + n + 1 > MOEVLM_REGISTERS) n /= 2;
  return n;
}

// M rows of a tile: their queries [dim][M], where their scores begin, what each sees of the block.
struct Rows {
  const float* q;
  float* scores;      // [M][kBlock]; after the softmax, weights
  float* sums;        // [M][value_dim]
  const Range* seen;  // [M]
  Range any, all;     // what one of them sees, and what each of them does
};

// A strip of keys or values, floats or bytes, and the one to fetch from memory meanwhile.
template <class T>
struct Strip {
  const T* at;
  const T* ahead;
};

template <int M, int N, class T>
MOEVLM_INLINE void score(const float* q, int64_t dim, const Strip<T>* key, float* scores) {
  constexpr int line_vectors = kStrip / kLanes;
  constexpr int64_t memory_line = 64 / (kStrip * sizeof(T));  // dimensions
  for (int64_t begin = 0; begin < dim; begin += kDepth) {
    const int64_t end = smaller(begin + kDepth, dim);
    Vec sums[M][N] = {};
    for (int64_t d = begin; d < end; ++d) {
      Vec line[N];
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        line[n] = load(key[n].at + d * kStrip);
        if (n % line_vectors == 0 && d % memory_line == 0) prefetch(key[n].ahead + d * kStrip, 0);
      }
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Vec factor = broadcast(q[d * M + m]);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[m][n] = fma(line[n], factor, sums[m][n]);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        float* to = scores + m * kBlock + n * kLanes;
        store(to, begin ? load(to) + sums[m][n] : sums[m][n]);
      }
    }
  }
  if (sizeof(T) == 1) {
    for (int n = 0; n < N; n += line_vectors) prefetch(key[n].ahead + dim * kStrip, 0);  // scales
  }
}

// scores[M][kStrip * count] = q . keys, which are `count` strips.
template <int M, class T>
void score_strips(const float* q, int64_t dim, const Strip<T>* strips, int64_t count, float* scores) {
  constexpr int N = vectors(M, 4);
  const int64_t total = count * (kStrip / kLanes);
  const auto vector = [&](int64_t v) -> Strip<T> {
    const Strip<T>& strip = strips[v * kLanes / kStrip];
    return {strip.at + v * kLanes % kStrip, strip.ahead};
  };
  int64_t v = 0;
  for (; v + N <= total; v += N) {
    Strip<T> key[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) key[n] = vector(v + n);
    score<M, N>(q, dim, key, scores + v * kLanes);
  }
  for (; v < total; ++v) {
    const Strip<T> key = vector(v);
    score<M, 1>(q, dim, &key, scores + v * kLanes);
  }
}

// N vectors of dimensions, from `column` on. What a row does not see is not multiplied: 0 times NaN is NaN.
template <int M, int N, class T>
MOEVLM_INLINE void add_columns(const Rows& rows, Range part, const Strip<T>* strips, int64_t dim, int64_t column) {
  Vec sums[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sums[m][n] = load(rows.sums + m * dim + column + n * kLanes);
  }
  const auto add_some = [&](int64_t begin, int64_t end) {
    for (int64_t entry = begin; entry < end; ++entry) {
      const T* line = strips[entry / kStrip].at + entry % kStrip * dim + column;
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        if (entry < rows.seen[m].begin || entry >= rows.seen[m].end) continue;
        const Vec factor = broadcast(rows.scores[m * kBlock + entry]);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[m][n] = fma(load(line + n * kLanes), factor, sums[m][n]);
      }
    }
  };
  const Range any = rows.any.within(part), all = rows.all.within(part);
  if (M == 1 || !all.empty()) {
    if (M > 1) add_some(any.begin, all.begin);
    for (int64_t entry = all.begin; entry < all.end;) {
      const Strip<T>& strip = strips[entry / kStrip];
      const int64_t offset = entry % kStrip * dim + column;
      const T *line = strip.at + offset, *ahead = strip.ahead + offset;
      const int64_t end = smaller((entry / kStrip + 1) * kStrip, all.end);
      if (sizeof(T) == 1 && column == 0) prefetch(strip.ahead + kStrip * dim, 0);  // scales
      for (; entry < end; ++entry, line += dim, ahead += dim) {
        Vec value[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
          value[n] = load(line + n * kLanes);
          if (n * kLanes * sizeof(T) % 64 == 0) prefetch(ahead + n * kLanes, 0);
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const Vec factor = broadcast(rows.scores[m * kBlock + entry]);
#pragma GCC unroll 16
          for (int n = 0; n < N; ++n) sums[m][n] = fma(value[n], factor, sums[m][n]);
        }
      }
    }
    if (M > 1) add_some(all.end, any.end);
  } else {
    add_some(any.begin, any.end);
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) store(rows.sums + m * dim + column + n * kLanes, sums[m][n]);
  }
}

// sums[M][dim] += weights times values, for the block's entries in `part`. strips: [kBlockStrips].
template <int M, class T>
void add_values(const Rows& rows, Range part, const Strip<T>* strips, int64_t dim) {
  constexpr int N = vectors(M, 8);
  int64_t column = 0;
  for (; column + N * kLanes <= dim; column += N * kLanes) add_columns<M, N>(rows, part, strips, dim, column);
  for (; column < dim; column += kLanes) add_columns<M, 1>(rows, part, strips, dim, column);
}

// The kernels of m rows are at m - 1.
template <class T, int... M>
struct Table {
  static constexpr void (*scores[])(const float*, int64_t, const Strip<T>*, int64_t, float*) = {score_strips<M, T>...};
  static constexpr void (*values[])(const Rows&, Range, const Strip<T>*, int64_t) = {add_values<M, T>...};
};
#if MOEVLM_TILE_M == 12
template <class T>
using Kernel = Table<T, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12>;
#else
template <class T>
using Kernel = Table<T, 1, 2, 3, 4, 5, 6>;
#endif

}  // namespace moevlm::attention::MOEVLM_ISA
