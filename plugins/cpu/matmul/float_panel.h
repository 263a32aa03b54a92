// Products of float rows with a panel of float weights, included once per instruction set. Every output is summed in
// the order of k, whatever the number of rows.
#pragma once

#include "matmul/kernels.h"
#include "simd/vector.h"

namespace moevlm::matmul::MOEVLM_ISA {

using namespace moevlm::MOEVLM_ISA;

#if MOEVLM_LANES == 16 || defined(__aarch64__)
constexpr int kRegisters = 32, kTileRows = 12;
#else
constexpr int kRegisters = 16, kTileRows = 6;
#endif
constexpr int64_t kFloatAhead = 4096;  // bytes of a panel; memory is further away than the processor looks by itself

// Vectors of a panel's line that M rows take at a time: sums, weights and a factor fit into the registers.
template <int M>
constexpr int tile_columns() {
  int vectors = kPanel / kLanes;
  while (vectors > 1 && (M + 1) * vectors >= kRegisters) vectors /= 2;
  return vectors;
}

template <int M>
void float_tile(const float* panel, const float* x, int64_t depth, float* out) {
  constexpr int N = tile_columns<M>(), width = kPanel;
  for (int i = 0; i < width; i += N * kLanes)
    multiply<M, N, kFloatAhead>(x, kFloatDepth, panel + i, width, out + i, width, depth);
}

template <int... Less>
inline void float_tile_of(int rows, const float* panel, const float* x, int64_t depth, float* out,
                          std::integer_sequence<int, Less...>) {
  using Tile = void (*)(const float* panel, const float* x, int64_t depth, float* out);
  static constexpr Tile tiles[] = {float_tile<Less + 1>...};
  tiles[rows - 1](panel, x, depth, out);
}

// As Kernels::float_panel.
inline void float_panel(const float* panel, const float* x, int rows, int64_t depth, float* out) {
  const int tiles = (rows + kTileRows - 1) / kTileRows;  // of almost equal size
  for (int tile = 0; tile < tiles; ++tile) {
    const int from = rows * tile / tiles, to = rows * (tile + 1) / tiles;
    float_tile_of(to - from, panel, x + from * kFloatDepth, depth, out + from * kPanel,
                  std::make_integer_sequence<int, kTileRows>{});
  }
}

}  // namespace moevlm::matmul::MOEVLM_ISA
