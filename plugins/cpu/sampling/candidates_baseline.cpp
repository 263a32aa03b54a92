// What every processor of the architecture has: SSE2 on x86-64, NEON on AArch64.
#define MOEVLM_ISA baseline
#define MOEVLM_LANES 4
#include "sampling/candidates_kernels.h"
