// What this processor can do at most, for benchmarks: loops that wait for nothing but memory, or nothing but
// arithmetic. Each runs on the calling thread; the caller times it and runs as many at once as it has cores.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd/instruction_set.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

volatile int64_t sink;

// A copy of which the compiler knows nothing, so that no loop is computed ahead and equal chains are not made one.
#define MOEVLM_UNKNOWN(value)                                               \
  ({                                                                        \
    auto copy = value;                                                      \
    __asm__ volatile("" : "+m"(copy));                                      \
    copy;                                                                   \
  })

// size_t NAME(size_t rounds): repeats STEP(sum), WIDTH multiply-adds by `factor`, in ten independent chains: enough to
// hide an instruction's latency. They are variables, since an array stays in memory.
#define MOEVLM_CHAINS(do) do(s0) do(s1) do(s2) do(s3) do(s4) do(s5) do(s6) do(s7) do(s8) do(s9)
#define MOEVLM_SUM(sum) auto sum = MOEVLM_UNKNOWN(zero);
#define MOEVLM_USE(sum) (void)MOEVLM_UNKNOWN(sum);
#define MOEVLM_LOOP(NAME, WIDTH, ZERO, FACTOR, STEP)                        \
  size_t NAME(size_t rounds) {                                              \
    const auto zero = ZERO, factor = FACTOR;                                \
    MOEVLM_CHAINS(MOEVLM_SUM)                                               \
    for (size_t round = 0; round < rounds; ++round) { MOEVLM_CHAINS(STEP) } \
    MOEVLM_CHAINS(MOEVLM_USE)                                               \
    return rounds * 10 * WIDTH;                                             \
  }

#define MOEVLM_ANY(sum) sum = sum * factor + factor;
typedef float Four __attribute__((vector_size(16)));
typedef int16_t Eight __attribute__((vector_size(16)));
MOEVLM_LOOP(float32_any, 4, Four{}, Four{} + 0.999f, MOEVLM_ANY)
MOEVLM_LOOP(int16_any, 8, Eight{}, Eight{} + int16_t{3}, MOEVLM_ANY)  // bytes are widened before anything multiplies them

#if defined(__x86_64__)
#define MOEVLM_FMA_512(sum) sum = _mm512_fmadd_ps(sum, factor, factor);
#define MOEVLM_FMA_256(sum) sum = _mm256_fmadd_ps(sum, factor, factor);
// Without VNNI: products summed in pairs to 16 bits, and no more done with them than every kernel must.
#define MOEVLM_BYTES_512(sum) sum = _mm512_add_epi16(factor, _mm512_maddubs_epi16(sum, factor));
#define MOEVLM_BYTES_256(sum) sum = _mm256_add_epi16(factor, _mm256_maddubs_epi16(sum, factor));
#define MOEVLM_DOT_512(sum) sum = _mm512_dpbusd_epi32(sum, factor, factor);
__attribute__((target("avx512f")))
MOEVLM_LOOP(float32_512, 16, _mm512_setzero_ps(), _mm512_set1_ps(0.999f), MOEVLM_FMA_512)
__attribute__((target("avx2,fma")))
MOEVLM_LOOP(float32_256, 8, _mm256_setzero_ps(), _mm256_set1_ps(0.999f), MOEVLM_FMA_256)
__attribute__((target("avx512f,avx512bw")))
MOEVLM_LOOP(int8_512, 64, _mm512_setzero_si512(), _mm512_set1_epi32(0x01020304), MOEVLM_BYTES_512)
__attribute__((target("avx2")))
MOEVLM_LOOP(int8_256, 32, _mm256_setzero_si256(), _mm256_set1_epi32(0x01020304), MOEVLM_BYTES_256)
__attribute__((target("avx512f,avx512vnni")))
MOEVLM_LOOP(int8_vnni, 64, _mm512_setzero_si512(), _mm512_set1_epi32(0x01020304), MOEVLM_DOT_512)
#endif

}  // namespace

using moevlm::has;
using moevlm::InstructionSet;

#define MOEVLM_EXPORT extern "C" __attribute__((visibility("default")))

// Reads `bytes` at `data`, a multiple of 256.
MOEVLM_EXPORT void moevlm_peak_read(const char* data, size_t bytes) {
  uint64_t sums[32] = {};
  for (const char* end = data + bytes; data != end; data += sizeof sums) {
    uint64_t words[32];
    std::memcpy(words, data, sizeof words);
    for (int i = 0; i < 32; ++i) sums[i] ^= words[i];
  }
  for (uint64_t sum : sums) sink = sink ^ static_cast<int64_t>(sum);
}

// float32 multiply-adds done in `rounds` with an instruction set; 0 where the processor lacks it. MOEVLM_CPU_ISA is not
// asked: it does not cap the kernels of ONNX Runtime, which are held to these limits too.
MOEVLM_EXPORT size_t moevlm_peak_float32(int set, size_t rounds) {
  if (!has(static_cast<InstructionSet>(set))) return 0;
#if defined(__x86_64__)
  if (static_cast<InstructionSet>(set) >= InstructionSet::avx512) return float32_512(rounds);
  if (static_cast<InstructionSet>(set) >= InstructionSet::avx2) return float32_256(rounds);
#endif
  return float32_any(rounds);
}

// The same of byte multiply-adds.
MOEVLM_EXPORT size_t moevlm_peak_int8(int set, size_t rounds) {
  if (!has(static_cast<InstructionSet>(set))) return 0;
#if defined(__x86_64__)
  if (static_cast<InstructionSet>(set) >= InstructionSet::avx512_vnni) return int8_vnni(rounds);
  if (static_cast<InstructionSet>(set) >= InstructionSet::avx512) return int8_512(rounds);
  if (static_cast<InstructionSet>(set) >= InstructionSet::avx2) return int8_256(rounds);
#endif
  return int16_any(rounds);
}
