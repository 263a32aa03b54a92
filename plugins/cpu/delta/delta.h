// One call of GatedDelta, and the kernels that it is made of.

#pragma once

#include <cstdint>

#include "parallel.h"
#include "sizes.h"

namespace moevlm::delta {

// A "token" is a token's place among those of the call, a "column" one of the value_dim columns of a head's state.
//
// The bits of a token's result depend on its sequence up to that token, and on nothing else: not on where the sequence
// was cut into calls, so that a prompt equals its tokens one by one. For that, every column goes through the same
// operations in the same order, token after token: a column of kS and of qS is two sums, of even and of odd rows. How
// many columns go side by side, and whether a state lies in memory or in a cache between two tokens, decides nothing.
struct Call {
  const float* qkv;            // [tokens, channels]
  const float* a;              // [tokens, value_heads]
  const float* b;
  const float* conv_weight;    // [kernel, channels]
  const float* rate;           // [value_heads]
  const float* dt_bias;
  const int32_t* query_start;  // [sequences + 1]
  const int32_t* state_row;    // [sequences]; no two sequences with tokens share one
  float* conv_state;           // [rows, kernel - 1, channels]
  float* delta_state;          // [rows, value_heads, key_dim, value_dim]
  float* y;                    // [tokens, value_heads * value_dim]
  int64_t tokens, sequences, rows;
  int64_t key_heads, value_heads, key_dim, value_dim, kernel;
  float scale, epsilon;

  int64_t group() const { return value_heads / key_heads; }
  int64_t channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
  // Of the convolution's channels: queries' heads, keys' heads, values' heads.
  int64_t channel_heads() const { return 2 * key_heads + value_heads; }
};

// Consecutive tokens of a sequence.
struct Piece {
  int64_t sequence, token, tokens;
};

// What the states are given of a block of tokens, each head's tokens side by side.
struct Block {
  int64_t first, tokens;
  const int32_t* sequence_of;  // [tokens]
  float* heads;                // as in qkv: [key_heads, tokens, key_dim] twice, [value_heads, tokens, value_dim]
  float* decay;                // [value_heads, tokens]
  float* beta;

  const float* query(const Call& call, int64_t head) const { return heads + head * tokens * call.key_dim; }
  const float* key(const Call& call, int64_t head) const { return query(call, call.key_heads + head); }
  float* value(const Call& call, int64_t head) const {
    return heads + (2 * call.key_heads * call.key_dim + head * call.value_dim) * tokens;
  }
};

// Compiled once per instruction set, from kernels.h.
struct Kernels {
  int64_t lanes;  // key_dim and value_dim must be multiples
  int64_t columns;  // that several tokens of a sequence are best taken with, at least
  // Tokens begin to end of the block: convolution, silu, and the length of queries and keys. head: of channel_heads.
  void (*mix)(const Call&, const Block&, int64_t head, int64_t begin, int64_t end);
  // Takes columns begin to end of a value head's state through a piece's tokens, and writes these columns of y.
  void (*advance)(const Call&, const Block&, const Piece&, int64_t head, int64_t begin, int64_t end);
};

// Throws std::bad_alloc.
void run(const Call&, const Pool&);

}  // namespace moevlm::delta
