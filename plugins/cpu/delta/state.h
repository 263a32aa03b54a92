// A head's state from token to token. Included by kernels.h, once per instruction set.

#pragma once

#include "delta/mix.h"

namespace moevlm::delta::MOEVLM_ISA {

// Vectors of columns that go through a token side by side: of one token alone, as many as the registers hold; of
// several, so few that all rows of these columns stay in any processor's first-level cache.
constexpr int kAlone = MOEVLM_REGISTERS / 4, kTogether = 2;

// Rows of some columns of a state, `width` apart.
struct Rows {
  float* at;
  int64_t width;
};

// N vectors of a sum over rows: even rows in one, odd ones in the other.
template <int N>
struct Sums {
  Vec part[2][N] = {};

  MOEVLM_INLINE Vec total(int n) const { return part[0][n] + part[1][n]; }
};

// kS
template <int N>
MOEVLM_INLINE void look_up(Rows state, int64_t rows, const float* key, Sums<N>& found) {
  for (int64_t i = 0; i < rows; i += 2) {
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const float* const row = state.at + (i + odd) * state.width;
      const Vec factor = broadcast(key[i + odd]);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) found.part[odd][n] = fma(load(row + n * kLanes), factor, found.part[odd][n]);
    }
  }
}

// S = decay S + k change; read: qS; with Next, found: the next token's kS. `to` may be `from`.
template <int N, bool Next>
MOEVLM_INLINE void update(Rows from, Rows to, int64_t rows, float decay, const Vec* change, const float* key,
                          const float* query, const float* next_key, Sums<N>& read, Sums<N>& found) {
  const Vec kept = broadcast(decay);
  for (int64_t i = 0; i < rows; i += 2) {
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const float* const row = from.at + (i + odd) * from.width;
      float* const out = to.at + (i + odd) * to.width;
      const Vec k = broadcast(key[i + odd]), q = broadcast(query[i + odd]);
      const Vec next = Next ? broadcast(next_key[i + odd]) : Vec{};
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        const Vec state = fma(k, change[n], load(row + n * kLanes) * kept);
        store(out + n * kLanes, state);
        read.part[odd][n] = fma(state, q, read.part[odd][n]);
        if constexpr (Next) found.part[odd][n] = fma(state, next, found.part[odd][n]);
      }
    }
  }
}

// N vectors of columns, from `column` on, through all tokens of a piece.
template <int N>
void advance_columns(const Call& call, const Block& block, const Piece& piece, int64_t head, int64_t column) {
  const int64_t rows = call.key_dim, width = call.value_dim, offset = piece.token - block.first;
  const float* key = block.key(call, head / call.group()) + offset * rows;
  const float* query = block.query(call, head / call.group()) + offset * rows;
  const float* value = block.value(call, head) + offset * width + column;
  const float *decay = block.decay + head * block.tokens + offset, *beta = block.beta + head * block.tokens + offset;
  const int64_t row = call.state_row[piece.sequence];
  const Rows memory = {call.delta_state + (row * call.value_heads + head) * rows * width + column, width};
  float* y = call.y + (piece.token * call.value_heads + head) * width + column;
  alignas(64) float near[kMaxDeltaDim * kTogether * kLanes];
  const Rows cached = {near, N * kLanes};
  Sums<N> found;
  look_up<N>(memory, rows, key, found);
  for (int64_t t = 0; t < piece.tokens; ++t) {
    Vec change[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      change[n] = fma(found.total(n), broadcast(-decay[t]), load(value + n * kLanes)) * broadcast(beta[t]);
    }
    const bool last = t + 1 == piece.tokens;
    const Rows from = t ? cached : memory, to = last ? memory : cached;
    Sums<N> read;
    found = {};
    if (last) {
      update<N, false>(from, to, rows, decay[t], change, key, query, nullptr, read, found);
    } else {
      update<N, true>(from, to, rows, decay[t], change, key, query, key + rows, read, found);
    }
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) store(y + n * kLanes, read.total(n));
    key += rows;
    query += rows;
    value += width;
    y += call.value_heads * width;
  }
}

// The widest that fit, N at first.
template <int N>
MOEVLM_INLINE void advance_widest(const Call& call, const Block& block, const Piece& piece, int64_t head,
                                  int64_t begin, int64_t end) {
  for (; begin + N * kLanes <= end; begin += N * kLanes) advance_columns<N>(call, block, piece, head, begin);
  if constexpr (N > 1) advance_widest<N / 2>(call, block, piece, head, begin, end);
}

inline void advance(const Call& call, const Block& block, const Piece& piece, int64_t head, int64_t begin,
                    int64_t end) {
  if (piece.tokens == 1) {
    advance_widest<kAlone>(call, block, piece, head, begin, end);
  } else {
    advance_widest<kTogether>(call, block, piece, head, begin, end);
  }
}

}  // namespace moevlm::delta::MOEVLM_ISA
