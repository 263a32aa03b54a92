// Any processor: plain C++, written so that the compiler's vectors fit it.
#pragma once

#include "matmul/kernels.h"

namespace moevlm::matmul::baseline {

inline float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  uint32_t bits = sign | ((magnitude << 13) + (112u << 23));
  if (magnitude >= 0x7c00u) bits = sign | 0x7f800000u | (magnitude << 13);
  float value;
  std::memcpy(&value, &bits, 4);
  if (magnitude < 0x0400u) value = std::copysign(static_cast<float>(magnitude) * 0x1p-24f, value);
  return value;
}

// Four signed bytes of a row of activations.
struct Four {
  int32_t q[4];
  explicit Four(const uint8_t* p) {
    for (int j = 0; j < 4; ++j) q[j] = static_cast<int8_t>(p[j]);
  }
};

template <Codes C>
inline int32_t number(int32_t nibble) {
  return C == Codes::fp4 ? kTwiceE2m1[nibble] : nibble;
}

template <Codes C>
inline void panel(const uint8_t* w, const uint8_t*, const uint8_t* const* x, int rows, int64_t groups, int group_size,
                  float* out) {
  constexpr int Bits = C == Codes::int8 ? 8 : 4;
  constexpr bool Zeros = C == Codes::int4_zeros;
  std::memset(out, 0, sizeof(float) * rows * kPanel);
  int64_t at = 0;
  for (int64_t b = 0; b < groups; ++b, at += group_size + kActivationHeader) {
    float scales[kPanel];
    for (int i = 0; i < kPanel; ++i) {
      uint16_t half;
      std::memcpy(&half, w + 2 * i, 2);
      scales[i] = half_to_float(half);
    }
    w += 2 * kPanel;
    const uint8_t* zeros = w + kPanel * static_cast<int64_t>(group_size) * Bits / 8;
    const int step = Bits == 4 ? 8 : 4;  // values of k in a line
    for (int r = 0; r < rows; ++r) {
      float row_scale;
      int32_t start;
      std::memcpy(&row_scale, x[r] + at, 4);
      std::memcpy(&start, x[r] + at + 4, 4);
      int32_t total[kPanel];
      for (int i = 0; i < kPanel; ++i) total[i] = Zeros ? start / 8 * zeros[i] : start;
      const uint8_t* line = w;
      for (int k = 0; k < group_size; k += step, line += 128) {
        const uint8_t* q = x[r] + at + kActivationHeader + k;
        const Four first(q), second(Bits == 4 ? q + 4 : q);
        uint32_t lanes[kPanel];
        std::memcpy(lanes, line, 128);
        for (int i = 0; i < kPanel; ++i) {
          for (int j = 0; j < 4; ++j) {  // little-endian, as all of the format is
            const int32_t byte = static_cast<int32_t>(lanes[i] >> 8 * j & 255u);
            if (Bits == 4) {
              total[i] += number<C>(byte & 15) * first.q[j] + number<C>(byte >> 4) * second.q[j];
            } else {
              total[i] += byte * first.q[j];
            }
          }
        }
      }
      float* sum = out + r * kPanel;
      for (int i = 0; i < kPanel; ++i) sum[i] += static_cast<float>(total[i]) * (scales[i] * row_scale);
    }
    w = zeros + (Zeros ? kPanel : 0);
  }
}

inline PanelKernel choose_panel(Packing packing) {
  switch (packing.codes()) {
    case Codes::int4: return panel<Codes::int4>;
    case Codes::int4_zeros: return panel<Codes::int4_zeros>;
    case Codes::fp4: return panel<Codes::fp4>;
    case Codes::int8: return panel<Codes::int8>;
  }
  return nullptr;
}

}  // namespace moevlm::matmul::baseline
