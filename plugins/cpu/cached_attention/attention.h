// One call of CachedAttention, and the kernels that it is made of.

#pragma once

#include <cstddef>
#include <cstdint>

#include "parallel.h"
#include "sizes.h"

namespace moevlm {

constexpr int64_t kTaskHeads = 16;

// Below, "entry" is a token's place in the cache, "token" its place among the new ones, and a "group" the query heads
// that share a key/value head.
struct Attention {
  const float* qkv;    // [batch * length, (heads + 2 * kv_heads) * head_dim]
  const float* cos;    // [batch, length, rotary_dim / 2]
  const float* sin;
  const float* q_norm; // [head_dim], or null
  const float* k_norm;
  const int64_t* position; // [batch]: entries in the cache before this call
  void* key;           // [batch, kv_heads, capacity, head_dim] float, or bytes: head_dim int8 and a float scale
  void* value;
  float* y;            // [batch * length, heads * head_dim]
  int64_t batch, length, heads, kv_heads, head_dim, rotary_dim, capacity;
  float epsilon;
  bool quantized;

  int64_t group() const { return heads / kv_heads; }
  int64_t row_bytes() const { return quantized ? head_dim + 4 : head_dim * 4; }
};

// Some consecutive tokens of a sequence, with up to kTaskHeads heads of a group, against some entries of the cache.
struct Task {
  int64_t sequence, kv_head;
  int64_t head, heads;
  int64_t token, tokens;
  int64_t begin, end;  // entries; causality hides more of them from some of the tokens
  bool append;         // first write those of the entries that are new
  float* partial;      // where the unfinished result goes: see Partial; null: finish, and write to y

  int64_t rows() const { return tokens * heads; }
};

// The result of a task before division: rows (token-major, then head) of head_dim sums, and per row the
// maximum score, in powers of two, and the sum of weights relative to it.
struct Partial {
  static int64_t floats(int64_t rows, int64_t head_dim) { return rows * (head_dim + 2); }
};

// Compiled once per instruction set, from kernels.h.
struct Kernels {
  int64_t lanes;  // head_dim must be a multiple
  void (*append)(const Attention&, int64_t sequence, int64_t kv_head, int64_t token, int64_t tokens);
  void (*attend)(const Attention&, const Task&);
  // Joins the partial results of consecutive pieces of the cache.
  void (*combine)(const Attention&, const Task&, const float* partials, int64_t count);
};

// Stack space of a task is fixed. A tile holds kTileFloats of queries, whole register tiles of rows: kRowUnit is a
// multiple of every instruction set's MOEVLM_TILE_M, so that rows rounded up to one still fit.
constexpr int64_t kTileRows = 96, kTileFloats = 96 * 128, kRowUnit = 12;

constexpr int64_t tile_rows(int64_t head_dim) {
  const int64_t rows = kTileFloats / head_dim < kTileRows ? kTileFloats / head_dim : kTileRows;
  return rows / kRowUnit * kRowUnit;
}
static_assert(kTileRows % kRowUnit == 0 && tile_rows(kMaxHeadDim) >= kTaskHeads);

// Throws std::bad_alloc.
void attend(const Attention&, const Pool&);

}  // namespace moevlm
