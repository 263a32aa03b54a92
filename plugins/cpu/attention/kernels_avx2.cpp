// x86-64-v3. Standard headers come first: their inline functions must not be compiled for a newer processor, because
// the linker keeps one copy for all.

#if defined(__x86_64__)
#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#include "attention/attention.h"

#define MOEVLM_ISA avx2
#define MOEVLM_LANES 8
#define MOEVLM_REGISTERS 16
#define MOEVLM_TILE_M 6

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "attention/kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
