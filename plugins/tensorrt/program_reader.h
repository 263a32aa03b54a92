// Bytes to a program.
#pragma once
#include "program.h"

namespace moevlm::tensorrt {

// Fills in what program.bytes describe. Throws std::invalid_argument that says what is wrong and where.
void read_program(Program& program);

}  // namespace moevlm::tensorrt
