// What this processor can do at most, for benchmarks: loops that wait for nothing but memory, or nothing but arithmetic.
//
// Each runs on the calling thread; the caller times it and runs as many at once as it has cores. Where a processor has
// none of the instructions named here, its arithmetic counts as 0: unknown.
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// Independent sums, enough to hide an instruction's latency; variables, since the compiler keeps an array in memory.
constexpr int kChains = 10;
#define MOEVLM_CHAINS(do) do(s0) do(s1) do(s2) do(s3) do(s4) do(s5) do(s6) do(s7) do(s8) do(s9)

volatile int64_t sink;

// Nothing is known of `value` from here on, so that no loop is computed ahead, and equal chains are not made one.
#define MOEVLM_OPAQUE(value) __asm__ volatile("" : "+v"(value))

#if defined(__x86_64__)
__attribute__((target("avx512f"))) size_t float32_512(size_t rounds) {
  __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0, s8 = s0, s9 = s0;
  const __m512 factor = _mm512_set1_ps(0.999f);
#define MOEVLM_STEP(sum) sum = _mm512_fmadd_ps(sum, factor, factor); MOEVLM_OPAQUE(sum);
  for (size_t round = 0; round < rounds; ++round) { MOEVLM_CHAINS(MOEVLM_STEP) }
#undef MOEVLM_STEP
  return rounds * kChains * 16;
}

__attribute__((target("avx2,fma"))) size_t float32_256(size_t rounds) {
  __m256 s0 = _mm256_setzero_ps(), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0, s8 = s0, s9 = s0;
  const __m256 factor = _mm256_set1_ps(0.999f);
#define MOEVLM_STEP(sum) sum = _mm256_fmadd_ps(sum, factor, factor); MOEVLM_OPAQUE(sum);
  for (size_t round = 0; round < rounds; ++round) { MOEVLM_CHAINS(MOEVLM_STEP) }
#undef MOEVLM_STEP
  return rounds * kChains * 8;
}

__attribute__((target("avx512f,avx512vnni"))) size_t int8_512(size_t rounds) {
  __m512i s0 = _mm512_setzero_si512(), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0, s8 = s0, s9 = s0;
  const __m512i bytes = _mm512_set1_epi32(0x01020304);
#define MOEVLM_STEP(sum) sum = _mm512_dpbusd_epi32(sum, bytes, bytes); MOEVLM_OPAQUE(sum);
  for (size_t round = 0; round < rounds; ++round) { MOEVLM_CHAINS(MOEVLM_STEP) }
#undef MOEVLM_STEP
  return rounds * kChains * 64;
}
#endif

}  // namespace

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

// float32 multiply-adds done in `rounds`.
MOEVLM_EXPORT size_t moevlm_peak_float32(size_t rounds) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return float32_512(rounds);
  if (__builtin_cpu_supports("fma")) return float32_256(rounds);
#endif
  return 0 * rounds;
}

// Byte multiply-adds done in `rounds`.
MOEVLM_EXPORT size_t moevlm_peak_int8(size_t rounds) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512vnni")) return int8_512(rounds);
#endif
  return 0 * rounds;
}
