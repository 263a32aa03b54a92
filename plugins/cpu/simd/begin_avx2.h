// Code from here to simd/end.h is compiled for x86-64-v3. Standard headers come before it: their inline functions must
// not be compiled for a newer processor, because the linker keeps one copy for all.
#define MOEVLM_ISA avx2
#define MOEVLM_LANES 8
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
