// Code from here to simd/end.h is compiled for x86-64-v4 with VNNI. Standard headers come before it: their inline
// functions must not be compiled for a newer processor, because the linker keeps one copy for all.
#define MOEVLM_ISA avx512_vnni
#define MOEVLM_LANES 16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")
#endif
