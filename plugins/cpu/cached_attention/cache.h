// Rows of a cache, and what is written into them. Included by kernels.h, once per instruction set.

#pragma once

#include <cmath>
#include <cstring>

#include "cached_attention/attention.h"
#include "simd/vector.h"

namespace moevlm::MOEVLM_ISA {

// The rows of one head's cache: each either head_dim floats, or head_dim int8 and their scale.
template <class T>
struct Rows {
  static constexpr bool quantized = sizeof(T) == 1;

  T* first;
  int64_t stride;  // in elements

  Rows(const Attention& call, void* cache, int64_t sequence, int64_t kv_head)
    : stride(quantized ? call.head_dim + 4 : call.head_dim) {
    first = static_cast<T*>(cache) + (sequence * call.kv_heads + kv_head) * call.capacity * stride;
  }

  T* row(int64_t entry) const { return first + entry * stride; }

  float scale(int64_t entry) const {
    if constexpr (!quantized) return 1;
    float value;
    std::memcpy(&value, row(entry) + stride - 4, sizeof value);
    return value;
  }
};

// out = x, normalised if there are weights, rotated, and scaled.
inline void prepare(
  const Attention& call, const float* x, const float* norm, int64_t row, float scale, float* __restrict out) {
  const int64_t size = call.head_dim, half = call.rotary_dim / 2;
  if (norm) {
    Vec squares = {};
    for (int64_t d = 0; d < size; d += kLanes) squares += load(x + d) * load(x + d);
    const float factor = scale / std::sqrt(sum(squares) / static_cast<float>(size) + call.epsilon);
    for (int64_t d = 0; d < size; d += kLanes) store(out + d, load(x + d) * factor * load(norm + d));
  } else {
    for (int64_t d = 0; d < size; d += kLanes) store(out + d, load(x + d) * scale);
  }
  const float *cos = call.cos + row * half, *sin = call.sin + row * half;
  float* __restrict upper = out + half;
  for (int64_t d = 0; d < half; ++d) {
    const float a = out[d], b = upper[d];
    out[d] = a * cos[d] - b * sin[d];
    upper[d] = b * cos[d] + a * sin[d];
  }
}

inline void write_row(const float* x, int64_t size, float* row) { std::memcpy(row, x, size * sizeof(float)); }

inline void write_row(const float* x, int64_t size, int8_t* row) {
  Ints top = {};
  for (int64_t d = 0; d < size; d += kLanes) {
    const Ints next = magnitude(load(x + d));
    top = next > top ? next : top;
  }
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits = top[i] > bits ? top[i] : bits;
  float most;  // NaN if there is one, which the scale carries to the result
  std::memcpy(&most, &bits, sizeof most);
  const float scale = most / 127, inverse = most > 1e-35f ? 127 / most : 0;
  for (int64_t d = 0; d < size; ++d) {
    const float value = x[d] * inverse, low = value > -127 ? value : -127;  // -127 of NaN, which has no integer
    row[d] = static_cast<int8_t>(std::nearbyint(low < 127 ? low : 127));
  }
  std::memcpy(row + size, &scale, sizeof scale);
}

template <class T>
void append(const Attention& call, int64_t sequence, int64_t kv_head, int64_t token, int64_t tokens) {
  const Rows<T> keys(call, call.key, sequence, kv_head), values(call, call.value, sequence, kv_head);
  const int64_t width = (call.heads + 2 * call.kv_heads) * call.head_dim;
  for (int64_t s = token; s < token + tokens; ++s) {
    const int64_t row = sequence * call.length + s, entry = call.position[sequence] + s;
    const float* k = call.qkv + row * width + (call.heads + kv_head) * call.head_dim;
    alignas(64) float rotated[kMaxHeadDim];
    prepare(call, k, call.k_norm, row, 1, rotated);
    write_row(rotated, call.head_dim, keys.row(entry));
    write_row(k + call.kv_heads * call.head_dim, call.head_dim, values.row(entry));
  }
}

}  // namespace moevlm::MOEVLM_ISA
