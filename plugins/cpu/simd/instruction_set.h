// The instruction sets that kernels are compiled for, and the one that this process uses.
#pragma once

namespace moevlm {

// Each has all of the one before. The last two differ for products of bytes alone.
enum class InstructionSet : int { baseline, avx2, avx512, avx512_vnni };

constexpr const char* kInstructionSets[] = {"baseline", "avx2", "avx512", "avx512_vnni"};

bool has(InstructionSet set);

// The best that the processor has, and at most what the environment variable MOEVLM_CPU_ISA names: found when first
// asked for. Throws std::invalid_argument for a name that is none of the above.
InstructionSet instruction_set();

// Of tables of kernels, one for each instruction set or null, the last that needs no more than `set`.
template <class Kernels>
const Kernels& fastest(const Kernels* const (&tables)[4], InstructionSet set) {
  int i = static_cast<int>(set);
  while (!tables[i]) --i;
  return *tables[i];
}

}  // namespace moevlm
