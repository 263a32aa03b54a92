// The operator PagedAttention: reads and checks a node's attributes and inputs, finds its outputs, runs the attention.
#include "ort/attention_op.h"

#include <cmath>

#include "attention/attention.h"
#include "ort/custom_op.h"
#include "ort/step_inputs.h"

namespace moevlm {
namespace {

enum Input {
  kQkv, kCos, kSin, kKeyCache, kValueCache, kQueryStart, kContextLen, kPageTable, kQNorm, kKNorm, kSinks, kVisibleEnd,
  kInputs
};

// ONNX Runtime picks between operators of one name by the types of their inputs.
template <ort::ElementType Cache>
struct AttentionOp {
  static constexpr const char* name = "PagedAttention";
  static constexpr Port inputs[] = {{"qkv", ort::kFloat},
                                    {"cos", ort::kFloat, ort::kOptional},
                                    {"sin", ort::kFloat, ort::kOptional},
                                    {"key_cache", Cache},
                                    {"value_cache", Cache, ort::kOptional},
                                    {"query_start", ort::kInt32},
                                    {"context_len", ort::kInt32},
                                    {"page_table", ort::kInt32},
                                    {"q_norm", ort::kFloat, ort::kOptional},
                                    {"k_norm", ort::kFloat, ort::kOptional},
                                    {"sinks", ort::kFloat, ort::kOptional},
                                    {"visible_end", ort::kInt32, ort::kOptional}};
  static constexpr Port outputs[] = {
      {"y", ort::kFloat}, {"key_cache_out", Cache}, {"value_cache_out", Cache, ort::kOptional}};
  static constexpr bool quantized = Cache == ort::kInt8;
  static constexpr int64_t scale_bytes = quantized ? 4 : 0;
  int64_t heads, kv_heads, rotary_dim, rotary_start, window, chunk, value_in_key, value_dim, value_is_key, value_norm;
  float scale, softcap, epsilon;

  explicit AttentionOp(const Attributes& a)
      : heads(a.integer("heads", 1, kMaxHeads)),
        kv_heads(a.integer("kv_heads", 1, heads)),
        rotary_dim(a.integer("rotary_dim", 0, kMaxKeyDim)),
        rotary_start(a.integer_or("rotary_start", 0, 0, kMaxKeyDim)),
        window(a.integer_or("window", 0, 0, kMaxEntries)),
        chunk(a.integer_or("chunk", 0, 0, kMaxEntries)),
        value_in_key(a.integer_or("value_in_key", 0, 0, 1)),
        value_dim(a.integer_or("value_dim", 0, 0, kMaxValueDim)),
        value_is_key(a.integer_or("value_is_key", 0, 0, value_in_key ? 0 : 1)),
        value_norm(a.integer_or("value_norm", 0, 0, value_in_key ? 0 : 1)),
        scale(a.number_or("scale", 0)),
        softcap(a.number_or("softcap", 0)),
        epsilon(a.number_or("epsilon", 1e-6f)) {
    if (heads % kv_heads) invalid("kv_heads = ", kv_heads, " with heads = ", heads, " (allowed: a divisor of heads)");
    if (rotary_dim % 2) invalid("rotary_dim = ", rotary_dim, " (allowed: even)");
    if (value_in_key && (value_dim < 2 || value_dim % 2)) {
      invalid("value_dim = ", value_dim, " with value_in_key (allowed: even, 2 to ", kMaxValueDim, ")");
    }
    for (const auto& [field, value] : {std::pair{"scale", scale}, {"softcap", softcap}, {"epsilon", epsilon}}) {
      if (!(value >= 0 && std::isfinite(value))) invalid(field, " = ", value, " (allowed: 0 or more)");
    }
  }

  attention::Call read(const std::array<Tensor, kInputs>& in) const {
    const auto require = [&](Input input, const Shape& shape, const char* meaning) {
      require_shape(inputs[input].name, in[input], shape, meaning);
    };
    attention::Call call = {};
    call.heads = heads;
    call.kv_heads = kv_heads;
    call.rotary_dim = rotary_dim;
    call.rotary_start = rotary_start;
    call.window = window;
    call.chunk = chunk;
    call.softcap = softcap;
    call.epsilon = epsilon;
    call.quantized = quantized;
    call.value_in_key = value_in_key;
    call.value_is_key = value_is_key;
    call.value_norm = value_norm;
    read_caches(in, call);
    call.scale = scale > 0 ? scale : 1 / std::sqrt(static_cast<float>(call.key_dim));
    if (rotary_start + rotary_dim > call.key_dim) {
      invalid("rotary_start + rotary_dim = ", rotary_start + rotary_dim, " (allowed: up to the ", call.key_dim,
              " dimensions of a key)");
    }
    const Shape& qkv = in[kQkv].shape;
    call.tokens = qkv.empty() ? 0 : qkv[0];
    if (call.tokens > kMaxTokens) invalid("qkv has shape ", text(qkv), " (allowed: up to ", kMaxTokens, " rows)");
    require(kQkv, {call.tokens, call.width()},
            value_in_key || value_is_key ? "[T, (heads + kv_heads) * key_dim]"
                                         : "[T, (heads + kv_heads) * key_dim + kv_heads * value_dim]");
    for (const Input table : {kCos, kSin}) {
      if ((rotary_dim > 0) != (in[table].data != nullptr)) {
        invalid(inputs[table].name, " is ", rotary_dim ? "missing" : "given", " (allowed with rotary_dim = ", rotary_dim,
                rotary_dim ? ": [T, rotary_dim / 2])" : ": none)");
      }
      require(table, {call.tokens, rotary_dim / 2}, "[T, rotary_dim / 2]");
    }
    require(kQNorm, {call.key_dim}, "[key_dim]");
    require(kKNorm, {call.key_dim}, "[key_dim]");
    require(kSinks, {heads}, "[heads]");
    require(kVisibleEnd, {call.tokens}, "[T]");
    if (!in[kQNorm].data != !in[kKNorm].data) {
      invalid(in[kQNorm].data ? "k_norm" : "q_norm", " is missing (allowed: both norms, or none)");
    }
    call.qkv = in[kQkv].as<float>();
    call.cos = in[kCos].as<float>();
    call.sin = in[kSin].as<float>();
    call.q_norm = in[kQNorm].as<float>();
    call.k_norm = in[kKNorm].as<float>();
    call.sinks = in[kSinks].as<float>();
    call.visible_end = in[kVisibleEnd].as<int32_t>();
    read_sequences(in, call);
    return call;
  }

  void read_caches(const std::array<Tensor, kInputs>& in, attention::Call& call) const {
    const Shape &key = in[kKeyCache].shape, &value = in[kValueCache].shape;
    constexpr const char* kind = quantized ? "int8" : "float32";
    constexpr const char* rest = quantized ? " + 4 bytes of scale], " : "], ";
    call.key_dim = key.size() == 4 ? key[3] - scale_bytes : 0;
    if (call.key_dim < 2 || call.key_dim > kMaxKeyDim || call.key_dim % 2 || key[1] != kv_heads ||
        key[2] < attention::kStrip || key[2] > kMaxEntries || key[2] % attention::kStrip) {
      invalid("key_cache has shape ", text(key), " (allowed for ", kind, ": [pages, ", kv_heads,
              ", page, key_dim", rest, "page a multiple of ", attention::kStrip, ", key_dim even, 2 to ", kMaxKeyDim,
              ")");
    }
    call.pages = key[0];
    call.page = key[2];
    if (!value_in_key != (in[kValueCache].data != nullptr)) {
      invalid("value_cache is ", value_in_key ? "given" : "missing", " (allowed with value_in_key = ", value_in_key,
              value_in_key ? ": none)" : ": [pages, kv_heads, page, value_dim])");
    }
    call.value_dim = value_in_key ? value_dim : value.size() == 4 ? value[3] - scale_bytes : 0;
    if (value_in_key) {
      if (value_dim > call.key_dim) invalid("value_dim = ", value_dim, " (allowed: up to key_dim, ", call.key_dim, ")");
    } else if (call.value_dim < 2 || call.value_dim > kMaxValueDim || call.value_dim % 2 ||
               !std::equal(value.begin(), value.end() - 1, key.begin())) {
      invalid("value_cache has shape ", text(value), " (allowed for ", kind, ": [", key[0], ", ", key[1], ", ", key[2],
              ", value_dim", rest, "value_dim even, 2 to ", kMaxValueDim, ")");
    }
    if (value_is_key && call.value_dim != call.key_dim) {
      invalid("value_cache has shape ", text(value), " (allowed with value_is_key: that of key_cache, ", text(key), ")");
    }
  }

  void read_sequences(const std::array<Tensor, kInputs>& in, attention::Call& call) const {
    const Shape &context = in[kContextLen].shape, &table = in[kPageTable].shape;
    if (context.size() != 1) invalid("context_len has shape ", text(context), " (allowed: [N])");
    call.sequences = context[0];
    require_shape("query_start", in[kQueryStart], {call.sequences + 1}, "[N + 1] for context_len [N]");
    if (table.size() != 2 || table[0] != call.sequences) {
      invalid("page_table has shape ", text(table), " (allowed: [", call.sequences, ", pages of a sequence])");
    }
    call.table_width = table[1];
    call.query_start = in[kQueryStart].as<int32_t>();
    call.context_len = in[kContextLen].as<int32_t>();
    call.page_table = in[kPageTable].as<int32_t>();
    require_query_start(call.query_start, call.sequences, call.tokens);
    for (int64_t n = 0; n < call.sequences; ++n) {
      const int64_t context_len = call.context_len[n], length = call.length(n);
      if (context_len < 0 || context_len + length > kMaxEntries) {
        invalid("context_len[", n, "] = ", context_len, " (allowed: 0 to ", kMaxEntries - length, ")");
      }
      if (length == 0) continue;
      const int64_t used = ceil_div(context_len + length, call.page);
      if (used > call.table_width) {
        invalid("page_table has ", call.table_width, " pages a sequence (allowed: ", used, " or more, for the ",
                context_len + length, " tokens of sequence ", n, ")");
      }
      for (int64_t i = call.first_seen(context_len) / call.page; i < used; ++i) {
        const int32_t page = call.page_table[n * call.table_width + i];
        if (page < 0 || page >= call.pages) {
          invalid("page_table[", n, ", ", i, "] = ", page, " (allowed: 0 to ", call.pages - 1, ")");
        }
      }
    }
  }

  void compute(Call& node) const {
    const auto in = read_inputs(node, inputs);
    attention::Call call = read(in);
    call.y = node.output<float>(0, {call.tokens, heads * call.value_dim});
    const Pool pool = node.pool();
    const auto updated = [&](Input input, size_t output) {
      char* cache = node.output<char>(output, in[input].shape);
      copy_pool(pool, in[input], cache, quantized ? 1 : sizeof(float));
      return cache;
    };
    call.key = updated(kKeyCache, 1);
    if (!value_in_key) call.value = updated(kValueCache, 2);
    attention::attend(call, pool);
  }
};

const Operator<AttentionOp<ort::kFloat>> float_operator;
const Operator<AttentionOp<ort::kInt8>> int8_operator;
const ort::CustomOp* const all[] = {&float_operator, &int8_operator, nullptr};

}  // namespace

const ort::CustomOp* const* attention_operators() { return all; }

}  // namespace moevlm
