// What differs from one instruction set to the next: a table of functions for each.
#pragma once
#include <cstddef>
#include <cstdint>

#include "simd/instruction_set.h"
#include "matmul/packed.h"

namespace moevlm::quantized {

constexpr int kMaxRows = 6;  // rows of activations that one call of a panel kernel takes

// Of floats: such rows, and the most values of each in one sum, which is then added to the others. The rounding of
// longer sums shows.
constexpr int kMaxFloatRows = 12, kFloatDepth = 128;

// Products of the 32 rows of a panel with `rows` quantized rows of activations: out[r * 32 + i]. `ahead` is where the
// caller will read after this panel; the kernel prefetches it.
using PanelKernel = void (*)(const uint8_t* panel, const uint8_t* ahead, const uint8_t* const* x, int rows,
                             size_t blocks, int block, float* out);

enum class Activation : int { silu, gelu_tanh, swiglu_clamped };

struct ActivationSpec {
  Activation kind;
  bool gated;
  float alpha, limit;
};

enum class Scoring : int { softmax, sigmoid, softmax_after_topk };

struct Kernels {
  PanelKernel (*panel)(Packing packing);
  // x [k] -> one quantized row.
  void (*quantize)(const float* x, size_t k, Packing packing, uint8_t* row);
  // A panel of an expert's first product -> its 16 (gated) or 32 channels; v = factor * out + bias.
  void (*activate)(const float* out, const float* bias, float factor, const ActivationSpec& spec, float* channels);
  // y[i] = out[i] + bias[i], and y[i] += weight * (out[i] + bias[i]), for i < count <= 32; bias has 32 values.
  void (*store)(const float* out, const float* bias, int count, float* y);
  void (*accumulate)(const float* out, const float* bias, float weight, int count, float* y);
  // In place, as numpy computes them.
  void (*softmax)(float* x, size_t n);
  void (*sigmoid)(float* x, size_t n);
  float (*sum)(const float* x, size_t n);
  // out[rows][32] += x[rows][depth] times panel[depth][32]; a row of x has kFloatDepth values, of which depth count.
  void (*float_panel)(const float* panel, const float* x, int rows, size_t depth, float* out);
};

extern const Kernels generic_kernels;
extern const Kernels avx2_kernels, avx512_kernels;  // on x86-64; the latter multiply bytes with VNNI

// The fastest that need no more than `set`.
const Kernels& kernels(InstructionSet set);

}  // namespace moevlm::quantized
