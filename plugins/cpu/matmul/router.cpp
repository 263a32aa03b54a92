#include "matmul/router.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace moevlm::matmul {
namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();

// NaN is worse than everything else, as in numpy's sort.
inline bool better(float a, float b) { return a > b || (b != b && a == a); }

// The k <= kMaxExperts best of n, the best first, of equal ones the first. By insertion: k is small in every model.
void top(const float* score, int64_t n, int64_t k, int32_t* index) {
  float kept[kMaxExperts];
  int64_t size = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (size == k && !better(score[i], kept[k - 1])) continue;
    int64_t at = size < k ? size++ : k - 1;
    for (; at > 0 && better(score[i], kept[at - 1]); --at) {
      kept[at] = kept[at - 1];
      index[at] = index[at - 1];
    }
    kept[at] = score[i];
    index[at] = static_cast<int32_t>(i);
  }
}

void mask_groups(const RouterShape& shape, float* choice, int64_t experts) {
  const int64_t size = experts / shape.n_group;
  float group_score[kMaxExperts];
  for (int64_t g = 0; g < shape.n_group; ++g) {
    int32_t best[2];
    top(choice + g * size, size, shape.top2_sum ? 2 : 1, best);
    group_score[g] = choice[g * size + best[0]];
    if (shape.top2_sum) group_score[g] += choice[g * size + best[1]];
  }
  bool kept[kMaxExperts];
  std::fill_n(kept, shape.n_group, false);
  int32_t groups[kMaxExperts];
  top(group_score, shape.n_group, shape.topk_group, groups);
  for (int64_t g = 0; g < shape.topk_group; ++g) kept[groups[g]] = true;
  for (int64_t g = 0; g < shape.n_group; ++g)
    if (!kept[g]) std::fill_n(choice + g * size, size, kMasked);
}

void route_token(const RouterShape& shape, const Kernels& kernels, const float* logits, const float* bias,
                 const float* expert_scale, int64_t experts, int32_t* index, float* weight) {
  float scores[kMaxExperts], choice[kMaxExperts];
  std::copy_n(logits, experts, scores);
  if (shape.scoring == Scoring::softmax) kernels.softmax(scores, experts);
  if (shape.scoring == Scoring::sigmoid) kernels.sigmoid(scores, experts);
  for (int64_t e = 0; e < experts; ++e) choice[e] = bias ? scores[e] + bias[e] : scores[e];
  if (shape.n_group > 1) mask_groups(shape, choice, experts);
  const int64_t k = shape.top_k;
  top(choice, experts, k, index);
  for (int64_t i = 0; i < k; ++i) weight[i] = scores[index[i]];
  if (shape.scoring == Scoring::softmax_after_topk) kernels.softmax(weight, k);
  if (shape.renormalize) {
    const float sum = kernels.sum(weight, k) + shape.epsilon;
    for (int64_t i = 0; i < k; ++i) weight[i] /= sum;
  }
  for (int64_t i = 0; i < k; ++i) weight[i] *= shape.scale;
  for (int64_t i = 0; expert_scale && i < k; ++i) weight[i] *= expert_scale[index[i]];
}

}  // namespace

bool RouterShape::valid(int64_t experts) const {
  if (top_k < 1 || experts < 1 || experts > kMaxExperts) return false;
  if (n_group < 1 || topk_group < 1 || topk_group > n_group || experts % n_group) return false;
  const int64_t size = experts / n_group;
  return !(n_group > 1 && top2_sum && size < 2) && top_k <= topk_group * size;
}

void route(const RouterShape& shape, const Kernels& kernels, const Pool& pool, const float* logits, const float* bias,
           const float* expert_scale, int64_t tokens, int64_t experts, int32_t* index, float* weight) {
  const int64_t chunks = std::clamp<int64_t>(tokens * experts >> 12, 1, 64);
  parallel_for(pool, chunks, [&](int64_t chunk) {
    for (int64_t t = tokens * chunk / chunks; t < tokens * (chunk + 1) / chunks; ++t)
      route_token(shape, kernels, logits + t * experts, bias, expert_scale, experts, index + t * shape.top_k,
                  weight + t * shape.top_k);
  });
}

}  // namespace moevlm::matmul
