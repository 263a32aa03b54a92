// From one layout to another, as strips of keys and register tiles want it, and from bytes to floats. Included by
// kernels.h, once per instruction set.

#pragma once

#include "attention/pages.h"

namespace moevlm::attention::MOEVLM_ISA {

// floats[n] = bytes[n], n a multiple of kLanes.
inline void widen(const int8_t* bytes, int64_t n, float* floats) {
  for (int64_t i = 0; i < n; i += kLanes) store(floats + i, load(bytes + i));
}

// strip[dim][lane + j] = rows[j], for j < count.
inline void write_columns(const float* rows, int64_t dim, int64_t lane, int64_t count, float* strip) {
  if (count < kStrip) {
    for (int64_t d = 0; d < dim; ++d) {
      for (int64_t j = 0; j < count; ++j) strip[d * kStrip + lane + j] = rows[j * dim + d];
    }
    return;
  }
  for (int64_t first = 0; first < kStrip; first += kLanes) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      Vec square[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) square[j] = load(rows + (first + j) * dim + d);
      transpose(square);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) store(strip + (d + j) * kStrip + first, square[j]);
    }
  }
}

// values[kStrip][dim] = the first dim lines of a strip of keys, [dim][kStrip], transposed.
template <class T>
void transpose_strip(const T* keys, int64_t dim, float* values) {
  for (int64_t first = 0; first < kStrip; first += kLanes) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      Vec square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) square[i] = load(keys + (d + i) * kStrip + first);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(values + (first + i) * dim + d, square[i]);
    }
  }
}

// to[dim][m] = rows[m][dim] transposed. Writes up to kLanes floats too many.
inline void interleave(const float* rows, int64_t dim, int64_t m, float* to) {
  if constexpr (kTileM <= kLanes) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      Vec square[kLanes] = {};
#pragma GCC unroll 16
      for (int j = 0; j < kTileM; ++j) square[j] = j < m ? load(rows + j * dim + d) : Vec{};
      transpose(square);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) store(to + (d + j) * m, square[j]);
    }
  } else {
    for (int64_t j = 0; j < m; ++j) {
      for (int64_t d = 0; d < dim; ++d) to[d * m + j] = rows[j * dim + d];
    }
  }
}

}  // namespace moevlm::attention::MOEVLM_ISA
