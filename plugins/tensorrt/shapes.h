// What TensorRT gives a plugin, held against what its kernels were compiled for.
#pragma once
#include "abi.h"
#include "program.h"

namespace moevlm::tensorrt {

struct Tokens {
  int64_t least, most;
};

// Throw std::invalid_argument naming the tensor, what it is, and what is allowed; return the number of tokens.
Tokens check(const Program& program, const abi::DynamicTensorDesc* in, int32_t inputs,
             const abi::DynamicTensorDesc* out, int32_t outputs);
int64_t check(const Program& program, const abi::TensorDesc* in, int32_t inputs, const abi::TensorDesc* out,
              int32_t outputs);

void check_counts(const Program& program, int32_t inputs, int32_t outputs);

// A tensor and its dimension that is the number of tokens.
struct TokensAt {
  size_t input, dimension;
};
TokensAt tokens_at(const Program& program);

}  // namespace moevlm::tensorrt
