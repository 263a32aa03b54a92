// The operator Candidates of domain moevlm.cpu.
#pragma once
#include "ort/abi.h"

namespace moevlm {

// Null after the last.
const ort::CustomOp* const* candidates_operators();

}  // namespace moevlm
