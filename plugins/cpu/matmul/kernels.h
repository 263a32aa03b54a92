// The inner loops of the matrix products and of what stands between them: a table of functions per instruction set.
#pragma once
#include <cstdint>

#include "matmul/packing.h"
#include "simd/instruction_set.h"

namespace moevlm::matmul {

// Rows of activations that one call of a panel kernel takes, at most.
constexpr int kMaxRows = 6;
// The same of float products, and how many values of a row are in one sum, which is then added to the others: the
// rounding of longer sums shows.
constexpr int kMaxFloatRows = 12, kFloatDepth = 128;

// Bytes of weights to prefetch ahead: nearly twice what one core reads, at 33 to 41 GB/s, in the 130 ns in which memory
// answers. With 6144 a product with one row takes up to 6 % longer.
constexpr int64_t kAhead = 8192;

// Products of the 32 rows of a panel with `rows` quantized rows of activations: out[r * 32 + i]. `ahead` is where the
// caller will read after this panel; the kernel prefetches it.
using PanelKernel = void (*)(const uint8_t* panel, const uint8_t* ahead, const uint8_t* const* x, int rows,
                             int64_t groups, int group_size, float* out);

enum class Activation : int { silu, gelu_tanh, swiglu_clamped };

struct ActivationSpec {
  Activation kind;
  bool gated;
  float alpha, limit;
};

enum class Scoring : int { softmax, sigmoid, softmax_after_topk };

struct Kernels {
  PanelKernel (*panel)(Packing packing);
  // out[rows][32] += x[rows][depth] times panel[depth][32]; a row of x has kFloatDepth values, of which depth count.
  void (*float_panel)(const float* panel, const float* x, int rows, int64_t depth, float* out);
  // x [k] -> one quantized row.
  void (*quantize)(const float* x, int64_t k, Packing packing, uint8_t* row);
  // A panel of an expert's first product -> its 16 (gated) or 32 channels; v = factor * out + bias.
  void (*activate)(const float* out, const float* bias, float factor, const ActivationSpec& spec, float* channels);
  // y[i] = out[i] + bias[i], and y[i] += weight * (out[i] + bias[i]), for i < count <= 32; bias has 32 values.
  void (*store)(const float* out, const float* bias, int count, float* y);
  void (*accumulate)(const float* out, const float* bias, float weight, int count, float* y);
  // In place, as numpy computes them.
  void (*softmax)(float* x, int64_t n);
  void (*sigmoid)(float* x, int64_t n);
  float (*sum)(const float* x, int64_t n);
};

// The fastest that need no more than `set`. Products of bytes are faster with avx512_vnni than with avx2, and with
// avx512 alone they are not: it has the kernels of avx2.
const Kernels& kernels(InstructionSet set);

}  // namespace moevlm::matmul
