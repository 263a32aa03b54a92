// New tokens on their way into the pages. Included by kernels.h, once per instruction set.

#pragma once

#include <cmath>

#include "attention/convert.h"

namespace moevlm::attention::MOEVLM_ISA {

MOEVLM_INLINE float root_mean_square(const float* x, int64_t size, float epsilon) {
  Vec squares = {};
  for (int64_t d = 0; d < size; d += kLanes) squares = fma(load(x + d), load(x + d), squares);
  return std::sqrt(sum(squares) / static_cast<float>(size) + epsilon);
}

// out = x [size], normalised without a gain.
__attribute__((noinline)) inline void normalize(const float* x, int64_t size, float epsilon, float* out) {
  const float factor = 1 / root_mean_square(x, size, epsilon);
  for (int64_t d = 0; d < size; d += kLanes) store(out + d, load(x + d) * factor);
}

// out = x [key_dim] of a token, normalised if there are weights, rotated, and scaled. Not inlined: of every path of the
// code there is one copy, and one order of sums.
__attribute__((noinline)) inline void prepare(
    const Call& call, const float* x, const float* norm, int64_t token, float scale, float* out) {
  const int64_t size = call.key_dim, half = call.rotary_dim / 2;
  if (norm) {
    const float factor = scale / root_mean_square(x, size, call.epsilon);
    for (int64_t d = 0; d < size; d += kLanes) store(out + d, load(x + d) * factor * load(norm + d));
  } else {
    for (int64_t d = 0; d < size; d += kLanes) store(out + d, load(x + d) * scale);
  }
  if (half == 0) return;
  const float *cos = call.cos + token * half, *sin = call.sin + token * half;
  float *lower = out + call.rotary_start, *upper = lower + half;
  int64_t d = 0;
  for (; d + kLanes <= half; d += kLanes) {
    const Vec a = load(lower + d), b = load(upper + d), c = load(cos + d), s = load(sin + d);
    store(lower + d, fma(a, c, -(b * s)));
    store(upper + d, fma(b, c, a * s));
  }
  for (; d < half; ++d) {
    const float a = lower[d], b = upper[d];
    lower[d] = a * cos[d] - b * sin[d];
    upper[d] = b * cos[d] + a * sin[d];
  }
}

// row = x as int8, symmetric; returns the scale.
inline float quantize(const float* x, int64_t size, int8_t* row) {
  Ints top = {};
  for (int64_t d = 0; d < size; d += kLanes) top = larger(top, magnitude(load(x + d)));
  const float most = largest_magnitude(top);  // NaN if there is one, which the scale carries to the result
  const float scale = most / 127, inverse = most > 1e-35f ? 127 / most : 0;
  for (int64_t d = 0; d < size; d += kLanes) {
    const Vec low = larger(load(x + d) * inverse, broadcast(-127));  // of NaN, which has no integer
    store_int8(row + d, nearest(smaller(low, broadcast(127))));
  }
  return scale;
}

// The new tokens at entries `begin` to `end`, all in one strip.
template <class T>
void append_strip(const Call& call, int64_t sequence, int64_t kv_head, int64_t begin, int64_t end) {
  const Pages<T> keys(call, call.key, call.key_dim, sequence, kv_head);
  const int64_t first = begin / kStrip * kStrip, lane = begin - first, count = end - begin;
  const int64_t token = call.query_start[sequence] + begin - call.context_len[sequence];
  const float* row = call.qkv + token * call.width() + (call.heads + kv_head) * call.key_dim;
  T* const key_strip = keys.strip(first / call.page, first % call.page);
  alignas(64) float rows[kStrip * kMaxKeyDim];
  for (int64_t j = 0; j < count; ++j) {
    prepare(call, row + j * call.width(), call.k_norm, token + j, 1, rows + j * call.key_dim);
  }
  if constexpr (Pages<T>::quantized) {
    alignas(64) int8_t bytes[kMaxKeyDim];
    for (int64_t j = 0; j < count; ++j) {
      const float scale = quantize(rows + j * call.key_dim, call.key_dim, bytes);
      for (int64_t d = 0; d < call.key_dim; ++d) key_strip[d * kStrip + lane + j] = bytes[d];
      std::memcpy(keys.scales(key_strip) + 4 * (lane + j), &scale, sizeof scale);
    }
  } else {
    write_columns(rows, call.key_dim, lane, count, key_strip);
  }
  if (call.value_in_key) return;
  const Pages<T> values(call, call.value, call.value_dim, sequence, kv_head);
  T* const value_strip = values.strip(first / call.page, first % call.page);
  if (!call.value_is_key) {
    row = call.qkv + token * call.width() + (call.heads + call.kv_heads) * call.key_dim + kv_head * call.value_dim;
  }
  for (int64_t j = 0; j < count; ++j, row += call.width()) {
    T* const to = value_strip + (lane + j) * call.value_dim;
    const float* value = row;
    if (call.value_norm) {
      normalize(row, call.value_dim, call.epsilon, rows);
      value = rows;
    }
    if constexpr (Pages<T>::quantized) {
      const float scale = quantize(value, call.value_dim, to);
      std::memcpy(values.scales(value_strip) + 4 * (lane + j), &scale, sizeof scale);
    } else {
      std::memcpy(to, value, call.value_dim * sizeof(float));
    }
  }
}

// The new tokens at entries `begin` to `end`.
template <class T>
void append(const Call& call, int64_t sequence, int64_t kv_head, int64_t begin, int64_t end) {
  for (int64_t next; begin < end; begin = next) {
    next = (begin / kStrip + 1) * kStrip;
    append_strip<T>(call, sequence, kv_head, begin, next < end ? next : end);
  }
}

}  // namespace moevlm::attention::MOEVLM_ISA
