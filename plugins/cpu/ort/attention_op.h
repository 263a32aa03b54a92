// The operator PagedAttention of domain moevlm.cpu, for float32 and for int8 caches.
#pragma once
#include "ort/abi.h"

namespace moevlm {

// Null after the last.
const ort::CustomOp* const* attention_operators();

}  // namespace moevlm
