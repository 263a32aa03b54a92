#if defined(__x86_64__)
#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#include "attention/attention.h"

#include "simd/begin_avx512.h"
#define MOEVLM_REGISTERS 32
#define MOEVLM_TILE_M 12
#include "attention/kernels.h"
#include "simd/end.h"
#endif
