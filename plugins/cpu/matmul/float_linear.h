// y = x W^T + bias in floats, for what is never quantized: the routers. Or for each head its part of x times its own W.
//
// A weight W [N, K] is stored as panels of 32 rows: ceil(N / 32) times K lines of 32 values, one for each row, with
// zeros for rows past N; those of heads, one after the other. moevlm.export.formats.cpu_packing writes this layout.
#pragma once
#include "matmul/kernels.h"
#include "parallel.h"

namespace moevlm::matmul {

struct FloatLinearShape {
  int64_t n, k;
  int64_t heads = 1;

  int64_t panels() const { return ceil_div(n, kPanel); }  // of a head
  int64_t head_weights() const { return panels() * kPanel * k; }
  int64_t weights() const { return heads * head_weights(); }
};

// x [tokens, heads * k], weight [shape.weights()], bias [heads * n] or null -> y [tokens, heads * n].
void float_linear(const FloatLinearShape& shape, const Kernels& kernels, const Pool& pool, const float* x,
                  int64_t tokens, const float* weight, const float* bias, float* y);

}  // namespace moevlm::matmul
