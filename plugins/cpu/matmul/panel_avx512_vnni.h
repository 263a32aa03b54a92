// AVX-512 with VNNI: four byte products a lane in one instruction.
#pragma once

#include "matmul/kernels.h"

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own header

namespace moevlm::matmul::avx512_vnni {

inline __m512i broadcast_four(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}

inline __m512 broadcast_float(const uint8_t* p) {
  float value;
  std::memcpy(&value, p, 4);
  return _mm512_set1_ps(value);
}

// GroupSize = 0: known at run time only. With one row or two, the values of k with an even and an odd number of four
// are summed apart: one chain of products that wait for each other would take longer than memory takes for the weights.
template <Codes C, int GroupSize, int Rows>
inline void panel(const uint8_t* w, const uint8_t* ahead, const uint8_t* const* rows, int64_t groups, int size_given,
                  float* out) {
  constexpr int Bits = C == Codes::int8 ? 8 : 4;
  constexpr bool Zeros = C == Codes::int4_zeros;
  constexpr int Chains = Rows <= 2 ? 2 : 1;
  const int group_size = GroupSize ? GroupSize : size_given;
  const int64_t group_bytes = kPanel * (2 + static_cast<int64_t>(group_size) * Bits / 8 + Zeros);
  const __m512i low_half = _mm512_set1_epi8(15);
  const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kTwiceE2m1)));
  const uint8_t* x[Rows];
  __m512 sum[Rows][2];
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
    x[r] = rows[r];
    sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  }
  const uint8_t* const end = w + groups * group_bytes;
  int64_t at = 0;  // in each row of activations
  while (w != end) {
    const uint8_t* far = w + kAhead < end ? w + kAhead : ahead + (w + kAhead - end);
    const __m512i scales = _mm512_loadu_si512(w);
    _mm_prefetch(reinterpret_cast<const char*>(far), _MM_HINT_T0);
    const __m512 scale0 = _mm512_cvtph_ps(_mm512_castsi512_si256(scales));
    const __m512 scale1 = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(scales, 1));
    __m512i acc[Rows][2][Chains];
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      acc[r][0][0] = acc[r][1][0] = broadcast_four(x[r] + at + 4);
      if (Chains == 2) acc[r][0][Chains - 1] = acc[r][1][Chains - 1] = _mm512_setzero_si512();
    }
    if (Zeros) {
      for (int t = 0; t < 2; ++t) {
        const auto* own = reinterpret_cast<const __m128i*>(w + group_bytes - kPanel + 16 * t);
        const __m512i zero = _mm512_cvtepu8_epi32(_mm_loadu_si128(own));
#pragma GCC unroll 6
        for (int r = 0; r < Rows; ++r) acc[r][t][0] = _mm512_mullo_epi32(zero, _mm512_srai_epi32(acc[r][t][0], 3));
      }
    }
    const int steps = group_size / 8;
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
          if (C == Codes::fp4) {
            first[t] = _mm512_shuffle_epi8(table, first[t]);
            second[t] = _mm512_shuffle_epi8(table, second[t]);
          }
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
        const __m512i v = broadcast_four(x[r] + at + kActivationHeader + 8 * s);
        acc[r][0][0] = _mm512_dpbusd_epi32(acc[r][0][0], first[0], v);
        acc[r][1][0] = _mm512_dpbusd_epi32(acc[r][1][0], first[1], v);
      }
#pragma GCC unroll 6
      for (int r = 0; r < Rows; ++r) {
        const __m512i v = broadcast_four(x[r] + at + kActivationHeader + 8 * s + 4);
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
    w += group_bytes;
    at += group_size + kActivationHeader;
  }
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
    _mm512_storeu_ps(out + r * kPanel, sum[r][0]);
    _mm512_storeu_ps(out + r * kPanel + 16, sum[r][1]);
  }
}

template <Codes C, int GroupSize>
inline void panel_rows(const uint8_t* w, const uint8_t* ahead, const uint8_t* const* x, int rows, int64_t groups,
                       int group_size, float* out) {
  switch (rows) {
    case 1: return panel<C, GroupSize, 1>(w, ahead, x, groups, group_size, out);
    case 2: return panel<C, GroupSize, 2>(w, ahead, x, groups, group_size, out);
    case 3: return panel<C, GroupSize, 3>(w, ahead, x, groups, group_size, out);
    case 4: return panel<C, GroupSize, 4>(w, ahead, x, groups, group_size, out);
    case 5: return panel<C, GroupSize, 5>(w, ahead, x, groups, group_size, out);
    case 6: return panel<C, GroupSize, 6>(w, ahead, x, groups, group_size, out);
  }
}

template <Codes C>
inline PanelKernel of_size(int group_size) {
  return group_size == 32 ? panel_rows<C, 32> : group_size == 128 ? panel_rows<C, 128> : panel_rows<C, 0>;
}

inline PanelKernel choose_panel(Packing packing) {
  switch (packing.codes()) {
    case Codes::int4: return of_size<Codes::int4>(packing.group_size);
    case Codes::int4_zeros: return of_size<Codes::int4_zeros>(packing.group_size);
    case Codes::fp4: return of_size<Codes::fp4>(packing.group_size);
    case Codes::int8: return of_size<Codes::int8>(packing.group_size);
  }
  return nullptr;
}

}  // namespace moevlm::matmul::avx512_vnni
