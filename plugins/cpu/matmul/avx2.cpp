// AVX2 with FMA: products of bytes summed in pairs to 16 bits, arranged so that they never saturate.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "matmul/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#define MOEVLM_ISA avx2
#define MOEVLM_LANES 8
#include "matmul/float_panel.h"

namespace moevlm::quantized {
namespace {

#include "matmul/elementwise.h"

struct Vector {
  static constexpr int lanes = 8;
  __m256 v;

  static Vector load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vector set(float x) { return {_mm256_set1_ps(x)}; }
  static Vector add(Vector a, Vector b) { return {_mm256_add_ps(a.v, b.v)}; }
  static Vector sub(Vector a, Vector b) { return {_mm256_sub_ps(a.v, b.v)}; }
  static Vector mul(Vector a, Vector b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static Vector div(Vector a, Vector b) { return {_mm256_div_ps(a.v, b.v)}; }
  static Vector fma(Vector a, Vector b, Vector c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  // As vmaxps and vminps have it: the second operand where one is NaN.
  static Vector max(Vector a, Vector b) { return {_mm256_max_ps(b.v, a.v)}; }
  static Vector min(Vector a, Vector b) { return {_mm256_min_ps(b.v, a.v)}; }
  static Vector round(Vector a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  // Two halves of the power, because one alone need not be a normal number.
  static Vector scale(Vector a, Vector power) {
    const __m256i n = _mm256_cvtps_epi32(power.v), half = _mm256_srai_epi32(n, 1), bias = _mm256_set1_epi32(127);
    const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias), 23);
    return {_mm256_mul_ps(_mm256_mul_ps(a.v, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second))};
  }
  static Vector negative_magnitude(Vector a) { return {_mm256_or_ps(a.v, _mm256_set1_ps(-0.0f))}; }
  static Vector select_nonnegative(Vector a, Vector yes, Vector no) {
    return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_GE_OQ))};
  }
  // Magnitudes compared as integers: NaN is the largest.
  static Vector max_magnitude(Vector a, Vector b) {
    const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(b.v), _mm256_set1_epi32(0x7fffffff));
    return {_mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a.v), magnitude))};
  }
  float largest_magnitude() const {
    const __m256i all = _mm256_castps_si256(v);
    __m128i most = _mm_max_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(most));
  }
  float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store_int8(int8_t* p) const {
    const __m256i q = _mm256_cvtps_epi32(v);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  }
};

inline __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

inline __m256i broadcast(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

// 8 rows of a panel by Rows rows of activations over one block: int32 sums, the zero point taken out.
// 4 bits: two products are at most 2 * 15 * 127, and 16 bits hold eight such pairs, which is 32 values of k.
template <int Rows>
inline void products4(const uint8_t* w, const uint8_t* const* x, size_t at, int block, __m256i* total) {
  const __m256i low_half = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  for (int r = 0; r < Rows; ++r) total[r] = broadcast(x[r] + at + 4);
  for (int k = 0; k < block; k += 32) {
    const int stop = k + 32 < block ? k + 32 : block;
    __m256i words[Rows];
    for (int r = 0; r < Rows; ++r) words[r] = _mm256_setzero_si256();
    for (int i = k; i < stop; i += 8) {
      const __m256i both = load(w + i * 16);
      const __m256i first = _mm256_and_si256(both, low_half);
      const __m256i second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_half);
      for (int r = 0; r < Rows; ++r) {
        const uint8_t* q = x[r] + at + kActivationHeader + i;
        words[r] = _mm256_add_epi16(words[r], _mm256_maddubs_epi16(first, broadcast(q)));
        words[r] = _mm256_add_epi16(words[r], _mm256_maddubs_epi16(second, broadcast(q + 4)));
      }
    }
    for (int r = 0; r < Rows; ++r) total[r] = _mm256_add_epi32(total[r], _mm256_madd_epi16(words[r], ones));
  }
}

// 8 bits: the weight less its zero point is at most 128 in magnitude, and takes its sign to the activation: two
// products are at most 2 * 128 * 127 < 2^15.
template <int Rows>
inline void products8(const uint8_t* w, const uint8_t* const* x, size_t at, int block, __m256i* total) {
  const __m256i ones = _mm256_set1_epi16(1), zero_point = _mm256_set1_epi8(-128);
  for (int r = 0; r < Rows; ++r) total[r] = _mm256_setzero_si256();
  for (int i = 0; i < block; i += 4) {
    const __m256i value = _mm256_xor_si256(load(w + i * 32), zero_point);
    const __m256i magnitude = _mm256_abs_epi8(value);
    for (int r = 0; r < Rows; ++r) {
      const __m256i q = _mm256_sign_epi8(broadcast(x[r] + at + kActivationHeader + i), value);
      total[r] = _mm256_add_epi32(total[r], _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, q), ones));
    }
  }
}

template <int Bits, int Rows>
void panel(const uint8_t* w, const uint8_t* ahead, const uint8_t* const* x, size_t blocks, int block, float* out) {
  const size_t block_bytes = kPanel * (2 + static_cast<size_t>(block) * Bits / 8);
  for (int i = 0; i < Rows * kPanel; i += 8) _mm256_storeu_ps(out + i, _mm256_setzero_ps());
  const uint8_t* const end = w + blocks * block_bytes;
  constexpr size_t kAhead = 2048;
  for (size_t at = 0; w != end; w += block_bytes, at += block + kActivationHeader) {
    const uint8_t* far = w + kAhead < end ? w + kAhead : ahead + (w + kAhead - end);
    for (size_t i = 0; i < block_bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(far + i), _MM_HINT_T0);
    for (int part = 0; part < 4; ++part) {
      const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 16 * part)));
      __m256i total[Rows];
      if (Bits == 4) {
        products4<Rows>(w + 64 + 32 * part, x, at, block, total);
      } else {
        products8<Rows>(w + 64 + 32 * part, x, at, block, total);
      }
      for (int r = 0; r < Rows; ++r) {
        float row_scale;
        std::memcpy(&row_scale, x[r] + at, 4);
        float* sum = out + r * kPanel + 8 * part;
        const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(row_scale));
        _mm256_storeu_ps(sum, _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[r]), both, _mm256_loadu_ps(sum)));
      }
    }
  }
}

template <int Bits>
void panel_rows(const uint8_t* w, const uint8_t* ahead, const uint8_t* const* x, int rows, size_t blocks, int block,
                float* out) {
  switch (rows) {
    case 1: return panel<Bits, 1>(w, ahead, x, blocks, block, out);
    case 2: return panel<Bits, 2>(w, ahead, x, blocks, block, out);
    case 3: return panel<Bits, 3>(w, ahead, x, blocks, block, out);
    case 4: return panel<Bits, 4>(w, ahead, x, blocks, block, out);
    case 5: return panel<Bits, 5>(w, ahead, x, blocks, block, out);
    case 6: return panel<Bits, 6>(w, ahead, x, blocks, block, out);
  }
}

PanelKernel choose(Packing packing) { return packing.bits == 4 ? panel_rows<4> : panel_rows<8>; }

using Rest = Elementwise<Vector>;

}  // namespace

const Kernels avx2_kernels{choose,           Rest::quantize, Rest::activate, Rest::store,
                            Rest::accumulate, Rest::softmax,  Rest::sigmoid,  Rest::pairwise_sum,
                            avx2::float_panel};

}  // namespace moevlm::quantized
#pragma GCC pop_options

#endif
