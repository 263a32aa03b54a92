// What TensorRT gives a plugin, held against what its kernels were compiled for.
#pragma once
#include "abi.h"
#include "program.h"

namespace moevlm::tensorrt {

// Throw std::invalid_argument naming the tensor, what it is, and what is allowed; return the sizes of the program's
// symbols.
Ranges check(const Program& program, const abi::DynamicTensorDesc* in, int32_t inputs,
             const abi::DynamicTensorDesc* out, int32_t outputs);
Sizes check(const Program& program, const abi::TensorDesc* in, int32_t inputs, const abi::TensorDesc* out,
            int32_t outputs);

void check_counts(const Program& program, int32_t inputs, int32_t outputs);

// The sizes of the symbols, from the inputs that give them; nothing else is looked at.
Ranges ranges_of(const Program& program, const abi::DynamicTensorDesc* in);
Sizes sizes_of(const Program& program, const abi::TensorDesc* in);

}  // namespace moevlm::tensorrt
