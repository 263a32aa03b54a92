// What every processor of the architecture has: SSE2 on x86-64, NEON on AArch64.

#if defined(__aarch64__)
#define MOEVLM_REGISTERS 32
#else
#define MOEVLM_REGISTERS 16
#endif
#define MOEVLM_ISA baseline
#define MOEVLM_LANES 4

#include "delta/kernels.h"
