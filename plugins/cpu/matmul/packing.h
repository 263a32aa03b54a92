// How quantized weights and quantized activations lie in memory.
//
// A weight W [N, K] is cut into groups of `group_size` values along K. Each group of a row has one fp16 scale; a value
// is scale * (q - zero_point), with q unsigned: 4 bits and zero point 8, or 8 bits and zero point 128. The bytes are
// laid out for dot products of 4 unsigned by 4 signed bytes: a kernel reads them once, in order, in whole cache lines.
//
//   panel (32 rows)  x  ceil(N / 32)
//     group          x  ceil(K / group_size)
//       scale        32 fp16, one per row: 64 bytes
//       line         8 bits: group_size / 4 times, 32 rows x 4 bytes: row r, byte j holds q[r, 4 line + j]
//                    4 bits: group_size / 8 times, 32 rows x 4 bytes: row r, byte j holds q[r, 8 line + j] in its low
//                            half, q[r, 8 line + 4 + j] in its high half
//
// With zeros (4 bits only) each row has a zero point of its own in each group: 32 bytes, one per row, behind its lines.
//
// fp4: the 4 bits are those of an e2m1 number, and a value is scale * number. Twice a number is an integer from -12 to
// 12; kernels look up this integer plus 12, which is then the zero point, and a row's own scale is halved for it.
//
// Rows past N and columns past K hold the zero point, with scale 0 in rows past N. In the gate_up weight of a gated
// expert panel p holds the 16 gate rows, then the 16 up rows, of channels 16 p to 16 p + 15.
// moevlm.export.formats.cpu_packing writes this layout.
//
// A row of activations is quantized by groups to signed bytes q = round(x * (127 / absmax)), one group after another:
//   float scale = absmax / 127 * unit; int32 start = -zero_point * sum(q); int8 q[group_size]
// The integer sum of a group begins with `start`, which takes the weights' zero point out; with zeros, with a row's own
// share of it, start / zero_point * zero.
#pragma once
#include <cstdint>

#include "sizes.h"

namespace moevlm::matmul {

constexpr int kPanel = 32;
constexpr int kMaxGroup = 256;
constexpr int kActivationHeader = 8;  // bytes: scale and start

// What the bits of a weight are.
enum class Codes { int4, int4_zeros, fp4, int8 };

// Twice the e2m1 number of each code, plus 12.
constexpr int8_t kTwiceE2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

struct Packing {
  int bits;        // 4 or 8
  int group_size;  // a multiple of 16 up to kMaxGroup
  bool zeros = false, fp4 = false;

  constexpr bool valid() const {
    return (bits == 4 || bits == 8) && group_size >= 16 && group_size <= kMaxGroup && group_size % 16 == 0 &&
           (bits == 4 || !(zeros || fp4)) && !(zeros && fp4);
  }
  constexpr Codes codes() const {
    return bits == 8 ? Codes::int8 : fp4 ? Codes::fp4 : zeros ? Codes::int4_zeros : Codes::int4;
  }
  constexpr int zero_point() const { return bits == 8 ? 128 : fp4 ? 12 : 8; }
  constexpr float unit() const { return fp4 ? 0.5f : 1.0f; }  // of a step in what kernels multiply
  constexpr int64_t groups(int64_t k) const { return ceil_div(k, group_size); }
  constexpr int64_t group_bytes() const { return kPanel * (2 + int64_t{group_size} * bits / 8 + zeros); }
  constexpr int64_t panel_bytes(int64_t k) const { return groups(k) * group_bytes(); }
  constexpr int64_t bytes(int64_t n, int64_t k) const { return ceil_div(n, kPanel) * panel_bytes(k); }
  constexpr int64_t activation_bytes(int64_t k) const { return groups(k) * (group_size + kActivationHeader); }
};

}  // namespace moevlm::matmul
