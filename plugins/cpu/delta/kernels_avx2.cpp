#if defined(__x86_64__)
#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#include "delta/delta.h"

#include "simd/begin_avx2.h"
#define MOEVLM_REGISTERS 16
#include "delta/kernels.h"
#include "simd/end.h"
#endif
