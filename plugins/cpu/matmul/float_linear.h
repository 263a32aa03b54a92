// y = x W^T + bias in floats, for what is never quantized: the routers.
//
// A weight W [N, K] is stored as panels of 32 rows: ceil(N / 32) times K lines of 32 values, one for each row, with
// zeros for rows past N. moevlm.export.formats.cpu_packing writes this layout.
#pragma once
#include "matmul/kernels.h"
#include "parallel.h"

namespace moevlm::matmul {

struct FloatLinearShape {
  int64_t n, k;

  int64_t panels() const { return ceil_div(n, kPanel); }
  int64_t weights() const { return panels() * kPanel * k; }
};

// x [tokens, k], weight [shape.weights()], bias [n] or null -> y [tokens, n].
void float_linear(const FloatLinearShape& shape, const Kernels& kernels, const Pool& pool, const float* x,
                  int64_t tokens, const float* weight, const float* bias, float* y);

}  // namespace moevlm::matmul
