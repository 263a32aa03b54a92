// Reads and checks a node's attributes and inputs, finds its outputs, and runs the attention.

#include "operator.h"

#include <cstring>
#include <memory>
#include <sstream>
#include <string>

namespace moevlm {
namespace {

constexpr const char* kInputNames[] = {
    "qkv", "cos", "sin", "key_cache", "value_cache", "cache_position", "q_norm", "k_norm"};

template <class... Parts>
[[noreturn]] void invalid(const Parts&... parts) {
    std::ostringstream text;
    text << "CachedAttention: ";
    (text << ... << parts);
    throw std::invalid_argument(text.str());
}

using Shape = std::vector<int64_t>;

std::string text(const Shape& shape) {
    std::string result = "[";
    for (size_t i = 0; i < shape.size(); ++i) result += (i ? ", " : "") + std::to_string(shape[i]);
    return result + "]";
}

void require_shape(const Tensor (&inputs)[kInputs], Input index, const Shape& shape, const char* meaning) {
    if (inputs[index].data && inputs[index].shape != shape) {
        invalid(kInputNames[index], " has shape ", text(inputs[index].shape), " (allowed: ", text(shape), ", ", meaning, ")");
    }
}

class SessionThreads final : public ParallelFor {
  public:
    SessionThreads(const ort::Api* api, const ort::KernelContext* context) : api_(api), context_(context) {}

    void operator()(int64_t total, void (*task)(void*, size_t), void* data) override {
        check(api_->parallel_for(context_, task, static_cast<size_t>(total), 0, data));
    }

  private:
    const ort::Api* api_;
    const ort::KernelContext* context_;
};

// The caches as they were, where the caller keeps them apart from the new ones.
void copy_caches(const Attention& call, const Tensor& key, const Tensor& value, ParallelFor& parallel_for) {
    struct Copy {
        size_t bytes;
        int64_t heads;
        const char* from[2];
        char* to[2];
    } copy = {
        static_cast<size_t>(call.capacity * call.row_bytes()), call.batch * call.kv_heads,
        {key.as<char>(), value.as<char>()}, {static_cast<char*>(call.key), static_cast<char*>(call.value)}};
    if (copy.bytes * copy.heads == 0) return;
    for (int which : {0, 1}) {
        if (copy.from[which] == copy.to[which]) copy.from[which] = nullptr;
    }
    if (!copy.from[0] && !copy.from[1]) return;
    parallel_for(
        2 * copy.heads,
        [](void* data, size_t i) {
            const Copy& copy = *static_cast<Copy*>(data);
            const size_t at = i / 2 * copy.bytes;
            if (copy.from[i % 2]) std::memcpy(copy.to[i % 2] + at, copy.from[i % 2] + at, copy.bytes);
        },
        &copy);
}

}  // namespace

Operator::Operator(const ort::Api* api, const ort::KernelInfo* info) : api(api) {
    heads_ = attribute(info, "heads");
    kv_heads_ = attribute(info, "kv_heads");
    rotary_dim_ = attribute(info, "rotary_dim");
    if (ort::Status* missing = api->attribute_float(info, "epsilon", &epsilon_)) {
        api->release_status(missing);
        epsilon_ = 1e-6f;
    }
    if (heads_ < 1) invalid("heads = ", heads_, " (allowed: 1 or more)");
    if (kv_heads_ < 1 || heads_ % kv_heads_ || heads_ / kv_heads_ > kMaxGroup) {
        invalid("kv_heads = ", kv_heads_, " with heads = ", heads_, " (allowed: heads / kv_heads a whole number from 1 to ",
                kMaxGroup, ")");
    }
    if (rotary_dim_ < 0 || rotary_dim_ % 2) invalid("rotary_dim = ", rotary_dim_, " (allowed: even, 0 or more)");
    if (!(epsilon_ >= 0)) invalid("epsilon = ", epsilon_, " (allowed: 0 or more)");
}

int64_t Operator::attribute(const ort::KernelInfo* info, const char* name) const {
    int64_t value = 0;
    if (ort::Status* missing = api->attribute_int(info, name, &value)) {
        api->release_status(missing);
        invalid("attribute ", name, " is missing (an integer)");
    }
    return value;
}

Tensor Operator::input(const ort::KernelContext* context, Input index) const {
    Tensor tensor;
    size_t count = 0;
    check(api->input_count(context, &count));
    const ort::Value* value = nullptr;
    if (static_cast<size_t>(index) < count) check(api->input(context, index, &value));
    if (!value) return tensor;
    ort::ShapeInfo* info = nullptr;
    check(api->type_and_shape(value, &info));
    const auto release = [this](ort::ShapeInfo* held) { api->release_shape_info(held); };
    const std::unique_ptr<ort::ShapeInfo, decltype(release)> held(info, release);
    size_t rank = 0;
    check(api->element_type(info, &tensor.type));
    check(api->dimensions_count(info, &rank));
    tensor.shape.resize(rank);
    check(api->dimensions(info, tensor.shape.data(), rank));
    void* data = nullptr;
    check(api->tensor_data(const_cast<ort::Value*>(value), &data));
    static const char nothing[1] = {};  // an empty tensor is there, wherever its data is
    tensor.data = data ? data : nothing;
    return tensor;
}

void* Operator::output(ort::KernelContext* context, Output index, const Shape& shape) const {
    ort::Value* value = nullptr;
    check(api->output(context, index, shape.data(), shape.size(), &value));
    void* data = nullptr;
    if (value) check(api->tensor_data(value, &data));
    return data;
}

Attention Operator::read_call(const Tensor (&inputs)[kInputs]) const {
    for (int i = 0; i <= kPosition; ++i) {
        if (!inputs[i].data) invalid(kInputNames[i], " is missing");
    }
    const Shape &qkv = inputs[kQkv].shape, &cos = inputs[kCos].shape, &cache = inputs[kKeyCache].shape;
    Attention call = {};
    call.heads = heads_;
    call.kv_heads = kv_heads_;
    call.rotary_dim = rotary_dim_;
    call.epsilon = epsilon_;
    if (cos.size() != 3) invalid("cos has shape ", text(cos), " (allowed: [B, S, rotary_dim / 2])");
    call.batch = cos[0];
    call.length = cos[1];
    const int64_t slots = heads_ + 2 * kv_heads_;
    if (qkv.size() != 2 || qkv[1] % (slots * 8) || qkv[1] < slots * 8 || qkv[1] > slots * kMaxHeadDim) {
        invalid("qkv has shape ", text(qkv), " (allowed: [B * S, ", slots, " * head_dim], head_dim a multiple of 8 up to ",
                kMaxHeadDim, ")");
    }
    call.head_dim = qkv[1] / slots;
    if (rotary_dim_ > call.head_dim) {
        invalid("rotary_dim = ", rotary_dim_, " (allowed: up to head_dim, which is ", call.head_dim, ")");
    }
    require_shape(inputs, kQkv, {call.batch * call.length, qkv[1]}, "a row for each token of cos [B, S, rotary_dim / 2]");
    require_shape(inputs, kCos, {call.batch, call.length, rotary_dim_ / 2}, "[B, S, rotary_dim / 2]");
    require_shape(inputs, kSin, cos, "that of cos");
    require_shape(inputs, kPosition, {call.batch}, "a number per sequence");
    require_shape(inputs, kQNorm, {call.head_dim}, "[head_dim]");
    require_shape(inputs, kKNorm, {call.head_dim}, "[head_dim]");

    if (inputs[kValueCache].type != inputs[kKeyCache].type) invalid("value_cache has another type than key_cache");
    call.quantized = inputs[kKeyCache].type == ort::kInt8;
    call.capacity = cache.size() == 4 ? cache[2] : 0;
    require_shape(
        inputs, kKeyCache, {call.batch, kv_heads_, call.capacity, call.head_dim + (call.quantized ? 4 : 0)},
        call.quantized ? "[B, kv_heads, C, head_dim + 4 bytes of scale] for int8" : "[B, kv_heads, C, head_dim] for float32");
    require_shape(inputs, kValueCache, cache, "that of key_cache");
    call.qkv = inputs[kQkv].as<float>();
    call.cos = inputs[kCos].as<float>();
    call.sin = inputs[kSin].as<float>();
    call.position = inputs[kPosition].as<int64_t>();
    call.q_norm = inputs[kQNorm].as<float>();
    call.k_norm = inputs[kKNorm].as<float>();
    for (int64_t b = 0; b < call.batch; ++b) {
        if (call.position[b] < 0 || call.position[b] > call.capacity - call.length) {
            invalid("cache_position[", b, "] = ", call.position[b], " (allowed: 0 to ", call.capacity - call.length, ", for ",
                    call.length, " more tokens in a cache of ", call.capacity, ")");
        }
    }
    return call;
}

void Operator::compute(ort::KernelContext* context) const {
    Tensor inputs[kInputs];
    for (int i = 0; i < kInputs; ++i) inputs[i] = input(context, static_cast<Input>(i));
    Attention call = read_call(inputs);
    call.y = static_cast<float*>(output(context, kY, {call.batch * call.length, call.heads * call.head_dim}));
    call.key = output(context, kKeyCacheOut, inputs[kKeyCache].shape);
    call.value = output(context, kValueCacheOut, inputs[kValueCache].shape);
    if (call.batch * call.length > 0 && !(call.y && call.key && call.value)) invalid("all three outputs must be named");
    SessionThreads threads(api, context);
    copy_caches(call, inputs[kKeyCache], inputs[kValueCache], threads);
    attend(call, threads);
}

}  // namespace moevlm
