#if defined(__x86_64__)
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#include "sampling/candidates.h"

#include "simd/begin_avx2.h"
#include "sampling/candidates_kernels.h"
#include "simd/end.h"
#endif
