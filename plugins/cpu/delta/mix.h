// The convolution and what follows it, head by head. Included by kernels.h, once per instruction set.

#pragma once

#include <cmath>

#include "delta/delta.h"
#include "simd/vector.h"

namespace moevlm::delta::MOEVLM_ISA {

using namespace moevlm::MOEVLM_ISA;

constexpr float kLog2e = 1.44269504f;
constexpr int64_t kAhead = 8;  // tokens

MOEVLM_INLINE Vec silu(Vec x) {
  const Vec power = exp2(absolute(x) * -kLog2e);
  return x * (x < 0.0f ? power : broadcast(1.0f)) / (1.0f + power);
}

// The convolution's inputs for a token, the oldest first: those before the call are in the sequence's row.
struct Taps {
  const float* at[kMaxConvolution];

  Taps(const Call& call, const Block& block, int64_t token) {
    const int64_t sequence = block.sequence_of[token - block.first], kept = call.kernel - 1;
    const int64_t first = token - kept, start = call.query_start[sequence], channels = call.channels();
    const float* const row = call.conv_state + call.state_row[sequence] * kept * channels;
    for (int64_t j = 0; j < call.kernel; ++j) {
      const int64_t source = first + j;
      at[j] = source < start ? row + (kept + source - start) * channels : call.qkv + source * channels;
    }
  }
};

inline void mix(const Call& call, const Block& block, int64_t head, int64_t begin, int64_t end) {
  const bool value = head >= 2 * call.key_heads;
  const int64_t key_channels = 2 * call.key_heads * call.key_dim, channels = call.channels();
  const int64_t size = value ? call.value_dim : call.key_dim;
  const int64_t channel = value ? key_channels + (head - 2 * call.key_heads) * size : head * size;
  const float factor = head < call.key_heads ? call.scale : 1.0f;
  for (int64_t t = begin; t < end; ++t) {
    const Taps taps(call, block, block.first + t);
    float* const out = block.heads + channel * block.tokens + t * size;
    Vec squares = {};
    for (int64_t d = 0; d < size; d += kLanes) {
      Vec mixed = {};
      for (int64_t j = 0; j < call.kernel; ++j) {
        mixed = fma(load(taps.at[j] + channel + d), load(call.conv_weight + j * channels + channel + d), mixed);
      }
      // Tokens lie a row of qkv apart, which no processor guesses: without this it takes half as long again.
      prefetch(call.qkv, ((block.first + t + kAhead) * channels + channel + d) * sizeof(float));
      mixed = silu(mixed);
      squares = fma(mixed, mixed, squares);
      store(out + d, mixed);
    }
    if (value) continue;
    const Vec length = broadcast(factor / std::sqrt(sum(squares) + call.epsilon));
    for (int64_t d = 0; d < size; d += kLanes) store(out + d, load(out + d) * length);
  }
}

}  // namespace moevlm::delta::MOEVLM_ISA
