// Router logits -> the experts of each token and their weights: moevlm.plugins.ops.router.route.
#pragma once
#include "matmul/kernels.h"
#include "parallel.h"

namespace moevlm::matmul {

struct RouterShape {
  int64_t top_k;
  Scoring scoring;
  bool renormalize;
  float epsilon, scale;
  int64_t n_group, topk_group;
  bool top2_sum;

  // Whether a router of that many experts can choose so.
  bool valid(int64_t experts) const;
};

// logits [tokens, experts], bias and expert_scale [experts] or null -> index and weight [tokens, top_k].
void route(const RouterShape& shape, const Kernels& kernels, const Pool& pool, const float* logits, const float* bias,
           const float* expert_scale, int64_t tokens, int64_t experts, int32_t* index, float* weight);

}  // namespace moevlm::matmul
