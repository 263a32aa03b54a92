// The instruction sets that kernels are compiled for, and the one that this process uses.
#pragma once
#include <cstdint>

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

// Of such tables, whose kernels take heads in vectors of `lanes`, the last whose vectors divide both sizes of a head;
// `pairs` where none does.
template <class Kernels>
const Kernels& fastest_for_heads(const Kernels& pairs, const Kernels* const (&tables)[4], int64_t key_dim,
                                 int64_t value_dim, InstructionSet set) {
  const auto fitting = [&](int i) {
    const Kernels* const table = tables[i];
    return table && key_dim % table->lanes == 0 && value_dim % table->lanes == 0 ? table : nullptr;
  };
  const Kernels* const first = fitting(0) ? fitting(0) : &pairs;
  const Kernels* const found[4] = {first, fitting(1), fitting(2), fitting(3)};
  return fastest(found, set);
}

}  // namespace moevlm
