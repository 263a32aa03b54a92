// y = x W^T + bias over packed weights.
#pragma once
#include "matmul/kernels.h"
#include "parallel.h"

namespace moevlm::quantized {

struct LinearShape {
  size_t n, k;
  Packing packing;

  size_t weight_bytes() const { return packing.bytes(n, k); }
  size_t scratch_bytes(size_t tokens) const { return tokens * packing.activation_bytes(k); }
};

// x [tokens, k], bias [n] or null -> y [tokens, n]. scratch: shape.scratch_bytes(tokens).
void linear(const LinearShape& shape, const Kernels& kernels, const Pool& pool, const float* x, size_t tokens,
            const uint8_t* weight, const float* bias, float* y, uint8_t* scratch);

// x [tokens, k] -> quantized rows, one after another.
void quantize_rows(const Kernels& kernels, const Pool& pool, Packing packing, const float* x, size_t tokens, size_t k,
                   uint8_t* rows);

// Into how many parts to cut a product that reads `bytes` of weights and does `products` multiplications, so that a
// part takes a few microseconds: less would be all overhead, more would leave threads without work.
size_t parts(size_t bytes, size_t products, size_t limit);

}  // namespace moevlm::quantized
