// The operators Linear, FloatLinear, HeadLinear, MoEExperts and MoERouter of domain moevlm.cpu.
#pragma once
#include "ort/abi.h"

namespace moevlm::matmul {

// Null after the last.
const ort::CustomOp* const* matmul_operators();

}  // namespace moevlm::matmul
