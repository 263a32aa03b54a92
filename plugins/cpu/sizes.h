// The largest sizes that the operators take, and how sizes are multiplied and divided. moevlm.plugins.cpu.limits is the
// same table for Python. Sizes and indices are int64_t, as in ONNX.
#pragma once
#include <cstdint>

namespace moevlm {

constexpr int64_t kMaxHeads = 1024;
constexpr int64_t kMaxKeyDim = 576, kMaxValueDim = 512;  // of PagedAttention: a latent of 512 and 64 rotated dimensions
constexpr int64_t kMaxHeadDim = 1 << 14;  // of HeadLinear, in and out
constexpr int64_t kMaxDeltaDim = 256, kMaxConvolution = 16;  // of GatedDelta: of keys and values, and tokens
constexpr int64_t kMaxEntries = 1 << 30;                 // of a sequence
constexpr int64_t kMaxWidth = 1 << 24;                   // of a row of activations or of a weight
constexpr int64_t kMaxExperts = 4096;
constexpr int64_t kMaxCandidates = 4096;   // of a row of logits
constexpr int64_t kMaxTokens = INT32_MAX;  // of a call, and of pairs of a token and an expert

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// a * b of sizes that are 0 or more; the largest integer, which is no tensor's size, where that does not fit.
inline int64_t product(int64_t a, int64_t b) {
  int64_t result = 0;
  return __builtin_mul_overflow(a, b, &result) ? INT64_MAX : result;
}

}  // namespace moevlm
