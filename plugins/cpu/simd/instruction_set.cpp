#include "simd/instruction_set.h"

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>

namespace moevlm {
namespace {

InstructionSet cap() {
  const char* const value = std::getenv("MOEVLM_CPU_ISA");
  if (!value || !*value) return InstructionSet::avx512_vnni;
  std::string allowed;
  int i = 0;
  for (const char* name : kInstructionSets) {
    if (std::string(value) == name) return static_cast<InstructionSet>(i);
    allowed += (i++ ? ", " : "") + std::string(name);
  }
  throw std::invalid_argument("MOEVLM_CPU_ISA = \"" + std::string(value).substr(0, 40) + "\" (allowed: " + allowed +
                              ")");
}

}  // namespace

bool has(InstructionSet set) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const auto all = [](auto... present) { return (... && (present != 0)); };
  switch (set) {
    case InstructionSet::baseline: return true;
    case InstructionSet::avx2:
      return all(__builtin_cpu_supports("avx2"), __builtin_cpu_supports("fma"), __builtin_cpu_supports("f16c"));
    case InstructionSet::avx512:
      return has(InstructionSet::avx2) && all(__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"),
                                              __builtin_cpu_supports("avx512dq"), __builtin_cpu_supports("avx512vl"));
    case InstructionSet::avx512_vnni: return has(InstructionSet::avx512) && __builtin_cpu_supports("avx512vnni");
  }
#endif
  return set == InstructionSet::baseline;
}

InstructionSet instruction_set() {
  static const InstructionSet chosen = [] {
    int set = static_cast<int>(cap());
    while (!has(static_cast<InstructionSet>(set))) --set;
    return static_cast<InstructionSet>(set);
  }();
  return chosen;
}

}  // namespace moevlm

// Writes the name of the instruction set in use and returns true; or what is wrong with MOEVLM_CPU_ISA, and false.
extern "C" __attribute__((visibility("default"))) bool moevlm_instruction_set(char* text, size_t size) noexcept {
  try {
    std::snprintf(text, size, "%s", moevlm::kInstructionSets[static_cast<int>(moevlm::instruction_set())]);
    return true;
  } catch (const std::exception& error) {
    std::snprintf(text, size, "%s", error.what());
    return false;
  }
}
