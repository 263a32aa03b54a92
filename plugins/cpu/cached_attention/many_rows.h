// Prefill: a task with many rows waits for the multipliers. Keys are transposed, and int8 turned to floats, once per
// block, and both products run in a register tile. Included by kernels.h, once per instruction set.

#pragma once

#include "cached_attention/few_rows.h"

namespace moevlm::MOEVLM_ISA {

constexpr int64_t kPanel = 2 * kLanes;  // keys in a panel of the transposed block
constexpr int64_t kDepth = 64;  // of head_dim in one sum: the rounding of longer ones shows
constexpr int64_t kBlock = 128, kBlockFloats = 128 * 128;
static_assert(kRowUnit % MOEVLM_TILE_M == 0 && kBlock % kPanel == 0 && kBlockFloats / kMaxHeadDim >= kPanel);

// panels[count / kPanel][size][kPanel] = keys[count][size] transposed, with zeros for the keys that fill the last one.
template <class T>
MOEVLM_INLINE void pack_keys(const Rows<T>& keys, int64_t begin, int64_t count, int64_t size, float* panels) {
  for (int64_t first = 0; first < count; first += kLanes) {
    float* panel = panels + first / kPanel * kPanel * size + first % kPanel;
    for (int64_t d = 0; d < size; d += kLanes) {
      Vec square[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        square[j] = first + j < count ? load(keys.row(begin + first + j) + d) : Vec{};
      }
      transpose(square);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) store(panel + (d + j) * kPanel, square[j]);
    }
  }
  if ((count + kLanes - 1) / kLanes % 2) {
    float* panel = panels + count / kPanel * kPanel * size + kLanes;
    for (int64_t d = 0; d < size; ++d) store(panel + d * kPanel, Vec{});
  }
}

template <class T, int64_t Size>
void attend_many_rows(const Attention& call, const Task& task) {
  constexpr int M = MOEVLM_TILE_M;
  const Rows<T> keys(call, call.key, task.sequence, task.kv_head), values(call, call.value, task.sequence, task.kv_head);
  constexpr int64_t ahead = kBlock;
  Tile tile;
  alignas(64) float scores[kTileRows * ahead], panels[kBlockFloats];
  alignas(64) float key_scale[kBlock], value_scale[kBlock];
  tile.fill(call, task, (task.rows() + M - 1) / M * M);
  const int64_t size = Size ? Size : call.head_dim, fits = kBlockFloats / size / kPanel * kPanel;
  const int64_t block = fits < kBlock ? fits : kBlock;
  const int64_t position = call.position[task.sequence] + task.token;
  for (int64_t begin = task.begin; begin < task.end; begin += block) {
    const int64_t count = task.end - begin < block ? task.end - begin : block;
    const int64_t padded = (count + kPanel - 1) / kPanel * kPanel;
    // Tokens before the block's first entry see nothing of it.
    const int64_t from = begin > position ? (begin - position) * task.heads / M * M : 0;
    // How many of the block's entries the last of the M rows from r on sees.
    const auto seen_from = [&](int64_t r) {
      const int64_t row = r + M < tile.rows ? r + M - 1 : tile.rows - 1;
      const int64_t seen = position + row / task.heads + 1 - begin;
      return seen < count ? seen : count;
    };
    pack_keys(keys, begin, count, size, panels);
    for (int64_t j = 0; j < padded; j += kPanel) {
      for (int64_t r = from; r < tile.rows; r += M) {
        if (j >= seen_from(r)) continue;
        float* result = scores + r * ahead + j;
        const float *q = tile.q + r * size, *panel = panels + j * size;
        multiply<M, 2, false>(q, size, panel, kPanel, result, ahead, size < kDepth ? size : kDepth);
        for (int64_t d = kDepth; d < size; d += kDepth) {
          const int64_t depth = size - d < kDepth ? size - d : kDepth;
          multiply<M, 2, true>(q + d, size, panel + d * kPanel, kPanel, result, ahead, depth);
        }
      }
    }
    if (Rows<T>::quantized) {
      for (int64_t j = 0; j < padded; ++j) {
        key_scale[j] = j < count ? keys.scale(begin + j) : 0;
        value_scale[j] = j < count ? values.scale(begin + j) : 0;
      }
      for (int64_t j = 0; j < count; ++j) {  // the keys' panels are done with
        for (int64_t d = 0; d < size; d += kLanes) store(panels + j * size + d, load(values.row(begin + j) + d));
      }
    }
    for (int64_t r = from; r < tile.rows; ++r) {
      const int64_t seen = position + r / task.heads + 1 - begin;
      tile.weigh<Rows<T>::quantized>(
        r, scores + r * ahead, seen < count ? seen : count, padded, key_scale, value_scale);
    }
    const float* first = Rows<T>::quantized ? panels : reinterpret_cast<const float*>(values.row(begin));
    int64_t d = 0;
    const auto add = [&](auto n) {
      constexpr int N = decltype(n)::value;
      for (; d + N * kLanes <= size; d += N * kLanes) {
        for (int64_t r = from; r < tile.rows; r += M) {
          multiply<M, N, true>(scores + r * ahead, ahead, first + d, size, tile.sums + r * size + d, size, seen_from(r));
        }
      }
    };
    add(Constant<2>()), add(Constant<1>());
  }
  tile.finish(call, task);
}

}  // namespace moevlm::MOEVLM_ISA
