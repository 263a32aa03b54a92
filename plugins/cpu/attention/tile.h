// The rows of a task against one block of the cache after the other. Included by kernels.h, once per instruction set.

#pragma once

#include "attention/append.h"
#include "attention/softmax.h"

namespace moevlm::attention::MOEVLM_ISA {

constexpr int64_t kPanelStrips = 4;  // strips of keys that all rows go through before the next ones
// What of keys or values should stay in the first-level cache while all rows go through it.
constexpr int64_t kNearFloats = 4096, kScratchFloats = 128 * 128;
static_assert(kScratchFloats >= kStrip * kMaxKeyDim && kScratchFloats >= 32 * kMaxValueDim);

// floats[n] = bytes[n], n a multiple of kLanes.
inline void widen(const int8_t* bytes, int64_t n, float* floats) {
  for (int64_t i = 0; i < n; i += kLanes) store(floats + i, load(bytes + i));
}

// values[kStrip][dim] = the first dim lines of a strip of keys, [dim][kStrip], transposed.
template <class T>
void transpose_strip(const T* keys, int64_t dim, float* values) {
  for (int64_t first = 0; first < kStrip; first += kLanes) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      Vec square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) square[i] = load(keys + (d + i) * kStrip + first);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(values + (first + i) * dim + d, square[i]);
    }
  }
}

template <class T>
class Tile {
 public:
  Tile(const Call& call, const Task& task)
      : call_(call),
        task_(task),
        keys_(call, call.key, call.key_dim, task.sequence, task.kv_head),
        values_(call, call.value, call.value_dim, task.sequence, task.kv_head) {
    const int64_t rows = task.rows(), tiles = (rows + kTileM - 1) / kTileM;
    height_ = (rows + tiles - 1) / tiles;
    load_queries();
  }

  void run() {
    Result result(call_, task_);
    const int64_t apart = Partial::floats(task_.rows(), call_.value_dim);
    for (int64_t block = task_.begin; block < task_.end; ++block) {
      float* const partial = task_.partials ? task_.partials + (block - task_.begin) * apart : partial_;
      attend_block(block, partial);
      if (!task_.partials) result.add(block, partial);
    }
    if (!task_.partials) result.finish();
  }

 private:
  // Scaled so that scores are powers of two, or what tanh takes. [tile of M rows][key_dim][M].
  void load_queries() {
    const float scale = call_.softcap > 0 ? call_.scale / call_.softcap : call_.scale * kLog2e;
    alignas(64) float row[kMaxKeyDim];
    for (int64_t r = 0; r < task_.rows(); ++r) {
      const int64_t token = task_.token + r / task_.heads, head = task_.head + r % task_.heads;
      prepare(call_, call_.qkv + token * call_.width() + head * call_.key_dim, call_.q_norm, token, scale, row);
      const int64_t first = r / height_ * height_, m = rows_from(first);
      float* to = q_ + first * call_.key_dim + r - first;
      for (int64_t d = 0; d < call_.key_dim; ++d) to[d * m] = row[d];
    }
  }

  int64_t rows_from(int64_t first) const { return smaller(height_, task_.rows() - first); }

  void attend_block(int64_t block, float* partial) {
    const int64_t rows = task_.rows(), size = call_.value_dim;
    const Range seen = look(block, partial);
    score(block, seen);
    float *top = partial + rows * size, *total = top + rows;
    const float softcap = call_.softcap * kLog2e;
    for (int64_t r = 0; r < rows; ++r) {
      if (seen_[r].empty()) continue;
      weigh<Pages<T>::quantized>(scores_ + r * kBlock, seen_[r], softcap, key_scale_, value_scale_, top + r, total + r);
      std::memset(partial + r * size, 0, size * sizeof(float));
    }
    add(block, seen);
  }

  // What each row sees of the block; returns what any does.
  Range look(int64_t block, float* sums) {
    const Range whole = {block * kBlock, block * kBlock + kBlock};
    Range any_of_all = {kBlock, 0};
    tiles_ = 0;
    for (int64_t first = 0; first < task_.rows(); first += height_) {
      const int64_t m = rows_from(first);
      Range any = {kBlock, 0}, all = {0, kBlock};
      for (int64_t r = first; r < first + m; ++r) {
        const int64_t position = task_.position + r / task_.heads;
        Range seen = Range{call_.first_seen(position), position + 1}.within(whole);
        seen = seen.empty() ? Range{0, 0} : Range{seen.begin - whole.begin, seen.end - whole.begin};
        seen_[r] = seen;
        all = all.within(seen);
        if (!seen.empty()) any = {smaller(any.begin, seen.begin), larger(any.end, seen.end)};
      }
      if (any.empty()) continue;
      any_of_all = {smaller(any.begin, any_of_all.begin), larger(any.end, any_of_all.end)};
      rows_[tiles_] = {q_ + first * call_.key_dim, scores_ + first * kBlock, sums + first * call_.value_dim,
                       seen_ + first, any, all};
      height_of_[tiles_++] = m;
    }
    return any_of_all;
  }

  void score(int64_t block, Range seen) {
    const int64_t size = call_.key_dim, near = tiles_ > 1 ? kNearFloats : kScratchFloats;
    const int64_t fits = smaller(larger(near / (kStrip * size), 1), kPanelStrips);
    const int64_t last = (seen.end + kStrip - 1) / kStrip;
    for (int64_t first = seen.begin / kStrip; first < last; first += fits) {
      const int64_t end = smaller(first + fits, last);
      const float* strips[kPanelStrips];
      for (int64_t s = first; s < end; ++s) {
        T* const strip = keys_.strip(block * kBlock + s * kStrip);
        if constexpr (Pages<T>::quantized) {
          float* const floats = scratch_ + (s - first) * kStrip * size;
          widen(strip, kStrip * size, floats);
          strips[s - first] = floats;
          std::memcpy(key_scale_ + s * kStrip, keys_.scales(strip), kStrip * sizeof(float));
        } else {
          strips[s - first] = strip;
        }
      }
      for (int64_t t = 0; t < tiles_; ++t) {
        const int64_t from = larger(first, rows_[t].any.begin / kStrip);
        const int64_t to = smaller(end, (rows_[t].any.end + kStrip - 1) / kStrip);
        if (from >= to) continue;
        Kernel::scores[height_of_[t] - 1](
            rows_[t].q, size, strips + from - first, to - from, rows_[t].scores + from * kStrip);
      }
    }
    if constexpr (Pages<T>::quantized) {
      for (int64_t s = seen.begin / kStrip; s < last; ++s) {
        if (call_.value_in_key) {
          std::memcpy(value_scale_ + s * kStrip, key_scale_ + s * kStrip, kStrip * sizeof(float));
        } else {
          T* const strip = values_.strip(block * kBlock + s * kStrip);
          std::memcpy(value_scale_ + s * kStrip, values_.scales(strip), kStrip * sizeof(float));
        }
      }
    }
  }

  void add(int64_t block, Range seen) {
    const int64_t size = call_.value_dim;
    const bool direct = !Pages<T>::quantized && !call_.value_in_key;
    const int64_t near = tiles_ > 1 ? (direct ? kBlock * size : kScratchFloats) : kNearFloats;
    const int64_t fits = larger(near / (kStrip * size), 1);
    const int64_t last = (seen.end + kStrip - 1) / kStrip;
    const float* strips[kBlockStrips];
    for (int64_t first = seen.begin / kStrip; first < last; first += fits) {
      const int64_t end = smaller(first + fits, last);
      for (int64_t s = first; s < end; ++s) strips[s] = floats(block * kBlock + s * kStrip, s - first);
      for (int64_t t = 0; t < tiles_; ++t) {
        Kernel::values[height_of_[t] - 1](rows_[t], {first * kStrip, end * kStrip}, strips, size);
      }
    }
  }

  // The values [kStrip][value_dim] of the 16 entries from `entry` on, in the scratch where they are not floats.
  const float* floats(int64_t entry, int64_t place) {
    float* const to = scratch_ + place * kStrip * call_.value_dim;
    if (call_.value_in_key) {
      transpose_strip(keys_.strip(entry), call_.value_dim, to);
    } else if constexpr (Pages<T>::quantized) {
      widen(values_.strip(entry), kStrip * call_.value_dim, to);
    } else {
      return values_.strip(entry);
    }
    return to;
  }

  const Call& call_;
  const Task& task_;
  const Pages<T> keys_, values_;
  int64_t height_;  // rows of a register tile; the last may have fewer
  int64_t tiles_;   // register tiles that see something of the block
  Rows rows_[kTileRows];
  int64_t height_of_[kTileRows];
  Range seen_[kTileRows];
  alignas(64) float q_[kTileFloats];
  alignas(64) float partial_[kTileFloats + 2 * kTileRows];
  alignas(64) float scores_[kTileRows * kBlock];
  alignas(64) float scratch_[kScratchFloats];
  alignas(64) float key_scale_[kBlock], value_scale_[kBlock];
};

}  // namespace moevlm::attention::MOEVLM_ISA
