// AVX-512 with VNNI: four byte products a lane in one instruction.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "matmul/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own header

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")

#define MOEVLM_ISA avx512_vnni
#define MOEVLM_LANES 16
#include "matmul/float_panel.h"

namespace moevlm::quantized {
namespace {

#include "matmul/elementwise.h"

struct Vector {
  static constexpr int lanes = 16;
  __m512 v;

  static Vector load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vector set(float x) { return {_mm512_set1_ps(x)}; }
  static Vector add(Vector a, Vector b) { return {_mm512_add_ps(a.v, b.v)}; }
  static Vector sub(Vector a, Vector b) { return {_mm512_sub_ps(a.v, b.v)}; }
  static Vector mul(Vector a, Vector b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static Vector div(Vector a, Vector b) { return {_mm512_div_ps(a.v, b.v)}; }
  static Vector fma(Vector a, Vector b, Vector c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  // As vmaxps and vminps have it: the second operand where one is NaN.
  static Vector max(Vector a, Vector b) { return {_mm512_max_ps(b.v, a.v)}; }
  static Vector min(Vector a, Vector b) { return {_mm512_min_ps(b.v, a.v)}; }
  static Vector round(Vector a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  static Vector scale(Vector a, Vector power) { return {_mm512_scalef_ps(a.v, power.v)}; }
  static Vector negative_magnitude(Vector a) { return {_mm512_or_ps(a.v, _mm512_set1_ps(-0.0f))}; }
  static Vector select_nonnegative(Vector a, Vector yes, Vector no) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_GE_OQ), no.v, yes.v)};
  }
  // Magnitudes compared as integers: NaN is the largest.
  static Vector max_magnitude(Vector a, Vector b) {
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(b.v), _mm512_set1_epi32(0x7fffffff));
    return {_mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a.v), magnitude))};
  }
  float largest_magnitude() const {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(_mm512_castps_si512(v)))));
  }
  float sum() const { return _mm512_reduce_add_ps(v); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_int8(int8_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
  }
};

inline __m512i broadcast(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}

inline __m512 broadcast_float(const uint8_t* p) {
  float value;
  std::memcpy(&value, p, 4);
  return _mm512_set1_ps(value);
}

constexpr size_t kAhead = 3072;  // bytes; some 130 ns of one core's memory bandwidth

// Block = 0: known at run time only. Up to two rows, low and high halves have accumulators of their own, because the
// chain of dependent products would otherwise be longer than the memory is slow.
template <int Bits, int Block, int Rows>
void panel(const uint8_t* w, const uint8_t* ahead, const uint8_t* const* rows, size_t blocks, int block_given,
           float* out) {
  constexpr int Chains = Rows <= 2 ? 2 : 1;
  const int block = Block ? Block : block_given;
  const size_t block_bytes = kPanel * (2 + static_cast<size_t>(block) * Bits / 8);
  const __m512i low_half = _mm512_set1_epi8(15);
  const uint8_t* x[Rows];
  __m512 sum[Rows][2];
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
    x[r] = rows[r];
    sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  }
  const uint8_t* const end = w + blocks * block_bytes;
  size_t at = 0;  // in each row of activations
  while (w != end) {
    const uint8_t* far = w + kAhead < end ? w + kAhead : ahead + (w + kAhead - end);
    const __m512i scales = _mm512_loadu_si512(w);
    _mm_prefetch(reinterpret_cast<const char*>(far), _MM_HINT_T0);
    const __m512 scale0 = _mm512_cvtph_ps(_mm512_castsi512_si256(scales));
    const __m512 scale1 = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(scales, 1));
    __m512i acc[Rows][2][Chains];
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      acc[r][0][0] = acc[r][1][0] = broadcast(x[r] + at + 4);
      if (Chains == 2) acc[r][0][Chains - 1] = acc[r][1][Chains - 1] = _mm512_setzero_si512();
    }
    const int steps = block / 8;
    for (int s = 0; s < steps; ++s) {
      const uint8_t* p = w + 64 + s * 16 * Bits * 2;
      const uint8_t* f = far + 64 + s * 16 * Bits * 2;
      __m512i first[2], second[2];  // k to k + 3 and k + 4 to k + 7, of rows 0 to 15 and 16 to 31
      _mm_prefetch(reinterpret_cast<const char*>(f), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(f + 64), _MM_HINT_T0);
      if (Bits == 4) {
        for (int t = 0; t < 2; ++t) {
          const __m512i both = _mm512_loadu_si512(p + 64 * t);
          first[t] = _mm512_and_si512(both, low_half);
          second[t] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_half);
        }
      } else {
        _mm_prefetch(reinterpret_cast<const char*>(f + 128), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(f + 192), _MM_HINT_T0);
        for (int t = 0; t < 2; ++t) {
          first[t] = _mm512_loadu_si512(p + 64 * t);
          second[t] = _mm512_loadu_si512(p + 128 + 64 * t);
        }
      }
#pragma GCC unroll 6
      for (int r = 0; r < Rows; ++r) {
        const __m512i v = broadcast(x[r] + at + kActivationHeader + 8 * s);
        acc[r][0][0] = _mm512_dpbusd_epi32(acc[r][0][0], first[0], v);
        acc[r][1][0] = _mm512_dpbusd_epi32(acc[r][1][0], first[1], v);
      }
#pragma GCC unroll 6
      for (int r = 0; r < Rows; ++r) {
        const __m512i v = broadcast(x[r] + at + kActivationHeader + 8 * s + 4);
        acc[r][0][Chains - 1] = _mm512_dpbusd_epi32(acc[r][0][Chains - 1], second[0], v);
        acc[r][1][Chains - 1] = _mm512_dpbusd_epi32(acc[r][1][Chains - 1], second[1], v);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      const __m512 scale = broadcast_float(x[r] + at);
      for (int t = 0; t < 2; ++t) {
        __m512i total = acc[r][t][0];
        if (Chains == 2) total = _mm512_add_epi32(total, acc[r][t][Chains - 1]);
        sum[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_mul_ps(t ? scale1 : scale0, scale), sum[r][t]);
      }
    }
    w += block_bytes;
    at += block + kActivationHeader;
  }
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
    _mm512_storeu_ps(out + r * kPanel, sum[r][0]);
    _mm512_storeu_ps(out + r * kPanel + 16, sum[r][1]);
  }
}

template <int Bits, int Block>
void panel_rows(const uint8_t* w, const uint8_t* ahead, const uint8_t* const* x, int rows, size_t blocks, int block,
                float* out) {
  switch (rows) {
    case 1: return panel<Bits, Block, 1>(w, ahead, x, blocks, block, out);
    case 2: return panel<Bits, Block, 2>(w, ahead, x, blocks, block, out);
    case 3: return panel<Bits, Block, 3>(w, ahead, x, blocks, block, out);
    case 4: return panel<Bits, Block, 4>(w, ahead, x, blocks, block, out);
    case 5: return panel<Bits, Block, 5>(w, ahead, x, blocks, block, out);
    case 6: return panel<Bits, Block, 6>(w, ahead, x, blocks, block, out);
  }
}

PanelKernel choose(Packing packing) {
  if (packing.bits == 4)
    return packing.block == 32 ? panel_rows<4, 32> : packing.block == 128 ? panel_rows<4, 128> : panel_rows<4, 0>;
  return packing.block == 32 ? panel_rows<8, 32> : packing.block == 128 ? panel_rows<8, 128> : panel_rows<8, 0>;
}

using Rest = Elementwise<Vector>;

}  // namespace

const Kernels avx512_kernels{choose,           Rest::quantize, Rest::activate, Rest::store,
                            Rest::accumulate, Rest::softmax,  Rest::sigmoid,  Rest::pairwise_sum,
                            avx512_vnni::float_panel};

}  // namespace moevlm::quantized
#pragma GCC pop_options

#endif
