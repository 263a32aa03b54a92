#if defined(__x86_64__)
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <utility>

#include "matmul/kernels.h"

#include "simd/begin_avx512_vnni.h"
#include "matmul/panel_avx512_vnni.h"
#include "matmul/kernel_table.h"
#include "simd/end.h"
#endif
