// One call of PagedAttention, and the kernels that it is made of.

#pragma once

#include <cstddef>
#include <cstdint>

#include "parallel.h"
#include "sizes.h"

namespace moevlm::attention {

// Below, an "entry" is a token's place in its sequence, a "token" its place among the new ones of the call, a "row" one
// head's query of a token, and a "group" the query heads that share a key/value head.
//
// The bits of a row's result depend on its query and on the entries it sees, and on nothing else of the call. For that,
// a sequence is cut into blocks of kBlock entries at fixed places; a row's scores, weights and sums of one block are
// made from nothing, each sum in the order of the entries; and blocks are joined from left to right. How many rows go
// through a kernel side by side, and which thread takes which blocks, decides nothing else.
constexpr int64_t kBlock = 256;
constexpr int64_t kStrip = 16;  // tokens whose keys lie transposed: see pages.h
constexpr int64_t kBlockStrips = kBlock / kStrip;

struct Call {
  const float* qkv;     // [tokens, (heads + kv_heads) * key_dim + kv_heads * value_dim]; no values if value_in_key or value_is_key
  const float* cos;     // [tokens, rotary_dim / 2]; null where rotary_dim is 0
  const float* sin;
  const float* q_norm;  // [key_dim], or null
  const float* k_norm;
  const float* sinks;   // [heads], or null
  const int32_t* query_start;  // [sequences + 1]
  const int32_t* context_len;  // [sequences]: entries that were there before this call
  const int32_t* page_table;   // [sequences, table_width]
  const int32_t* visible_end;  // [tokens]: the entry where what a token sees ends; null: each sees up to itself
  void* key;    // [pages, kv_heads, page, key_dim] float, or [..., key_dim + 4] int8
  void* value;  // the same with value_dim; null if value_in_key
  float* y;     // [tokens, heads * value_dim]
  int64_t tokens, sequences, pages, page, table_width;
  int64_t heads, kv_heads, key_dim, value_dim, rotary_dim, rotary_start;
  int64_t window;  // entries that a row sees, or 0: all
  int64_t chunk;   // a row sees those of its own chunk of so many entries; or 0: all
  float scale, softcap, epsilon;
  bool quantized, value_in_key, value_is_key, value_norm;

  int64_t group() const { return heads / kv_heads; }
  int64_t width() const {
    return (heads + kv_heads) * key_dim + (value_in_key || value_is_key ? 0 : kv_heads * value_dim);
  }
  int64_t length(int64_t sequence) const { return query_start[sequence + 1] - query_start[sequence]; }
  int64_t entries(int64_t sequence) const { return context_len[sequence] + length(sequence); }
  // The first entry that a row at `position` sees.
  int64_t first_seen(int64_t position) const {
    const int64_t first = window && position >= window ? position - window + 1 : 0;
    const int64_t start = chunk ? position - position % chunk : 0;
    return start > first ? start : first;
  }
  // The entry behind the last that a row of `token`, which is at `position`, sees of a sequence of so many.
  int64_t end_seen(int64_t token, int64_t position, int64_t entries) const {
    const int64_t wanted = visible_end ? visible_end[token] : 0, most = wanted < entries ? wanted : entries;
    return most > position ? most : position + 1;
  }
};

// Some consecutive tokens of a sequence, with some heads of a group, against some blocks of the sequence.
struct Task {
  int64_t sequence, kv_head;
  int64_t head, heads;
  int64_t token, tokens;
  int64_t position;    // entry of the first token
  int64_t stop;        // the entry behind the last that a token sees
  int64_t begin, end;  // blocks
  bool append;         // first write those of the blocks' entries that are new
  float* partials;     // where each block's result goes, one Partial after the other; null: join them, and write y

  int64_t rows() const { return tokens * heads; }
};

// The result of one block before division: for each row (token by token, a token's heads side by side) value_dim sums;
// then each row's largest score, as a power of two, and each row's sum of weights relative to it. Rows that see nothing
// of the block have nothing there.
struct Partial {
  static int64_t floats(int64_t rows, int64_t value_dim) { return rows * (value_dim + 2); }
};

// Compiled once per instruction set, from kernels.h.
struct Kernels {
  int64_t lanes;  // key_dim and value_dim must be multiples
  void (*append)(const Call&, int64_t sequence, int64_t kv_head, int64_t begin, int64_t end);  // entries
  void (*attend)(const Call&, const Task&);
  // Joins the partial results of the task's blocks and writes y.
  void (*combine)(const Call&, const Task&, const float* partials);
};

// The stack space of a task is fixed. A tile of rows holds kTileFloats of queries and of results.
constexpr int64_t kTaskHeads = 16, kTileRows = 96, kTileFloats = 24 * kMaxKeyDim;
constexpr int64_t kRowUnit = 12;  // a multiple of every instruction set's MOEVLM_TILE_M

constexpr int64_t tile_rows(int64_t head_dim) {
  const int64_t rows = kTileFloats / head_dim < kTileRows ? kTileFloats / head_dim : kTileRows;
  return rows / kRowUnit * kRowUnit;
}
static_assert(kTileRows % kRowUnit == 0 && tile_rows(kMaxKeyDim) >= kTaskHeads && kMaxKeyDim >= kMaxValueDim);

// Throws std::bad_alloc.
void attend(const Call&, const Pool&);

}  // namespace moevlm::attention
