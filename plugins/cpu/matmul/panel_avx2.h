// AVX2 with FMA: products of bytes summed in pairs to 16 bits, arranged so that they never saturate.
#pragma once

#include "matmul/kernels.h"

namespace moevlm::matmul::avx2 {

inline __m256i load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

inline __m256i broadcast_four(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

// Parts times 8 rows of a panel by Rows rows of activations over one group: int32 sums, the zero point taken out.
// 4 bits: two products are at most 2 * 15 * 127, and 16 bits hold eight such pairs, which is 32 values of k; of fp4 at
// most 2 * 24 * 127, and half as many.
template <Codes C, int Rows, int Parts>
inline void products4(const uint8_t* w, const uint8_t* const* x, int64_t at, int64_t group_size,
                      __m256i (*total)[Rows]) {
  constexpr int Depth = C == Codes::fp4 ? 16 : 32;
  const __m256i low_half = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kTwiceE2m1)));
  for (int p = 0; p < Parts; ++p) {
    for (int r = 0; r < Rows; ++r) total[p][r] = broadcast_four(x[r] + at + 4);
  }
  for (int64_t k = 0; k < group_size; k += Depth) {
    const int64_t stop = k + Depth < group_size ? k + Depth : group_size;
    __m256i words[Parts][Rows];
    for (int p = 0; p < Parts; ++p) {
      for (int r = 0; r < Rows; ++r) words[p][r] = _mm256_setzero_si256();
    }
    for (int64_t i = k; i < stop; i += 8) {
      for (int p = 0; p < Parts; ++p) {
        const __m256i both = load_bytes(w + i * 16 + 32 * p);
        __m256i first = _mm256_and_si256(both, low_half);
        __m256i second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_half);
        if (C == Codes::fp4) {
          first = _mm256_shuffle_epi8(table, first);
          second = _mm256_shuffle_epi8(table, second);
        }
        for (int r = 0; r < Rows; ++r) {
          const uint8_t* q = x[r] + at + kActivationHeader + i;
          words[p][r] = _mm256_add_epi16(words[p][r], _mm256_maddubs_epi16(first, broadcast_four(q)));
          words[p][r] = _mm256_add_epi16(words[p][r], _mm256_maddubs_epi16(second, broadcast_four(q + 4)));
        }
      }
    }
    for (int p = 0; p < Parts; ++p) {
      for (int r = 0; r < Rows; ++r) {
        total[p][r] = _mm256_add_epi32(total[p][r], _mm256_madd_epi16(words[p][r], ones));
      }
    }
  }
}

// 8 bits: the weight less its zero point is at most 128 in magnitude, and takes its sign to the activation: two
// products are at most 2 * 128 * 127 < 2^15.
template <int Rows, int Parts>
inline void products8(const uint8_t* w, const uint8_t* const* x, int64_t at, int64_t group_size,
                      __m256i (*total)[Rows]) {
  const __m256i ones = _mm256_set1_epi16(1), zero_point = _mm256_set1_epi8(-128);
  for (int p = 0; p < Parts; ++p) {
    for (int r = 0; r < Rows; ++r) total[p][r] = _mm256_setzero_si256();
  }
  for (int64_t i = 0; i < group_size; i += 4) {
    for (int p = 0; p < Parts; ++p) {
      const __m256i value = _mm256_xor_si256(load_bytes(w + i * 32 + 32 * p), zero_point);
      const __m256i magnitude = _mm256_abs_epi8(value);
      for (int r = 0; r < Rows; ++r) {
        const __m256i q = _mm256_sign_epi8(broadcast_four(x[r] + at + kActivationHeader + i), value);
        total[p][r] = _mm256_add_epi32(total[p][r], _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, q), ones));
      }
    }
  }
}

template <Codes C, int Rows>
inline void panel(const uint8_t* w, const uint8_t* ahead, const uint8_t* const* x, int64_t groups, int group_size,
                  float* out) {
  constexpr int Bits = C == Codes::int8 ? 8 : 4;
  constexpr bool Zeros = C == Codes::int4_zeros;
  constexpr int Parts = Rows == 1 ? 4 : Rows == 2 ? 2 : 1;  // at a time: what 16 registers hold
  const int64_t group_bytes = kPanel * (2 + static_cast<int64_t>(group_size) * Bits / 8 + Zeros);
  for (int i = 0; i < Rows * kPanel; i += 8) _mm256_storeu_ps(out + i, _mm256_setzero_ps());
  const uint8_t* const end = w + groups * group_bytes;
  for (int64_t at = 0; w != end; w += group_bytes, at += group_size + kActivationHeader) {
    const uint8_t* far = w + kAhead < end ? w + kAhead : ahead + (w + kAhead - end);
    for (int64_t i = 0; i < group_bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(far + i), _MM_HINT_T0);
    const uint8_t* zeros = w + group_bytes - kPanel;
    for (int first = 0; first < 4; first += Parts) {
      __m256i total[Parts][Rows];
      if (Bits == 4) {
        products4<C, Rows, Parts>(w + 64 + 32 * first, x, at, group_size, total);
      } else {
        products8<Rows, Parts>(w + 64 + 32 * first, x, at, group_size, total);
      }
      for (int p = 0; p < Parts; ++p) {
        const int part = first + p;
        const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 16 * part)));
        if (Zeros) {  // in place of the 8 that `start` took out: (8 - zero) * sum(q)
          const __m256i own = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros + 8 * part)));
          const __m256i less = _mm256_sub_epi32(own, _mm256_set1_epi32(8));
          for (int r = 0; r < Rows; ++r) {
            const __m256i start = _mm256_srai_epi32(broadcast_four(x[r] + at + 4), 3);
            total[p][r] = _mm256_add_epi32(total[p][r], _mm256_mullo_epi32(less, start));
          }
        }
        for (int r = 0; r < Rows; ++r) {
          float row_scale;
          std::memcpy(&row_scale, x[r] + at, 4);
          float* sum = out + r * kPanel + 8 * part;
          const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(row_scale));
          _mm256_storeu_ps(sum, _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[p][r]), both, _mm256_loadu_ps(sum)));
        }
      }
    }
  }
}

template <Codes C>
inline void panel_rows(const uint8_t* w, const uint8_t* ahead, const uint8_t* const* x, int rows, int64_t groups,
                       int group_size, float* out) {
  switch (rows) {
    case 1: return panel<C, 1>(w, ahead, x, groups, group_size, out);
    case 2: return panel<C, 2>(w, ahead, x, groups, group_size, out);
    case 3: return panel<C, 3>(w, ahead, x, groups, group_size, out);
    case 4: return panel<C, 4>(w, ahead, x, groups, group_size, out);
    case 5: return panel<C, 5>(w, ahead, x, groups, group_size, out);
    case 6: return panel<C, 6>(w, ahead, x, groups, group_size, out);
  }
}

inline PanelKernel choose_panel(Packing packing) {
  switch (packing.codes()) {
    case Codes::int4: return panel_rows<Codes::int4>;
    case Codes::int4_zeros: return panel_rows<Codes::int4_zeros>;
    case Codes::fp4: return panel_rows<Codes::fp4>;
    case Codes::int8: return panel_rows<Codes::int8>;
  }
  return nullptr;
}

}  // namespace moevlm::matmul::avx2
