// Everything but the products, included once per instruction set. A row's result depends on the row alone.
#pragma once

#include "matmul/kernels.h"
#include "simd/vector.h"

namespace moevlm::matmul::MOEVLM_ISA {

using namespace moevlm::MOEVLM_ISA;

// a * b + c rounded once, on every processor. Without an instruction for it that takes a function call a lane.
MOEVLM_INLINE Vec fused(Vec a, Vec b, Vec c) {
#if defined(__x86_64__) && MOEVLM_LANES == 4
  for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return fma(a, b, c);
#endif
}

// numpy's float32 exp (a rational approximation after Cody-Waite reduction), operation by operation, so that router
// scores have the bits that the reference's have wherever numpy has its vector loops.
MOEVLM_INLINE Vec exp(Vec x) {
  const Vec one = Vec{} + 1.0f;
  const Vec inside = larger(Vec{} - 103.97208404541015625f, smaller(Vec{} + 88.72283935546875f, x));  // NaN stays
  const Vec n = nearest(inside * 1.442695040888963407359924681001892137f);
  Vec r = fused(n, Vec{} - 6.93145752e-1f, inside);
  r = fused(n, Vec{} - 1.42860677e-6f, r);
  Vec p = fused(Vec{} + 5.082762527590693718096e-04f, r, Vec{} + 6.757896990527504603057e-03f);
  p = fused(p, r, Vec{} + 5.114512081637298353406e-02f);
  p = fused(p, r, Vec{} + 2.473615434895520810817e-01f);
  p = fused(p, r, Vec{} + 7.257664613233124478488e-01f);
  p = fused(p, r, Vec{} + 9.999999999980870924916e-01f);
  Vec q = fused(Vec{} + 2.159509375685829852307e-02f, r, Vec{} - 2.742335390411667452936e-01f);
  q = fused(q, r, one);
  return times_power_of_two(p / q, n);
}

MOEVLM_INLINE Vec logistic(Vec x) { return 1.0f / (1.0f + exp(0.0f - x)); }

// One group of a row of activations, see packing.h.
inline void quantize_group(const float* x, Packing packing, uint8_t* out) {
  const int size = packing.group_size;
  Ints most = {};
  for (int i = 0; i < size; i += kLanes) most = larger(most, magnitude(load(x + i)));
  const float absmax = largest_magnitude(most);  // NaN if there is one, which the scale carries to the result
  const float scale = absmax / 127.0f * packing.unit(), inverse = absmax < 1e-35f ? 0.0f : 127.0f / absmax;
  Vec total = {};
  for (int i = 0; i < size; i += kLanes) {
    const Vec q = nearest(load(x + i) * inverse);
    total += q;
    store_int8(reinterpret_cast<int8_t*>(out + kActivationHeader + i), q);
  }
  const float sum_of_q = sum(total);
  const int32_t start = sum_of_q == sum_of_q ? -packing.zero_point() * static_cast<int32_t>(sum_of_q) : 0;
  std::memcpy(out, &scale, 4);
  std::memcpy(out + 4, &start, 4);
}

inline void quantize(const float* x, int64_t k, Packing packing, uint8_t* row) {
  const int64_t size = packing.group_size;
  int64_t done = 0;
  for (; done + size <= k; done += size, row += size + kActivationHeader) quantize_group(x + done, packing, row);
  if (done < k) {
    alignas(64) float rest[kMaxGroup] = {};
    std::memcpy(rest, x + done, (k - done) * sizeof(float));
    quantize_group(rest, packing, row);
  }
}

MOEVLM_INLINE Vec activation(Vec gate, const ActivationSpec& spec) {
  if (spec.kind == Activation::silu) return gate * logistic(gate);
  // 0.5 (1 + tanh(z)) = logistic(2 z)
  const Vec z = fma(Vec{} + 0.044715f, gate * gate * gate, gate);
  return gate * logistic(z * 1.5957691216057308f);
}

inline void activate(const float* out, const float* bias, float factor, const ActivationSpec& spec, float* channels) {
  constexpr int half = kPanel / 2;
  const auto value = [&](int i) { return fma(Vec{} + factor, load(out + i), load(bias + i)); };
  if (!spec.gated) {
    for (int i = 0; i < kPanel; i += kLanes) store(channels + i, activation(value(i), spec));
  } else if (spec.kind != Activation::swiglu_clamped) {
    for (int i = 0; i < half; i += kLanes) store(channels + i, activation(value(i), spec) * value(half + i));
  } else {
    const Vec limit = Vec{} + spec.limit;
    for (int i = 0; i < half; i += kLanes) {
      const Vec gate = smaller(limit, value(i)), up = larger(-limit, smaller(limit, value(half + i)));
      store(channels + i, gate * logistic(spec.alpha * gate) * (up + 1.0f));
    }
  }
}

inline void store_row(const float* out, const float* bias, int count, float* y) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(y + i, load(out + i) + load(bias + i));
  for (; i < count; ++i) y[i] = out[i] + bias[i];
}

inline void accumulate_row(const float* out, const float* bias, float weight, int count, float* y) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes)
    store(y + i, fma(Vec{} + weight, load(out + i) + load(bias + i), load(y + i)));
  for (; i < count; ++i) y[i] += weight * (out[i] + bias[i]);
}

// f over x in place; a rest shorter than a vector goes through a padded copy.
template <class F>
MOEVLM_INLINE void map(float* x, int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, f(load(x + i)));
  if (i < n) {
    float rest[kLanes] = {};
    std::memcpy(rest, x + i, (n - i) * sizeof(float));
    store(rest, f(load(rest)));
    std::memcpy(x + i, rest, (n - i) * sizeof(float));
  }
}

// numpy's pairwise summation: eight running sums up to 128 values, halves above.
inline float pairwise_sum(const float* x, int64_t n) {
  if (n < 8) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; ++i) sum += x[i];
    return sum;
  }
  if (n > 128) {
    const int64_t half = n / 2 - n / 2 % 8;
    return pairwise_sum(x, half) + pairwise_sum(x + half, n - half);
  }
  float s[8];
  std::memcpy(s, x, sizeof(s));
  int64_t i = 8;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; ++j) s[j] += x[i + j];
  float sum = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
  for (; i < n; ++i) sum += x[i];
  return sum;
}

inline void softmax(float* x, int64_t n) {
  float most = x[0];
  for (int64_t i = 1; i < n; ++i) most = most < x[i] ? x[i] : most;
  map(x, n, [most](Vec v) { return exp(v - most); });
  const float sum = pairwise_sum(x, n);
  map(x, n, [sum](Vec v) { return v / sum; });
}

inline void sigmoid(float* x, int64_t n) {
  const Vec one = Vec{} + 1.0f;
  map(x, n, [one](Vec v) {
    const Vec small = exp(-absolute(v));
    return (v >= 0.0f ? one : small) / (one + small);
  });
}

}  // namespace moevlm::matmul::MOEVLM_ISA
