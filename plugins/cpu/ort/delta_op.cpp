// The operator GatedDelta: reads and checks a node's attributes and inputs, finds its outputs, runs the delta rule.
#include "ort/delta_op.h"

#include <algorithm>
#include <cmath>

#include "delta/delta.h"
#include "ort/custom_op.h"
#include "ort/step_inputs.h"

namespace moevlm {
namespace {

enum Input {
  kQkv, kA, kB, kConvWeight, kRate, kDtBias, kConvState, kDeltaState, kQueryStart, kStateRow, kInputs
};

// No size of an input or of scratch memory that the limits allow is more than 64 bits hold.
constexpr int64_t kMaxChannels = 3 * kMaxHeads * kMaxDeltaDim;
static_assert(kMaxTokens <= INT64_MAX / (8 * kMaxConvolution * kMaxChannels));
static_assert(kMaxTokens <= INT64_MAX / (8 * kMaxHeads * kMaxDeltaDim * kMaxDeltaDim));

struct GatedDeltaOp {
  static constexpr const char* name = "GatedDelta";
  static constexpr Port inputs[] = {
      {"qkv", ort::kFloat},          {"a", ort::kFloat},           {"b", ort::kFloat},       {"conv_weight", ort::kFloat},
      {"rate", ort::kFloat},         {"dt_bias", ort::kFloat},     {"conv_state", ort::kFloat},
      {"delta_state", ort::kFloat}, {"query_start", ort::kInt32}, {"state_row", ort::kInt32}};
  static constexpr Port outputs[] = {
      {"y", ort::kFloat}, {"conv_state_out", ort::kFloat}, {"delta_state_out", ort::kFloat}};
  int64_t key_heads, value_heads, key_dim, value_dim, kernel;
  float scale, epsilon;

  explicit GatedDeltaOp(const Attributes& a)
      : key_heads(a.integer("key_heads", 1, kMaxHeads)),
        value_heads(a.integer("value_heads", 1, kMaxHeads)),
        key_dim(a.integer("key_dim", 2, kMaxDeltaDim)),
        value_dim(a.integer("value_dim", 2, kMaxDeltaDim)),
        kernel(a.integer("kernel", 2, kMaxConvolution)),
        scale(a.number_or("scale", 0)),
        epsilon(a.number_or("epsilon", 1e-6f)) {
    if (value_heads % key_heads) {
      invalid("key_heads = ", key_heads, " with value_heads = ", value_heads, " (allowed: a divisor of value_heads)");
    }
    for (const auto& [field, dim] : {std::pair{"key_dim", key_dim}, {"value_dim", value_dim}}) {
      if (dim % 2) invalid(field, " = ", dim, " (allowed: even)");
    }
    for (const auto& [field, value] : {std::pair{"scale", scale}, {"epsilon", epsilon}}) {
      if (!(value >= 0 && std::isfinite(value))) invalid(field, " = ", value, " (allowed: 0 or more)");
    }
  }

  delta::Call read(const std::array<Tensor, kInputs>& in) const {
    const auto require = [&](Input input, const Shape& shape, const char* meaning) {
      require_shape(inputs[input].name, in[input], shape, meaning);
    };
    delta::Call call = {};
    call.key_heads = key_heads;
    call.value_heads = value_heads;
    call.key_dim = key_dim;
    call.value_dim = value_dim;
    call.kernel = kernel;
    call.scale = scale > 0 ? scale : 1 / std::sqrt(static_cast<float>(key_dim));
    call.epsilon = epsilon;
    const Shape &qkv = in[kQkv].shape, &states = in[kDeltaState].shape, &sequences = in[kStateRow].shape;
    call.tokens = qkv.empty() ? 0 : qkv[0];
    if (call.tokens > kMaxTokens) invalid("qkv has shape ", text(qkv), " (allowed: up to ", kMaxTokens, " rows)");
    require(kQkv, {call.tokens, call.channels()}, "[T, 2 * key_heads * key_dim + value_heads * value_dim]");
    for (const Input gate : {kA, kB}) require(gate, {call.tokens, value_heads}, "[T, value_heads]");
    require(kConvWeight, {kernel, call.channels()}, "[kernel, the columns of qkv]");
    for (const Input each : {kRate, kDtBias}) require(each, {value_heads}, "[value_heads]");
    call.rows = states.empty() ? 0 : states[0];
    if (call.rows > kMaxTokens) invalid("delta_state has shape ", text(states), " (allowed: up to ", kMaxTokens, " rows)");
    require(kDeltaState, {call.rows, value_heads, key_dim, value_dim}, "[rows, value_heads, key_dim, value_dim]");
    require(kConvState, {call.rows, kernel - 1, call.channels()}, "[rows, kernel - 1, the columns of qkv]");
    if (sequences.size() != 1) invalid("state_row has shape ", text(sequences), " (allowed: [N])");
    call.sequences = sequences[0];
    require(kQueryStart, {call.sequences + 1}, "[N + 1] for state_row [N]");
    call.qkv = in[kQkv].as<float>();
    call.a = in[kA].as<float>();
    call.b = in[kB].as<float>();
    call.conv_weight = in[kConvWeight].as<float>();
    call.rate = in[kRate].as<float>();
    call.dt_bias = in[kDtBias].as<float>();
    call.query_start = in[kQueryStart].as<int32_t>();
    call.state_row = in[kStateRow].as<int32_t>();
    require_query_start(call.query_start, call.sequences, call.tokens);
    require_rows(call);
    return call;
  }

  // A row is a sequence's own: its tokens read what is there while they write it.
  static void require_rows(const delta::Call& call) {
    std::vector<int32_t> used;
    for (int64_t n = 0; n < call.sequences; ++n) {
      const int32_t row = call.state_row[n];
      if (row < 0 || row >= call.rows) {
        invalid("state_row[", n, "] = ", row, " (allowed: 0 to ", call.rows - 1, ")");
      }
      if (call.query_start[n + 1] > call.query_start[n]) used.push_back(row);
    }
    std::sort(used.begin(), used.end());
    const auto twice = std::adjacent_find(used.begin(), used.end());
    if (twice != used.end()) invalid("state_row has ", *twice, " twice (allowed: a row for each sequence with tokens)");
  }

  void compute(Call& node) const {
    const auto in = read_inputs(node, inputs);
    delta::Call call = read(in);
    const Pool pool = node.pool();
    call.y = node.output<float>(0, {call.tokens, value_heads * value_dim});
    call.conv_state = updated(node, 1, in[kConvState], pool);
    call.delta_state = updated(node, 2, in[kDeltaState], pool);
    delta::run(call, pool);
  }

  static float* updated(Call& node, size_t output, const Tensor& state, const Pool& pool) {
    float* const rows = node.output<float>(output, state.shape);
    copy_pool(pool, state, reinterpret_cast<char*>(rows), sizeof(float));
    return rows;
  }
};

const Operator<GatedDeltaOp> delta_operator;
const ort::CustomOp* const all[] = {&delta_operator, nullptr};

}  // namespace

const ort::CustomOp* const* delta_operators() { return all; }

}  // namespace moevlm
