#include "matmul/kernels.h"

namespace moevlm::matmul {

namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512_vnni { extern const Kernels kernels; }

const Kernels& kernels(InstructionSet set) {
#if defined(__x86_64__)
  return fastest<Kernels>({&baseline::kernels, &avx2::kernels, nullptr, &avx512_vnni::kernels}, set);
#else
  return fastest<Kernels>({&baseline::kernels}, set);
#endif
}

}  // namespace moevlm::matmul
