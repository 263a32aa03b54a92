// What every processor of the architecture has: SSE2 on x86-64, NEON on AArch64.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#define MOEVLM_ISA baseline
#define MOEVLM_LANES 4
#include "matmul/panel_baseline.h"
#include "matmul/kernel_table.h"
