#if defined(__x86_64__)
#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#include "delta/delta.h"

#include "simd/begin_avx512.h"
#define MOEVLM_REGISTERS 32
#include "delta/kernels.h"
#include "simd/end.h"
#endif
