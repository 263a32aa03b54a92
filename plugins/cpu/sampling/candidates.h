// The likeliest tokens of rows of logits, without sorting the vocabulary: moevlm.plugins.ops.candidates.
//
// A row is read twice. First the largest value of each of many parts of it; the `count`-th largest of these is a
// threshold that at least `count` values reach, and hardly more. Then what reaches it is collected and sorted, while
// the exponentials of all values are summed.
#pragma once
#include <cstdint>

#include "parallel.h"
#include "simd/instruction_set.h"

namespace moevlm::sampling {

// Compiled once per instruction set, from candidates_kernels.h.
struct Kernels {
  int64_t lanes;
  // maxima [blocks * lanes] <- the largest value of each part that the first `vectors` vectors of a row are cut into.
  // NaN is left out; a part of nothing else has -infinity.
  void (*maxima)(const float* logits, int64_t vectors, int64_t blocks, float* maxima);
  // ids <- of values that are not below the threshold (NaN is not), rising, the first `capacity` of them; sum <- of
  // exp(logit - most) over all. Returns how many there are.
  int64_t (*collect)(const float* logits, int64_t size, float threshold, float most, int32_t* ids, int64_t capacity,
                     double* sum);
};

const Kernels& kernels(InstructionSet set);

// logits [rows, vocabulary] -> values, ids [rows, count], log_sum_exp [rows]. The largest value comes first, of equal
// ones the lower id; NaN before all others. log_sum_exp is NaN in a row with NaN or +infinity, or with nothing above
// -infinity. 1 <= count <= vocabulary.
void candidates(const Kernels& kernels, const Pool& pool, const float* logits, int64_t rows, int64_t vocabulary,
                int64_t count, float* values, int32_t* ids, float* log_sum_exp);

}  // namespace moevlm::sampling
