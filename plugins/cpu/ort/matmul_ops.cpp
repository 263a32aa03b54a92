#include "ort/matmul_ops.h"

#include "matmul/experts.h"
#include "matmul/float_linear.h"
#include "matmul/linear.h"
#include "matmul/router.h"
#include "ort/custom_op.h"

namespace moevlm::matmul {
namespace {

// No size of a packed weight or of scratch memory that these limits allow is more than 64 bits hold.
constexpr Packing kWorst{8, 16};  // 4 bits with zeros are fewer
static_assert(kMaxExperts <= INT64_MAX / (2 * kWorst.bytes(kMaxWidth, kMaxWidth)));
static_assert(kMaxTokens <= INT64_MAX / (2 * kWorst.activation_bytes(kMaxWidth)));

Packing read_packing(const Attributes& attributes) {
  const Packing packing{static_cast<int>(attributes.integer("bits", 4, 8)),
                        static_cast<int>(attributes.integer("block_size", 16, kMaxGroup)),
                        attributes.integer_or("zeros", 0, 0, 1) != 0, attributes.integer_or("fp4", 0, 0, 1) != 0};
  if (!packing.valid()) {
    invalid("bits = ", packing.bits, ", block_size = ", packing.group_size, ", zeros = ", int{packing.zeros},
            ", fp4 = ", int{packing.fp4}, " (allowed: 4 or 8 bits, blocks of a multiple of 16 up to ", kMaxGroup,
            ", zeros or fp4 with 4 bits)");
  }
  return packing;
}

void require_bytes(const char* name, const Tensor& tensor, int64_t bytes) {
  if (tensor.elements() != bytes) {
    invalid(name, " has shape ", text(tensor.shape), ", ", tensor.elements(), " bytes (allowed: ", bytes,
            " bytes for these attributes)");
  }
}

void require_rows(const char* name, const Tensor& tensor, int64_t columns, const char* meaning) {
  if (tensor.shape.size() != 2 || tensor.shape[1] != columns)
    invalid(name, " has shape ", text(tensor.shape), " (allowed: ", meaning, " with ", columns, " columns)");
  if (tensor.shape[0] > kMaxTokens)
    invalid(name, " has shape ", text(tensor.shape), " (allowed: T up to ", kMaxTokens, ")");
}

std::unique_ptr<uint8_t[]> scratch(int64_t bytes) { return std::unique_ptr<uint8_t[]>(new uint8_t[bytes]); }

struct LinearOp {
  static constexpr const char* name = "Linear";
  static constexpr Port inputs[] = {{"x", ort::kFloat}, {"weight", ort::kUint8}, {"bias", ort::kFloat, ort::kOptional}};
  static constexpr Port outputs[] = {{"y", ort::kFloat}};
  LinearShape shape;

  explicit LinearOp(const Attributes& a)
      : shape{a.integer("N", 1, kMaxWidth), a.integer("K", 1, kMaxWidth), read_packing(a)} {}

  void compute(Call& call) const {
    const auto [x, weight, bias] = read_inputs(call, inputs);
    require_rows("x", x, shape.k, "[T, K]");
    require_bytes("weight", weight, shape.weight_bytes());
    require_shape("bias", bias, {shape.n}, "[N]");
    const int64_t tokens = x.shape[0];
    float* y = call.output<float>(0, {x.shape[0], shape.n});
    const auto memory = scratch(shape.scratch_bytes(tokens));
    linear(shape, kernels(instruction_set()), call.pool(), x.as<float>(), tokens, weight.as<uint8_t>(),
           bias.as<float>(), y, memory.get());
  }
};

struct FloatLinearOp {
  static constexpr const char* name = "FloatLinear";
  static constexpr Port inputs[] = {{"x", ort::kFloat}, {"weight", ort::kFloat}, {"bias", ort::kFloat, ort::kOptional}};
  static constexpr Port outputs[] = {{"y", ort::kFloat}};

  FloatLinearShape shape;

  explicit FloatLinearOp(const Attributes& a) : shape{a.integer("N", 1, kMaxWidth), a.integer("K", 1, kMaxWidth)} {}

  void compute(Call& call) const {
    const auto [x, weight, bias] = read_inputs(call, inputs);
    require_rows("x", x, shape.k, "[T, K]");
    if (weight.elements() != shape.weights()) {
      invalid("weight has shape ", text(weight.shape), ", ", weight.elements(), " values (allowed: ", shape.weights(),
              " for these attributes)");
    }
    const int64_t n = shape.n;
    require_shape("bias", bias, {n}, "[N]");
    float* y = call.output<float>(0, {x.shape[0], n});
    float_linear(shape, kernels(instruction_set()), call.pool(), x.as<float>(), x.shape[0], weight.as<float>(),
                 bias.as<float>(), y);
  }
};

struct HeadLinearOp {
  static constexpr const char* name = "HeadLinear";
  static constexpr Port inputs[] = {{"x", ort::kFloat}, {"weight", ort::kUint8}};
  static constexpr Port outputs[] = {{"y", ort::kFloat}};
  LinearShape shape;

  explicit HeadLinearOp(const Attributes& a)
      : shape{a.integer("N", 1, kMaxHeadDim), a.integer("K", 1, kMaxHeadDim), read_packing(a),
              a.integer("heads", 1, kMaxHeads)} {}

  void compute(Call& call) const {
    const auto [x, weight] = read_inputs(call, inputs);
    require_rows("x", x, shape.heads * shape.k, "[T, heads * K]");
    require_bytes("weight", weight, shape.weight_bytes());
    const int64_t tokens = x.shape[0];
    float* y = call.output<float>(0, {tokens, shape.heads * shape.n});
    const auto memory = scratch(shape.scratch_bytes(tokens));
    linear(shape, kernels(instruction_set()), call.pool(), x.as<float>(), tokens, weight.as<uint8_t>(), nullptr, y,
           memory.get());
  }
};

struct ExpertsOp {
  static constexpr const char* name = "MoEExperts";
  static constexpr Port inputs[] = {{"x", ort::kFloat},
                                    {"expert_index", ort::kInt32},
                                    {"expert_weight", ort::kFloat},
                                    {"gate_up", ort::kUint8},
                                    {"down", ort::kUint8},
                                    {"gate_up_bias", ort::kFloat, ort::kOptional},
                                    {"down_bias", ort::kFloat, ort::kOptional}};
  static constexpr Port outputs[] = {{"y", ort::kFloat}};
  ExpertsShape shape;  // but for the number of experts, which is the weights'

  explicit ExpertsOp(const Attributes& a)
      : shape{0,
              a.integer("hidden", 1, kMaxWidth),
              a.integer("width", 1, kMaxWidth),
              read_packing(a),
              {static_cast<Activation>(a.choice("activation", {"silu", "gelu_tanh", "swiglu_clamped"})),
               a.integer_or("gated", 1, 0, 1) != 0, a.number_or("alpha", 1.702f), a.number_or("limit", 7.0f)},
              a.choice("weight_on", {"output", "input"}) == 1} {
    if (shape.activation.kind == Activation::swiglu_clamped && !shape.activation.gated)
      invalid("activation = \"swiglu_clamped\" needs gated = 1");
  }

  void compute(Call& call) const {
    const auto [x, index, weight, gate_up, down, up_bias, down_bias] = read_inputs(call, inputs);
    require_rows("x", x, shape.hidden, "[T, H]");
    if (index.shape.size() != 2 || index.shape[0] != x.shape[0] || index.shape[1] < 1)
      invalid("expert_index has shape ", text(index.shape), " (allowed: [", x.shape[0], ", top_k])");
    if (product(index.shape[0], index.shape[1]) > kMaxTokens)
      invalid("expert_index has shape ", text(index.shape), " (allowed: T * top_k up to ", kMaxTokens, ")");
    require_shape("expert_weight", weight, index.shape, "that of expert_index");
    if (gate_up.shape.empty() || gate_up.shape[0] < 1 || gate_up.shape[0] > kMaxExperts)
      invalid("gate_up has shape ", text(gate_up.shape), " (allowed: [E, bytes], E from 1 to ", kMaxExperts, ")");
    ExpertsShape bank = shape;
    const int64_t count = gate_up.shape[0];
    bank.experts = count;
    require_bytes("gate_up", gate_up, bank.experts * bank.up_bytes());
    require_bytes("down", down, bank.experts * bank.down_bytes());
    require_shape("gate_up_bias", up_bias, {count, bank.up_rows()}, "[E, rows of gate_up]");
    require_shape("down_bias", down_bias, {count, bank.hidden}, "[E, H]");

    const int64_t tokens = x.shape[0], top_k = index.shape[1];
    const ExpertsInputs in{x.as<float>(),
                           index.as<int32_t>(),
                           weight.as<float>(),
                           gate_up.as<uint8_t>(),
                           down.as<uint8_t>(),
                           up_bias.as<float>(),
                           down_bias.as<float>(),
                           tokens,
                           top_k};
    float* y = call.output<float>(0, x.shape);
    const auto memory = scratch(bank.scratch_bytes(tokens, top_k));
    const int64_t checked = matmul::experts(bank, kernels(instruction_set()), call.pool(), in, y, memory.get());
    if (checked < tokens * top_k) {
      invalid("expert_index[", checked / top_k, ", ", checked % top_k, "] = ", in.index[checked], " (allowed: 0 to ",
              count - 1, ", or -1 for none)");
    }
  }
};

struct RouterOp {
  static constexpr const char* name = "MoERouter";
  static constexpr Port inputs[] = {
      {"logits", ort::kFloat}, {"bias", ort::kFloat, ort::kOptional}, {"expert_scale", ort::kFloat, ort::kOptional}};
  static constexpr Port outputs[] = {{"expert_index", ort::kInt32}, {"expert_weight", ort::kFloat}};
  RouterShape shape;

  explicit RouterOp(const Attributes& a)
      : shape{a.integer("top_k", 1, kMaxExperts),
              static_cast<Scoring>(a.choice("scoring", {"softmax", "sigmoid", "softmax_after_topk"})),
              a.integer_or("renormalize", 1, 0, 1) != 0,
              a.number_or("epsilon", 0.0f),
              a.number_or("scale", 1.0f),
              a.integer_or("n_group", 1, 1, kMaxExperts),
              a.integer_or("topk_group", 1, 1, kMaxExperts),
              a.choice("group_score", {"max", "top2_sum"}) == 1} {}

  void compute(Call& call) const {
    const auto [logits, bias, expert_scale] = read_inputs(call, inputs);
    if (logits.shape.size() != 2 || logits.shape[0] > kMaxTokens)
      invalid("logits has shape ", text(logits.shape), " (allowed: [T, E], T up to ", kMaxTokens, ")");
    const int64_t tokens = logits.shape[0], experts = logits.shape[1];
    require_shape("bias", bias, {experts}, "[E]");
    require_shape("expert_scale", expert_scale, {experts}, "[E]");
    if (!shape.valid(experts)) {
      invalid("no choice of top_k = ", shape.top_k, " from ", experts, " experts in n_group = ", shape.n_group,
              " groups, topk_group = ", shape.topk_group, " of them (allowed: up to ", kMaxExperts,
              " experts, groups of equal size, top_k experts in those chosen)");
    }
    const Shape out = {logits.shape[0], shape.top_k};
    int32_t* index = call.output<int32_t>(0, out);
    float* weight = call.output<float>(1, out);
    route(shape, kernels(instruction_set()), call.pool(), logits.as<float>(), bias.as<float>(),
          expert_scale.as<float>(), tokens, experts, index, weight);
  }
};

const Operator<LinearOp> linear_operator;
const Operator<FloatLinearOp> float_linear_operator;
const Operator<HeadLinearOp> head_linear_operator;
const Operator<ExpertsOp> experts_operator;
const Operator<RouterOp> router_operator;
const ort::CustomOp* const all[] = {&linear_operator,  &float_linear_operator, &head_linear_operator,
                                    &experts_operator, &router_operator,       nullptr};

}  // namespace

const ort::CustomOp* const* matmul_operators() { return all; }

}  // namespace moevlm::matmul
