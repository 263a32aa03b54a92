// x86-64-v4. Standard headers come first: their inline functions must not be compiled for a newer processor, because
// the linker keeps one copy for all.

#if defined(__x86_64__)
#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#include "attention/attention.h"

#define MOEVLM_ISA avx512
#define MOEVLM_LANES 16
#define MOEVLM_REGISTERS 32
#define MOEVLM_TILE_M 12

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif
#include "attention/kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
