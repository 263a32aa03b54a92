// The operator CachedAttention: reads and checks a node's attributes and inputs, finds its outputs, runs the attention.
#include "ort/cached_attention_op.h"

#include <cstring>

#include "cached_attention/attention.h"
#include "ort/custom_op.h"

namespace moevlm {
namespace {

enum Input { kQkv, kCos, kSin, kKeyCache, kValueCache, kPosition, kQNorm, kKNorm, kInputs };

// A cache as it was, where the caller keeps it apart from the new one.
void copy_cache(const Pool& pool, const Tensor& from, char* to, size_t heads, size_t bytes) {
  const char* old = from.as<char>();
  if (old == to || bytes == 0) return;
  parallel_for(pool, heads, [&](size_t i) { std::memcpy(to + i * bytes, old + i * bytes, bytes); });
}

// ONNX Runtime picks between operators of one name by the types of their inputs.
template <ort::ElementType Cache>
struct AttentionOp {
  static constexpr const char* name = "CachedAttention";
  static constexpr Port inputs[] = {{"qkv", ort::kFloat},
                                    {"cos", ort::kFloat},
                                    {"sin", ort::kFloat},
                                    {"key_cache", Cache},
                                    {"value_cache", Cache},
                                    {"cache_position", ort::kInt64},
                                    {"q_norm", ort::kFloat, ort::kOptional},
                                    {"k_norm", ort::kFloat, ort::kOptional}};
  static constexpr Port outputs[] = {{"y", ort::kFloat}, {"key_cache_out", Cache}, {"value_cache_out", Cache}};
  static constexpr bool quantized = Cache == ort::kInt8;
  int64_t heads, kv_heads, rotary_dim;
  float epsilon;

  explicit AttentionOp(const Attributes& a)
      : heads(a.integer("heads", 1, kMaxHeads)),
        kv_heads(a.integer("kv_heads", 1, heads)),
        rotary_dim(a.integer("rotary_dim", 0, kMaxHeadDim)),
        epsilon(a.number_or("epsilon", 1e-6f)) {
    if (heads % kv_heads) invalid("kv_heads = ", kv_heads, " with heads = ", heads, " (allowed: a divisor of heads)");
    if (rotary_dim % 2) invalid("rotary_dim = ", rotary_dim, " (allowed: even)");
    if (!(epsilon >= 0)) invalid("epsilon = ", epsilon, " (allowed: 0 or more)");
  }

  Attention read(const std::array<Tensor, kInputs>& in) const {
    const Shape &qkv = in[kQkv].shape, &cos = in[kCos].shape, &cache = in[kKeyCache].shape;
    const auto require = [&](Input input, const Shape& shape, const char* meaning) {
      require_shape(inputs[input].name, in[input], shape, meaning);
    };
    Attention call = {};
    call.heads = heads;
    call.kv_heads = kv_heads;
    call.rotary_dim = rotary_dim;
    call.epsilon = epsilon;
    call.quantized = quantized;
    if (cos.size() != 3) invalid("cos has shape ", text(cos), " (allowed: [B, S, rotary_dim / 2])");
    call.batch = cos[0];
    call.length = cos[1];
    const int64_t tokens = product(call.batch, call.length), slots = heads + 2 * kv_heads;
    if (tokens > kMaxTokens) invalid("cos has shape ", text(cos), " (allowed: B * S up to ", kMaxTokens, ")");
    if (qkv.size() != 2 || qkv[1] % (slots * 2) || qkv[1] < slots * 2 || qkv[1] > slots * kMaxHeadDim) {
      invalid("qkv has shape ", text(qkv), " (allowed: [B * S, ", slots, " * head_dim], head_dim even, 2 to ",
              kMaxHeadDim, ")");
    }
    call.head_dim = qkv[1] / slots;
    if (rotary_dim > call.head_dim) {
      invalid("rotary_dim = ", rotary_dim, " (allowed: up to head_dim, which is ", call.head_dim, ")");
    }
    require(kQkv, {tokens, qkv[1]}, "a row for each token of cos [B, S, rotary_dim / 2]");
    require(kCos, {call.batch, call.length, rotary_dim / 2}, "[B, S, rotary_dim / 2]");
    require(kSin, cos, "that of cos");
    require(kPosition, {call.batch}, "a number per sequence");
    require(kQNorm, {call.head_dim}, "[head_dim]");
    require(kKNorm, {call.head_dim}, "[head_dim]");
    call.capacity = cache.size() == 4 ? cache[2] : 0;
    require(kKeyCache, {call.batch, kv_heads, call.capacity, call.head_dim + (quantized ? 4 : 0)},
            quantized ? "[B, kv_heads, C, head_dim + 4 bytes of scale] for int8"
                      : "[B, kv_heads, C, head_dim] for float32");
    require(kValueCache, cache, "that of key_cache");
    call.qkv = in[kQkv].as<float>();
    call.cos = in[kCos].as<float>();
    call.sin = in[kSin].as<float>();
    call.position = in[kPosition].as<int64_t>();
    call.q_norm = in[kQNorm].as<float>();
    call.k_norm = in[kKNorm].as<float>();
    for (int64_t b = 0; b < call.batch; ++b) {
      if (call.position[b] < 0 || call.position[b] > call.capacity - call.length) {
        invalid("cache_position[", b, "] = ", call.position[b], " (allowed: 0 to ", call.capacity - call.length,
                ", for ", call.length, " more tokens in a cache of ", call.capacity, ")");
      }
    }
    return call;
  }

  void compute(Call& node) const {
    const auto in = read_inputs(node, inputs);
    Attention call = read(in);
    call.y = node.output<float>(0, {call.batch * call.length, heads * call.head_dim});
    char* key = node.output<char>(1, in[kKeyCache].shape);
    char* value = node.output<char>(2, in[kValueCache].shape);
    const size_t bytes = product(call.capacity, call.row_bytes());  // of a head; without sequences, of any size
    const Pool pool = node.pool();
    copy_cache(pool, in[kKeyCache], key, call.batch * kv_heads, bytes);
    copy_cache(pool, in[kValueCache], value, call.batch * kv_heads, bytes);
    call.key = key;
    call.value = value;
    attend(call, pool);
  }
};

const Operator<AttentionOp<ort::kFloat>> float_operator;
const Operator<AttentionOp<ort::kInt8>> int8_operator;
const ort::CustomOp* const all[] = {&float_operator, &int8_operator, nullptr};

}  // namespace

const ort::CustomOp* const* cached_attention_operators() { return all; }

}  // namespace moevlm
