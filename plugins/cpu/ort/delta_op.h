// The operator GatedDelta of domain moevlm.cpu.
#pragma once
#include "ort/abi.h"

namespace moevlm {

// Null after the last.
const ort::CustomOp* const* delta_operators();

}  // namespace moevlm
