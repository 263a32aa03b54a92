// The kernels of plugins/cpu as plain C functions, so that tests reach every instruction set without an engine.
#include <atomic>
#include <thread>
#include <vector>

#include "matmul/experts.h"
#include "matmul/float_linear.h"
#include "matmul/linear.h"
#include "matmul/router.h"
#include "sampling/candidates.h"

using namespace moevlm::matmul;

namespace {

// The engine's pool stands in here: threads that take the next task as they become free.
void run_on_threads(void* self, size_t total, void (*task)(void*, size_t), void* argument) {
  std::atomic<size_t> next{0};
  auto work = [&] {
    for (size_t i; (i = next.fetch_add(1)) < total;) task(argument, i);
  };
  std::vector<std::thread> helpers;
  for (int64_t t = 1; t < *static_cast<int64_t*>(self); ++t) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
}

moevlm::Pool pool_of(int64_t& threads) { return {&threads, threads, run_on_threads}; }

moevlm::InstructionSet instruction_set(int set) {
  return set < 0 ? moevlm::instruction_set() : static_cast<moevlm::InstructionSet>(set);
}

// codes: 0 for integers, 1 with zeros, 2 for e2m1.
Packing packing(int bits, int group_size, int codes) { return {bits, group_size, codes == 1, codes == 2}; }

const Kernels& chosen(int set) { return kernels(instruction_set(set)); }

}  // namespace

extern "C" {

bool has_instruction_set(int set) { return moevlm::has(static_cast<moevlm::InstructionSet>(set)); }

void run_quantize(int set, int bits, int group_size, int codes, int64_t tokens, int64_t k, const float* x,
                  uint8_t* rows) {
  int64_t threads = 1;
  quantize_rows(chosen(set), pool_of(threads), packing(bits, group_size, codes), x, tokens, k, rows);
}

void run_linear(int set, int64_t threads, int bits, int group_size, int codes, int64_t heads, int64_t n, int64_t k,
                int64_t tokens, const float* x, const uint8_t* weight, const float* bias, float* y) {
  const LinearShape shape{n, k, packing(bits, group_size, codes), heads};
  std::vector<uint8_t> scratch(shape.scratch_bytes(tokens));
  linear(shape, chosen(set), pool_of(threads), x, tokens, weight, bias, y, scratch.data());
}

void run_float_linear(int set, int64_t threads, int64_t n, int64_t k, int64_t tokens, const float* x, const float* weight,
                      const float* bias, float* y) {
  float_linear({n, k}, chosen(set), pool_of(threads), x, tokens, weight, bias, y);
}


int64_t run_experts(int set, int64_t threads, int bits, int group_size, int codes, int64_t experts_count, int64_t hidden,
                   int64_t width, int activation, int gated, int weight_on_input, float alpha, float limit, int64_t tokens,
                   int64_t top_k, const float* x, const int32_t* index, const float* weight, const uint8_t* gate_up,
                   const uint8_t* down, const float* up_bias, const float* down_bias, float* y) {
  const ExpertsShape shape{experts_count, hidden, width, packing(bits, group_size, codes),
                           {static_cast<Activation>(activation), gated != 0, alpha, limit}, weight_on_input != 0};
  std::vector<uint8_t> scratch(shape.scratch_bytes(tokens, top_k));
  const ExpertsInputs in{x, index, weight, gate_up, down, up_bias, down_bias, tokens, top_k};
  return experts(shape, chosen(set), pool_of(threads), in, y, scratch.data());
}

int run_router(int set, int64_t threads, int64_t top_k, int scoring, int renormalize, float epsilon, float scale,
               int64_t n_group, int64_t topk_group, int top2_sum, int64_t tokens, int64_t experts_count,
               const float* logits, const float* bias, const float* expert_scale, int32_t* index, float* weight) {
  const RouterShape shape{top_k, static_cast<Scoring>(scoring), renormalize != 0, epsilon, scale,
                          n_group, topk_group, top2_sum != 0};
  if (!shape.valid(experts_count)) return 1;
  route(shape, chosen(set), pool_of(threads), logits, bias, expert_scale, tokens, experts_count, index,
        weight);
  return 0;
}

void run_candidates(int set, int64_t threads, int64_t rows, int64_t vocabulary, int64_t count, const float* logits,
                    float* values, int32_t* ids, float* log_sum_exp) {
  moevlm::sampling::candidates(moevlm::sampling::kernels(instruction_set(set)), pool_of(threads),
                               logits, rows, vocabulary, count, values, ids, log_sum_exp);
}
}
