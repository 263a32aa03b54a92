// The rows of a task against one block of the cache after the other. Included by kernels.h, once per instruction set.

#pragma once

#include "attention/append.h"
#include "attention/convert.h"
#include "attention/softmax.h"

namespace moevlm::attention::MOEVLM_ISA {

constexpr int64_t kPanelStrips = 4;  // strips of keys that all rows go through before the next ones
// What of keys or values should stay in the first-level cache while all rows go through it, and what of them may wait
// outside the pages, as floats.
constexpr int64_t kNearFloats = 4096, kScratchFloats = 128 * 128;
static_assert(kScratchFloats >= kStrip * kMaxKeyDim && kScratchFloats >= kTileM * kMaxKeyDim);
constexpr int64_t kFewRows = 16;
// How far ahead of what is read memory is asked for the next: pages lie anywhere, so processors do not foresee it.
constexpr int64_t kAheadBytes = 16384;

template <class T>
class Tile {
 public:
  Tile(const Call& call, const Task& task)
      : call_(call),
        task_(task),
        keys_(call, call.key, call.key_dim, task.sequence, task.kv_head),
        values_(call, call.value, call.value_dim, task.sequence, task.kv_head) {
    const int64_t rows = task.rows(), tiles = ceil_div(rows, kTileM);
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
  }

 private:
  // Scaled so that scores are powers of two, or what tanh takes. [tile of M rows][key_dim][M].
  void load_queries() {
    const float scale = call_.softcap > 0 ? call_.scale / call_.softcap : call_.scale * kLog2e;
    const int64_t size = call_.key_dim;
    for (int64_t first = 0; first < task_.rows(); first += height_) {
      const int64_t m = rows_from(first);
      for (int64_t r = first; r < first + m; ++r) {
        const int64_t token = task_.token + r / task_.heads, head = task_.head + r % task_.heads;
        const float* const x = call_.qkv + token * call_.width() + head * size;
        prepare(call_, x, call_.q_norm, token, scale, scratch_ + (r - first) * size);
      }
      interleave(scratch_, size, m, q_ + first * size);
    }
  }

  // Rows that wait for memory rather than for the multipliers.
  bool few() const { return task_.rows() <= kFewRows; }

  int64_t rows_from(int64_t first) const { return smaller(height_, task_.rows() - first); }

  void attend_block(int64_t block, float* partial) {
    const int64_t rows = task_.rows(), size = call_.value_dim;
    find_strips(block, look(block, partial));
    few() ? score<T>() : score<float>();
    read_scales();
    float *top = partial + rows * size, *total = top + rows;
    const float* const value_scale = call_.value_in_key ? key_scale_ : value_scale_;
    for (int64_t r = 0; r < rows; ++r) {
      if (seen_[r].empty()) continue;
      weigh<Pages<T>::quantized>(
          scores_ + r * kBlock, seen_[r], call_.softcap * kLog2e, key_scale_, value_scale, top + r, total + r);
      std::memset(partial + r * size, 0, size * sizeof(float));
    }
    few() && !call_.value_in_key ? add<T>() : add<float>();
  }

  // What each row sees of the block; returns what any does.
  Range look(int64_t block, float* sums) {
    const Range whole = {block * kBlock, block * kBlock + kBlock};
    const int64_t entries = call_.entries(task_.sequence);
    Range any_of_all = {kBlock, 0};
    tiles_ = 0;
    for (int64_t first = 0; first < task_.rows(); first += height_) {
      const int64_t m = rows_from(first);
      Range any = {kBlock, 0}, all = {0, kBlock};
      for (int64_t r = first; r < first + m; ++r) {
        const int64_t token = r / task_.heads, position = task_.position + token;
        const int64_t end = call_.end_seen(task_.token + token, position, entries);
        Range seen = Range{call_.first_seen(position), end}.within(whole);
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

  static Range strips_of(Range seen) { return {seen.begin / kStrip, ceil_div(seen.end, kStrip)}; }

  // Where the block's strips lie, in the order in which they are read: keys, values, then the next block's keys.
  void find_strips(int64_t block, Range seen) {
    strips_ = strips_of(seen);
    const int64_t count = strips_.end - strips_.begin, begin = block * kBlock + strips_.begin * kStrip;
    T** end = keys_.strips(begin, count, reading_);
    if (!call_.value_in_key) end = values_.strips(begin, count, end);
    if (block + 1 < task_.end) {
      const int64_t entries = smaller(task_.stop - (block + 1) * kBlock, kBlock);
      end = keys_.strips((block + 1) * kBlock, strips_of({0, entries}).end, end);
    }
    readings_ = end - reading_;
    const int64_t bytes = kStrip * keys_.width() * static_cast<int64_t>(sizeof(T));
    ahead_ = smaller(larger(kAheadBytes / bytes, 1), kBlockStrips);
  }

  T* key(int64_t s) const { return reading_[s - strips_.begin]; }
  T* value(int64_t s) const { return reading_[s - strips_.begin + strips_.end - strips_.begin]; }

  // Strip number i in reading order, and what to fetch meanwhile.
  Strip<T> reading(int64_t i) const { return {reading_[i], reading_[smaller(i + ahead_, readings_ - 1)]}; }

  void read_scales() {
    if constexpr (Pages<T>::quantized) {
      for (int64_t s = strips_.begin; s < strips_.end; ++s) {
        std::memcpy(key_scale_ + s * kStrip, keys_.scales(key(s)), kStrip * sizeof(float));
        if (call_.value_in_key) continue;
        std::memcpy(value_scale_ + s * kStrip, values_.scales(value(s)), kStrip * sizeof(float));
      }
    }
  }

  // With U = T the cache goes into the products as it is; for many rows its bytes become floats once, before.
  template <class U>
  void score() {
    const int64_t size = call_.key_dim, near = tiles_ > 1 ? kNearFloats : kScratchFloats;
    const int64_t fits = smaller(larger(near / (kStrip * size), 1), kPanelStrips);
    for (int64_t first = strips_.begin; first < strips_.end; first += fits) {
      const int64_t end = smaller(first + fits, strips_.end);
      Strip<U> strips[kPanelStrips];
      for (int64_t s = first; s < end; ++s) strips[s - first] = keys_as<U>(s, scratch_ + (s - first) * kStrip * size);
      for (int64_t t = 0; t < tiles_; ++t) {
        const Rows& rows = rows_[t];
        const Range part = strips_of(rows.any).within({first, end});
        if (part.empty()) continue;
        Kernel<U>::scores[height_of_[t] - 1](
            rows.q, size, strips + part.begin - first, part.end - part.begin, rows.scores + part.begin * kStrip);
        for (int64_t s = first; s < end; ++s) strips[s - first].ahead = strips[s - first].at;  // fetched
      }
    }
  }

  template <class U>
  void add() {
    const int64_t size = call_.value_dim, near = few() ? kNearFloats : kScratchFloats;
    const int64_t fits = larger(near / (kStrip * size), 1);
    Strip<U> strips[kBlockStrips];
    for (int64_t first = strips_.begin; first < strips_.end; first += fits) {
      const int64_t end = smaller(first + fits, strips_.end);
      for (int64_t s = first; s < end; ++s) strips[s] = values_as<U>(s, scratch_ + (s - first) * kStrip * size);
      const Range part = {first * kStrip, end * kStrip};
      for (int64_t t = 0; t < tiles_; ++t) {
        if (rows_[t].any.within(part).empty()) continue;
        Kernel<U>::values[height_of_[t] - 1](rows_[t], part, strips, size);
        for (int64_t s = first; s < end; ++s) strips[s].ahead = strips[s].at;  // fetched
      }
    }
  }

  template <class U>
  Strip<U> keys_as(int64_t s, float* floats) const {
    if constexpr (sizeof(U) == sizeof(T)) {
      return reading(s - strips_.begin);
    } else {
      widen(key(s), kStrip * call_.key_dim, floats);
      return {floats, floats};
    }
  }

  template <class U>
  Strip<U> values_as(int64_t s, float* floats) const {
    if constexpr (sizeof(U) == sizeof(T)) {
      if (!call_.value_in_key) return reading(s - strips_.begin + strips_.end - strips_.begin);
    } else {
      if (!call_.value_in_key) widen(value(s), kStrip * call_.value_dim, floats);
    }
    if constexpr (sizeof(U) == sizeof(float)) {
      if (call_.value_in_key) transpose_strip(key(s), call_.value_dim, floats);
      return {floats, floats};
    }
    return {};  // values in bytes of keys do not come here
  }

  const Call& call_;
  const Task& task_;
  const Pages<T> keys_, values_;
  int64_t height_;  // rows of a register tile; the last may have fewer
  int64_t tiles_;   // register tiles that see something of the block
  Range strips_;    // of the block that are seen
  T* reading_[3 * kBlockStrips];
  int64_t readings_, ahead_;
  Rows rows_[kTileRows];
  int64_t height_of_[kTileRows];
  Range seen_[kTileRows];
  alignas(64) float q_[kTileFloats + kLanes];
  alignas(64) float partial_[kTileFloats + 2 * kTileRows];
  alignas(64) float scores_[kTileRows * kBlock];
  alignas(64) float scratch_[kScratchFloats];
  alignas(64) float key_scale_[kBlock], value_scale_[kBlock];
};

}  // namespace moevlm::attention::MOEVLM_ISA
