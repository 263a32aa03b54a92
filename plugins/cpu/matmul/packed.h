// Quantized weights as the kernels read them, and quantized activations.
//
// A weight W [N, K] is cut into blocks of `block` values along K. Each (row, block) has one fp16 scale; a value is
// scale * (q - zero_point), with q unsigned: 4 bits and zero point 8, or 8 bits and zero point 128. The bytes are laid
// out for dot products of 4 unsigned by 4 signed bytes: a kernel reads them once, in order, in whole cache lines.
//
//   panel (32 rows)  x  ceil(N / 32)
//     block          x  ceil(K / block)
//       scale        32 fp16, one per row: 64 bytes
//       line         8 bits: block / 4 times, 32 rows x 4 bytes: row r, byte j holds q[r, 4 line + j]
//                    4 bits: block / 8 times, 32 rows x 4 bytes: row r, byte j holds q[r, 8 line + j] in its low half,
//                            q[r, 8 line + 4 + j] in its high half
//
// Rows past N and columns past K hold the zero point, with scale 0 in rows past N. In the gate_up weight of a gated
// expert panel p holds the 16 gate rows, then the 16 up rows, of channels 16 p to 16 p + 15.
// moevlm.export.formats.cpu_packing writes this layout.
//
// A row of activations is quantized per block to signed bytes q = round(x * (127 / absmax)), one after another:
//   float scale = absmax / 127; int32 start = -zero_point * sum(q); int8 q[block]
// `start` is what the accumulator begins with, which takes the weights' zero point out.
#pragma once
#include <cstddef>
#include <cstdint>

namespace moevlm::quantized {

constexpr int kPanel = 32;
constexpr int kMaxBlock = 256;
constexpr int kActivationHeader = 8;

constexpr size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

struct Packing {
  int bits;   // 4 or 8
  int block;  // a multiple of 16 up to kMaxBlock

  constexpr bool valid() const { return (bits == 4 || bits == 8) && block >= 16 && block <= kMaxBlock && block % 16 == 0; }
  constexpr int zero_point() const { return bits == 4 ? 8 : 128; }
  constexpr size_t blocks(size_t k) const { return ceil_div(k, block); }
  constexpr size_t block_bytes() const { return kPanel * (2 + static_cast<size_t>(block) * bits / 8); }
  constexpr size_t panel_bytes(size_t k) const { return blocks(k) * block_bytes(); }
  constexpr size_t bytes(size_t n, size_t k) const { return ceil_div(n, kPanel) * panel_bytes(k); }
  constexpr size_t activation_bytes(size_t k) const { return blocks(k) * (block + kActivationHeader); }
};

}  // namespace moevlm::quantized
