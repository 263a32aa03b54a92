#include "ort/candidates_op.h"

#include "ort/custom_op.h"
#include "sampling/candidates.h"
#include "simd/instruction_set.h"

namespace moevlm {
namespace {

struct CandidatesOp {
  static constexpr const char* name = "Candidates";
  static constexpr Port inputs[] = {{"logits", ort::kFloat}};
  static constexpr Port outputs[] = {{"values", ort::kFloat}, {"ids", ort::kInt32}, {"log_sum_exp", ort::kFloat}};
  int64_t count;

  explicit CandidatesOp(const Attributes& a) : count(a.integer("count", 1, kMaxCandidates)) {}

  void compute(Call& call) const {
    const auto [logits] = read_inputs(call, inputs);
    if (logits.shape.size() != 2 || logits.shape[1] < count || logits.shape[1] > kMaxWidth)
      invalid("logits has shape ", text(logits.shape), " (allowed: [L, V], V from count = ", count, " to ", kMaxWidth,
              ")");
    const int64_t rows = logits.shape[0];
    float* values = call.output<float>(0, {rows, count});
    int32_t* ids = call.output<int32_t>(1, {rows, count});
    float* log_sum_exp = call.output<float>(2, {rows});
    sampling::candidates(sampling::kernels(instruction_set()), call.pool(), logits.as<float>(), rows, logits.shape[1],
                         count, values, ids, log_sum_exp);
  }
};

const Operator<CandidatesOp> candidates_operator;
const ort::CustomOp* const all[] = {&candidates_operator, nullptr};

}  // namespace

const ort::CustomOp* const* candidates_operators() { return all; }

}  // namespace moevlm
