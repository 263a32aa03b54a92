// Vectors of MOEVLM_LANES floats in the compilers' portable notation, within a namespace per instruction set.

#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define MOEVLM_INLINE inline __attribute__((always_inline))

namespace moevlm::MOEVLM_ISA {

constexpr int kLanes = MOEVLM_LANES;
typedef float Vec __attribute__((vector_size(MOEVLM_LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(MOEVLM_LANES * 4)));
typedef uint32_t Bits __attribute__((vector_size(MOEVLM_LANES * 4)));
typedef int8_t Bytes __attribute__((vector_size(MOEVLM_LANES)));

MOEVLM_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

MOEVLM_INLINE Vec load(const int8_t* p) {
#if MOEVLM_LANES == 16 && defined(__x86_64__)  // GCC 12 would widen the bytes one by one
  return __builtin_convertvector(
      (Ints)_mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), Vec);
#elif MOEVLM_LANES == 8 && defined(__x86_64__)
  return __builtin_convertvector((Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), Vec);
#else
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, Ints), Vec);
#endif
}

// Asks for the vector at p, some time before it is loaded. p may be anywhere.
MOEVLM_INLINE void prefetch(const void* p, int64_t bytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + bytes), 0, 3);
}

MOEVLM_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// Minus zero is minus zero still, unlike after `Vec{} + x`, for which compilers add.
MOEVLM_INLINE Vec broadcast(float x) { return x - Vec{}; }

// a * b + c, rounded once where the instruction set can: a compiler that is left to contract expressions may do so in
// one copy of a loop and not in another.
MOEVLM_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if MOEVLM_LANES == 16 && defined(__x86_64__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif MOEVLM_LANES == 8 && defined(__x86_64__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif MOEVLM_LANES == 4 && defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#elif MOEVLM_LANES == 2 && defined(__aarch64__)
  return (Vec)vfma_f32((float32x2_t)c, (float32x2_t)a, (float32x2_t)b);
#else
  return a * b + c;  // in two instructions
#endif
}

// Where one is NaN: b.
MOEVLM_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
MOEVLM_INLINE Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
MOEVLM_INLINE Ints larger(Ints a, Ints b) { return a > b ? a : b; }

// The nearest integer, even where two are as near; |x| < 2^22.
MOEVLM_INLINE Vec nearest(Vec x) {
#if MOEVLM_LANES == 16 && defined(__x86_64__)
  return (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif MOEVLM_LANES == 8 && defined(__x86_64__)
  return (Vec)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif MOEVLM_LANES == 4 && defined(__aarch64__)
  return (Vec)vrndnq_f32((float32x4_t)x);
#else
  return (x + 12582912.0f) - 12582912.0f;  // no instruction fuses the sum with a product that x is
#endif
}

// x * 2^n for integers n of a magnitude up to 252, by two factors that are normal numbers.
MOEVLM_INLINE Vec times_power_of_two(Vec x, Vec n) {
#if MOEVLM_LANES == 16 && defined(__x86_64__)
  return (Vec)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  const Ints power = __builtin_convertvector(n, Ints), half = power >> 1;
  return x * (Vec)((Bits)(half + 127) << 23) * (Vec)((Bits)(power - half + 127) << 23);
#endif
}

// Integers from -127 to 127 as bytes. What NaN becomes is not said.
MOEVLM_INLINE void store_int8(int8_t* p, Vec v) {
#if MOEVLM_LANES == 16 && defined(__x86_64__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32((__m512)v)));
#elif MOEVLM_LANES == 8 && defined(__x86_64__)
  const __m256i q = _mm256_cvtps_epi32((__m256)v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
#else
  const Bytes bytes = __builtin_convertvector(__builtin_convertvector(v, Ints), Bytes);
  std::memcpy(p, &bytes, sizeof bytes);
#endif
}

// A bit for each lane, the first lowest: whether a is not less than b, as NaN is not.
MOEVLM_INLINE uint32_t not_less(Vec a, Vec b) {
#if MOEVLM_LANES == 16 && defined(__x86_64__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLT_UQ);
#elif MOEVLM_LANES == 8 && defined(__x86_64__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLT_UQ));
#elif MOEVLM_LANES == 4 && defined(__x86_64__)
  return _mm_movemask_ps(_mm_cmpnlt_ps((__m128)a, (__m128)b));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(!(a[i] < b[i])) << i;
  return bits;
#endif
}

// |x| as integers, which are in its order: NaN is the largest.
MOEVLM_INLINE Ints magnitude(Vec x) { return (Ints)x & 0x7fffffff; }
MOEVLM_INLINE Vec absolute(Vec x) { return (Vec)magnitude(x); }

template <int... Lane>
struct Shuffles {
  // Lanes come in pairs that differ in bit H of their number. `other`: the other lane of each pair; `low`, `high`: of
  // two vectors, both lower lanes, both upper ones.
  template <int H>
  static MOEVLM_INLINE Vec other(Vec v) {
    return __builtin_shufflevector(v, v, (Lane ^ H)...);
  }
  template <int H>
  static MOEVLM_INLINE Vec low(Vec a, Vec b) {
    return __builtin_shufflevector(a, b, (Lane & H ? kLanes + (Lane ^ H) : Lane)...);
  }
  template <int H>
  static MOEVLM_INLINE Vec high(Vec a, Vec b) {
    return __builtin_shufflevector(a, b, (Lane & H ? kLanes + Lane : Lane ^ H)...);
  }
};

#if MOEVLM_LANES == 16
using Shuffle = Shuffles<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif MOEVLM_LANES == 8
using Shuffle = Shuffles<0, 1, 2, 3, 4, 5, 6, 7>;
#elif MOEVLM_LANES == 4
using Shuffle = Shuffles<0, 1, 2, 3>;
#else
using Shuffle = Shuffles<0, 1>;
#endif

// v as the rows of a square matrix, transposed in place.
template <int H = kLanes / 2>
MOEVLM_INLINE void transpose(Vec* v) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & H) continue;
    const Vec a = v[i], b = v[i + H];
    v[i] = Shuffle::low<H>(a, b);
    v[i + H] = Shuffle::high<H>(a, b);
  }
  if constexpr (H > 1) transpose<H / 2>(v);
}

MOEVLM_INLINE float sum(Vec v) {
  if constexpr (kLanes > 8) v += Shuffle::other<8>(v);
  if constexpr (kLanes > 4) v += Shuffle::other<4>(v);
  if constexpr (kLanes > 2) v += Shuffle::other<2>(v);
  return v[0] + v[1];
}

MOEVLM_INLINE float largest(Vec v) {
  if constexpr (kLanes > 8) v = larger(v, Shuffle::other<8>(v));
  if constexpr (kLanes > 4) v = larger(v, Shuffle::other<4>(v));
  if constexpr (kLanes > 2) v = larger(v, Shuffle::other<2>(v));
  return v[0] > v[1] ? v[0] : v[1];
}

// The largest of some magnitudes, as a float.
MOEVLM_INLINE float largest_magnitude(Ints v) {
  if constexpr (kLanes > 8) v = larger(v, (Ints)Shuffle::other<8>((Vec)v));
  if constexpr (kLanes > 4) v = larger(v, (Ints)Shuffle::other<4>((Vec)v));
  if constexpr (kLanes > 2) v = larger(v, (Ints)Shuffle::other<2>((Vec)v));
  const int32_t most = v[0] > v[1] ? v[0] : v[1];
  float value;
  std::memcpy(&value, &most, sizeof value);
  return value;
}

// 2^x for x <= 0, and 0 below 2^-126; NaN stays NaN. Relative error below 1e-7: 2e-9 of the polynomial, fitted to 2^f
// on [-1/2, 1/2], and its rounding. Adding 1.5 * 2^23 leaves the nearest integer in the sum's lowest bits.
MOEVLM_INLINE Vec exp2(Vec x) {
  const Vec magic = broadcast(12582912.0f);
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  Vec p = fma(f, broadcast(0.000153458095f), broadcast(0.00133999312f));
  p = fma(p, f, broadcast(0.00961848897f));
  p = fma(p, f, broadcast(0.0555032878f));
  p = fma(p, f, broadcast(0.240226469f));
  p = fma(p, f, broadcast(0.693147206f));
  p = fma(p, f, broadcast(1.0f));
  p = (Vec)((Bits)p + ((Bits)shifted << 23));
  return x < broadcast(-126.0f) ? Vec{} : p;
}

// result[M][N * kLanes] += a[M][depth] times b[depth][N * kLanes]; strides are in elements.
// Ahead: how many bytes from each element of b that is loaded to ask for another, or 0.
template <int M, int N, int64_t Ahead, class T>
MOEVLM_INLINE void multiply(const float* a, int64_t a_stride, const T* b, int64_t b_stride, float* result,
                            int64_t result_stride, int64_t depth) {
  Vec sums[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) { sums[m][n] = Vec{}; }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) row[n] = load(b + k * b_stride + n * kLanes);
    if constexpr (Ahead > 0) {
      for (int n = 0; n < N * kLanes; n += 64 / sizeof(T)) prefetch(b + k * b_stride + n, Ahead);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const float factor = a[m * a_stride + k];
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) sums[m][n] += row[n] * factor;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      float* to = result + m * result_stride + n * kLanes;
      store(to, load(to) + sums[m][n]);
    }
  }
}

}  // namespace moevlm::MOEVLM_ISA
