// Any processor: plain C++, written so that the compiler's vectors fit it.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "matmul/kernels.h"

#define MOEVLM_ISA baseline
#define MOEVLM_LANES 4
#include "matmul/float_panel.h"

namespace moevlm::quantized {
namespace {

#include "matmul/elementwise.h"

struct Scalar {
  static constexpr int lanes = 1;
  float v;

  static Scalar load(const float* p) { return {*p}; }
  static Scalar set(float x) { return {x}; }
  static Scalar add(Scalar a, Scalar b) { return {a.v + b.v}; }
  static Scalar sub(Scalar a, Scalar b) { return {a.v - b.v}; }
  static Scalar mul(Scalar a, Scalar b) { return {a.v * b.v}; }
  static Scalar div(Scalar a, Scalar b) { return {a.v / b.v}; }
  static Scalar fma(Scalar a, Scalar b, Scalar c) { return {std::fma(a.v, b.v, c.v)}; }
  static Scalar max(Scalar a, Scalar b) { return {a.v < b.v ? b.v : a.v}; }
  static Scalar min(Scalar a, Scalar b) { return {b.v < a.v ? b.v : a.v}; }
  static Scalar round(Scalar a) { return {std::nearbyint(a.v)}; }
  static Scalar scale(Scalar a, Scalar power) { return {power.v == power.v ? std::ldexp(a.v, int(power.v)) : power.v}; }
  static Scalar negative_magnitude(Scalar a) { return {-std::fabs(a.v)}; }
  static Scalar select_nonnegative(Scalar a, Scalar yes, Scalar no) { return a.v >= 0 ? yes : no; }
  static Scalar max_magnitude(Scalar a, Scalar b) {
    const float magnitude = std::fabs(b.v);
    return {a.v >= magnitude || a.v != a.v ? a.v : magnitude};
  }
  float largest_magnitude() const { return v; }
  float sum() const { return v; }
  void store(float* p) const { *p = v; }
  void store_int8(int8_t* p) const { *p = v >= -127.0f && v <= 127.0f ? static_cast<int8_t>(v) : -127; }
};

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

template <int Bits>
void panel(const uint8_t* w, const uint8_t*, const uint8_t* const* x, int rows, size_t blocks, int block, float* out) {
  std::memset(out, 0, sizeof(float) * rows * kPanel);
  size_t at = 0;
  for (size_t b = 0; b < blocks; ++b, at += block + kActivationHeader) {
    float scales[kPanel];
    for (int i = 0; i < kPanel; ++i) {
      uint16_t half;
      std::memcpy(&half, w + 2 * i, 2);
      scales[i] = half_to_float(half);
    }
    w += 2 * kPanel;
    const int step = Bits == 4 ? 8 : 4;  // values of k in a line
    for (int r = 0; r < rows; ++r) {
      float row_scale;
      int32_t start;
      std::memcpy(&row_scale, x[r] + at, 4);
      std::memcpy(&start, x[r] + at + 4, 4);
      int32_t total[kPanel];
      for (int i = 0; i < kPanel; ++i) total[i] = start;
      const uint8_t* line = w;
      for (int k = 0; k < block; k += step, line += 128) {
        const uint8_t* q = x[r] + at + kActivationHeader + k;
        const Four first(q), second(Bits == 4 ? q + 4 : q);
        uint32_t lanes[kPanel];
        std::memcpy(lanes, line, 128);
        for (int i = 0; i < kPanel; ++i) {
          for (int j = 0; j < 4; ++j) {  // little-endian, as all of the format is
            const int32_t byte = static_cast<int32_t>(lanes[i] >> 8 * j & 255u);
            total[i] += Bits == 4 ? (byte & 15) * first.q[j] + (byte >> 4) * second.q[j] : byte * first.q[j];
          }
        }
      }
      float* sum = out + r * kPanel;
      for (int i = 0; i < kPanel; ++i) sum[i] += static_cast<float>(total[i]) * (scales[i] * row_scale);
    }
    w += kPanel * static_cast<size_t>(block) * Bits / 8;
  }
}

PanelKernel choose(Packing packing) { return packing.bits == 4 ? panel<4> : panel<8>; }

using Rest = Elementwise<Scalar>;

}  // namespace

const Kernels generic_kernels{choose,           Rest::quantize, Rest::activate, Rest::store,
                              Rest::accumulate, Rest::softmax,  Rest::sigmoid,  Rest::pairwise_sum,
                             baseline::float_panel};

}  // namespace moevlm::quantized
