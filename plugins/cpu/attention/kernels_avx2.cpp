#if defined(__x86_64__)
#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#include "attention/attention.h"

#include "simd/begin_avx2.h"
#define MOEVLM_REGISTERS 16
#define MOEVLM_TILE_M 6
#include "attention/kernels.h"
#include "simd/end.h"
#endif
