#include "matmul/kernels.h"

namespace moevlm::quantized {

const Kernels& kernels(InstructionSet set) {
#if defined(__x86_64__)
  if (set >= InstructionSet::avx512_vnni) return avx512_kernels;
  if (set >= InstructionSet::avx2) return avx2_kernels;
#endif
  (void)set;
  return generic_kernels;
}

}  // namespace moevlm::quantized
