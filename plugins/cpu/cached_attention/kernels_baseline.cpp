// What every processor of the architecture has: SSE2 on x86-64, NEON on AArch64.

#if defined(__aarch64__)
#define MOEVLM_TILE_M 12  // 32 registers
#else
#define MOEVLM_TILE_M 6
#endif
#define MOEVLM_ISA baseline
#define MOEVLM_LANES 4

#include "cached_attention/kernels.h"
