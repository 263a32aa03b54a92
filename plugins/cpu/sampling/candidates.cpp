#include "sampling/candidates.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "sizes.h"

namespace moevlm::sampling {

namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }

const Kernels& kernels(InstructionSet set) {
#if defined(__x86_64__)
  return fastest<Kernels>({&baseline::kernels, &avx2::kernels, &avx512::kernels}, set);
#else
  return fastest<Kernels>({&baseline::kernels}, set);
#endif
}

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kParts = 2;  // parts of a row that have their maximum taken, per candidate

// Numbers in the order of candidates: NaN, then the largest value, of equal ones the lower id.
uint64_t rank(float value, int32_t id) {
  const float positive_zero = value + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &positive_zero, sizeof(bits));
  const uint32_t falling = value != value ? 0 : bits >> 31 ? bits : 0x7fffffffu - bits;
  return static_cast<uint64_t>(falling) << 32 | static_cast<uint32_t>(id);
}

class Row {
 public:
  Row(const Kernels& kernels, int64_t vocabulary, int64_t count) : kernels_(kernels), size_(vocabulary), count_(count) {
    const int64_t blocks = ceil_div(kParts * count, kernels.lanes);
    if (size_ / kernels.lanes >= 2 * blocks) maxima_.resize(blocks * kernels.lanes);
    ids_.resize(std::min(size_, 4 * kParts * count));
  }

  void run(const float* logits, float* values, int32_t* ids, float* log_sum_exp) {
    const int64_t vectors = size_ / kernels_.lanes;
    float most = -kInfinity, threshold = -kInfinity;
    for (int64_t i = maxima_.empty() ? 0 : vectors * kernels_.lanes; i < size_; ++i) most = std::max(most, logits[i]);
    if (!maxima_.empty()) {
      kernels_.maxima(logits, vectors, maxima_.size() / kernels_.lanes, maxima_.data());
      const auto nth = maxima_.begin() + count_ - 1;
      std::nth_element(maxima_.begin(), nth, maxima_.end(), std::greater<float>());
      threshold = *nth;
      most = std::max(most, *std::max_element(maxima_.begin(), nth + 1));
    }
    double sum = 0;
    int64_t found =
        kernels_.collect(logits, size_, threshold, most, ids_.data(), static_cast<int64_t>(ids_.size()), &sum);
    if (found > static_cast<int64_t>(ids_.size())) {  // many equal values, or NaN
      ids_.resize(found);
      kernels_.collect(logits, size_, threshold, most, ids_.data(), found, &sum);
    }
    ranks_.resize(found);
    for (int64_t i = 0; i < found; ++i) ranks_[i] = rank(logits[ids_[i]], ids_[i]);
    const auto end = ranks_.begin() + count_;
    if (found > count_) std::nth_element(ranks_.begin(), end - 1, ranks_.end());
    std::sort(ranks_.begin(), end);
    for (int64_t i = 0; i < count_; ++i) {
      ids[i] = static_cast<int32_t>(ranks_[i]);
      values[i] = logits[ids[i]];
    }
    const bool usable = values[0] > -kInfinity && values[0] < kInfinity;
    *log_sum_exp = usable ? static_cast<float>(most + std::log(sum)) : std::numeric_limits<float>::quiet_NaN();
  }

 private:
  const Kernels& kernels_;
  const int64_t size_, count_;
  std::vector<float> maxima_;  // none where the whole row is sorted
  std::vector<int32_t> ids_;
  std::vector<uint64_t> ranks_;
};

}  // namespace

void candidates(const Kernels& kernels, const Pool& pool, const float* logits, int64_t rows, int64_t vocabulary,
                int64_t count, float* values, int32_t* ids, float* log_sum_exp) {
  parallel_for(pool, rows, [&](int64_t r) {
    Row(kernels, vocabulary, count).run(logits + r * vocabulary, values + r * count, ids + r * count, log_sum_exp + r);
  });
}

}  // namespace moevlm::sampling
