// Two floats at a time: for heads whose size is even, and no wider vector divides it.

#define MOEVLM_ISA pairs
#define MOEVLM_LANES 2
#define MOEVLM_REGISTERS 16

#include "delta/kernels.h"
