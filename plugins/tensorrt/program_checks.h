// Whether what a program asks for is in range, at all sizes that its variants' bounds let through.
#pragma once
#include <array>
#include <string>
#include <vector>

#include "program.h"

namespace moevlm::tensorrt {

std::string text(const Linear& linear);  // "3 + 2 T"
bool has_negative(const Linear& linear);

// What each symbol may be in some variant of every image.
Sizes find_largest(const Program& program);

// Throw std::invalid_argument that says what is wrong and where. ranges: what a variant's bounds let through.
void check_outputs(const Program& program);
void check_grid(const std::array<Count, 3>& grid, const Kernel& kernel, const Program& program, const Ranges& ranges);
void check_buffers(const std::vector<Count>& buffers, const Program& program, const Ranges& ranges);
void check_map(const TensorMap& map, const Program& program, const Ranges& ranges);

}  // namespace moevlm::tensorrt
