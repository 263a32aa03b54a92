// y = x W^T + bias over quantized weights, packed as packing.h says; or for each head its part of x times its own W.
#pragma once
#include "matmul/kernels.h"
#include "parallel.h"

namespace moevlm::matmul {

struct LinearShape {
  int64_t n, k;  // of a head
  Packing packing;
  int64_t heads = 1;  // weights lie one after the other

  int64_t head_bytes() const { return packing.bytes(n, k); }
  int64_t weight_bytes() const { return heads * head_bytes(); }
  int64_t scratch_bytes(int64_t tokens) const { return tokens * heads * packing.activation_bytes(k); }
};

// x [tokens, heads * k], bias [heads * n] or null -> y [tokens, heads * n]. scratch: shape.scratch_bytes(tokens).
void linear(const LinearShape& shape, const Kernels& kernels, const Pool& pool, const float* x, int64_t tokens,
            const uint8_t* weight, const float* bias, float* y, uint8_t* scratch);

// x [tokens, k] -> quantized rows, one after another.
void quantize_rows(const Kernels& kernels, const Pool& pool, Packing packing, const float* x, int64_t tokens, int64_t k,
                   uint8_t* rows);

// How many tasks a product makes that reads `bytes` of weights and does `macs` multiplications: a task takes a few
// microseconds. Shorter ones would be all overhead, longer ones would leave threads without work. From 1 to `most`.
int64_t task_count(int64_t bytes, int64_t macs, int64_t most);

}  // namespace moevlm::matmul
