// Bytes to a program.
#pragma once
#include <cstdint>
#include <limits>

#include "program.h"

namespace moevlm::tensorrt {

constexpr uint32_t kMaxTokens = std::numeric_limits<int32_t>::max();

// Fills in what program.bytes describe. Throws std::invalid_argument that says what is wrong and where.
void read_program(Program& program);

}  // namespace moevlm::tensorrt
