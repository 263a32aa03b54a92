// The operator library that ONNX Runtime loads: domain moevlm.cpu, operator CachedAttention, version 1.
//
// Inputs and outputs are listed where they are read, in read_call. Errors leave as an OrtStatus, never as an
// exception: the caller may be built by another compiler.

#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "attention.h"
#include "matmul_ops.h"
#include "ort_abi.h"

namespace moevlm {
namespace {

// A status that ONNX Runtime made, on its way back to it.
struct Refused {
    ort::Status* status;
};

void check(ort::Status* status) {
    if (status) throw Refused{status};
}

template <class... Parts>
[[noreturn]] void invalid(const Parts&... parts) {
    std::ostringstream text;
    text << "CachedAttention: ";
    (text << ... << parts);
    throw std::invalid_argument(text.str());
}

template <class Body>
ort::Status* guarded(const ort::Api* api, Body body) noexcept {
    try {
        body();
        return nullptr;
    } catch (const Refused& refused) {
        return refused.status;
    } catch (const std::invalid_argument& error) {
        return api->create_status(ort::kInvalidArgument, error.what());
    } catch (const std::bad_alloc&) {
        return api->create_status(ort::kFail, "CachedAttention: out of memory");
    } catch (...) {
        return api->create_status(ort::kFail, "CachedAttention: internal error");
    }
}

enum Input { kQkv, kCos, kSin, kKeyCache, kValueCache, kPosition, kQNorm, kKNorm, kInputs };
enum Output { kY, kKeyCacheOut, kValueCacheOut, kOutputs };
constexpr const char* kInputNames[] = {
    "qkv", "cos", "sin", "key_cache", "value_cache", "cache_position", "q_norm", "k_norm"};

using Shape = std::vector<int64_t>;

std::string text(const Shape& shape) {
    std::string result = "[";
    for (size_t i = 0; i < shape.size(); ++i) result += (i ? ", " : "") + std::to_string(shape[i]);
    return result + "]";
}

struct Tensor {
    Shape shape;
    ort::ElementType type = ort::kFloat;
    const void* data = nullptr;  // null: an optional input that is not there

    template <class T>
    const T* as() const {
        return static_cast<const T*>(data);
    }
};

struct Kernel {
    const ort::Api* api;
    int64_t heads, kv_heads, rotary_dim;
    float epsilon;

    Kernel(const ort::Api* api, const ort::KernelInfo* info) : api(api) {
        heads = attribute(info, "heads");
        kv_heads = attribute(info, "kv_heads");
        rotary_dim = attribute(info, "rotary_dim");
        if (ort::Status* missing = api->attribute_float(info, "epsilon", &epsilon)) {
            api->release_status(missing);
            epsilon = 1e-6f;
        }
        if (heads < 1) invalid("heads = ", heads, " (allowed: 1 or more)");
        if (kv_heads < 1 || heads % kv_heads || heads / kv_heads > kMaxGroup) {
            invalid("kv_heads = ", kv_heads, " with heads = ", heads, " (allowed: heads / kv_heads a whole number from 1 to ",
                    kMaxGroup, ")");
        }
        if (rotary_dim < 0 || rotary_dim % 2) invalid("rotary_dim = ", rotary_dim, " (allowed: even, 0 or more)");
        if (!(epsilon >= 0)) invalid("epsilon = ", epsilon, " (allowed: 0 or more)");
    }

    int64_t attribute(const ort::KernelInfo* info, const char* name) const {
        int64_t value = 0;
        if (ort::Status* missing = api->attribute_int(info, name, &value)) {
            api->release_status(missing);
            invalid("attribute ", name, " is missing (an integer)");
        }
        return value;
    }

    Tensor input(const ort::KernelContext* context, Input index) const {
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

    void* output(ort::KernelContext* context, Output index, const Shape& shape) const {
        ort::Value* value = nullptr;
        check(api->output(context, index, shape.data(), shape.size(), &value));
        void* data = nullptr;
        if (value) check(api->tensor_data(value, &data));
        return data;
    }

    void compute(ort::KernelContext* context) const;
    Attention read_call(const Tensor (&inputs)[kInputs]) const;
};

void require_shape(const Tensor (&inputs)[kInputs], Input index, const Shape& shape, const char* meaning) {
    if (inputs[index].data && inputs[index].shape != shape) {
        invalid(kInputNames[index], " has shape ", text(inputs[index].shape), " (allowed: ", text(shape), ", ", meaning, ")");
    }
}

Attention Kernel::read_call(const Tensor (&inputs)[kInputs]) const {
    for (int i = 0; i <= kPosition; ++i) {
        if (!inputs[i].data) invalid(kInputNames[i], " is missing");
    }
    const Shape &qkv = inputs[kQkv].shape, &cos = inputs[kCos].shape, &cache = inputs[kKeyCache].shape;
    Attention call = {};
    call.heads = heads;
    call.kv_heads = kv_heads;
    call.rotary_dim = rotary_dim;
    call.epsilon = epsilon;
    if (cos.size() != 3) invalid("cos has shape ", text(cos), " (allowed: [B, S, rotary_dim / 2])");
    call.batch = cos[0];
    call.length = cos[1];
    const int64_t slots = heads + 2 * kv_heads;
    if (qkv.size() != 2 || qkv[1] % (slots * 8) || qkv[1] < slots * 8 || qkv[1] > slots * kMaxHeadDim) {
        invalid("qkv has shape ", text(qkv), " (allowed: [B * S, ", slots, " * head_dim], head_dim a multiple of 8 up to ",
                kMaxHeadDim, ")");
    }
    call.head_dim = qkv[1] / slots;
    if (rotary_dim > call.head_dim) {
        invalid("rotary_dim = ", rotary_dim, " (allowed: up to head_dim, which is ", call.head_dim, ")");
    }
    require_shape(inputs, kQkv, {call.batch * call.length, qkv[1]}, "a row for each token of cos [B, S, rotary_dim / 2]");
    require_shape(inputs, kCos, {call.batch, call.length, rotary_dim / 2}, "[B, S, rotary_dim / 2]");
    require_shape(inputs, kSin, cos, "that of cos");
    require_shape(inputs, kPosition, {call.batch}, "a number per sequence");
    require_shape(inputs, kQNorm, {call.head_dim}, "[head_dim]");
    require_shape(inputs, kKNorm, {call.head_dim}, "[head_dim]");

    if (inputs[kValueCache].type != inputs[kKeyCache].type) invalid("value_cache has another type than key_cache");
    call.quantized = inputs[kKeyCache].type == ort::kInt8;
    call.capacity = cache.size() == 4 ? cache[2] : 0;
    require_shape(
        inputs, kKeyCache, {call.batch, kv_heads, call.capacity, call.head_dim + (call.quantized ? 4 : 0)},
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

void Kernel::compute(ort::KernelContext* context) const {
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

// ONNX Runtime picks between operators of one name by the types of their inputs.
template <ort::ElementType Cache>
struct CachedAttention : ort::CustomOp {
    CachedAttention() {
        name = [](const CustomOp*) { return "CachedAttention"; };
        execution_provider = [](const CustomOp*) -> const char* { return nullptr; };
        input_type_count = [](const CustomOp*) -> size_t { return kInputs; };
        input_type = [](const CustomOp*, size_t i) {
            return i == kPosition ? ort::kInt64 : i == kKeyCache || i == kValueCache ? Cache : ort::kFloat;
        };
        output_type_count = [](const CustomOp*) -> size_t { return kOutputs; };
        output_type = [](const CustomOp*, size_t i) { return i == kY ? ort::kFloat : Cache; };
        input_characteristic = [](const CustomOp*, size_t i) { return i < kQNorm ? ort::kRequired : ort::kOptional; };
        output_characteristic = [](const CustomOp*, size_t) { return ort::kRequired; };
        input_memory_type = [](const CustomOp*, size_t) { return ort::kDefaultMemory; };
        start_version = end_version = [](const CustomOp*) { return 1; };
        create_kernel = [](const CustomOp*, const ort::Api* api, const ort::KernelInfo* info, void** kernel) {
            return guarded(api, [&] { *kernel = new Kernel(api, info); });
        };
        compute = [](void* kernel, ort::KernelContext* context) {
            const Kernel* self = static_cast<Kernel*>(kernel);
            return guarded(self->api, [&] { self->compute(context); });
        };
        destroy_kernel = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    }
};

const CachedAttention<ort::kFloat> float_operator;
const CachedAttention<ort::kInt8> int8_operator;

// Session options point to it and do not own it, nor say when they are gone: one for the life of the process.
ort::OpDomain* operator_domain(const ort::Api* api) {
    static ort::OpDomain* const shared = [api] {
        ort::OpDomain* domain = nullptr;
        check(api->create_op_domain("moevlm.cpu", &domain));
        check(api->op_domain_add(domain, &float_operator));
        check(api->op_domain_add(domain, &int8_operator));
        for (auto op = quantized::matmul_operators(); *op; ++op) check(api->op_domain_add(domain, *op));
        return domain;
    }();
    return shared;
}

}  // namespace
}  // namespace moevlm

extern "C" __attribute__((visibility("default"))) moevlm::ort::Status* RegisterCustomOps(
    moevlm::ort::SessionOptions* options, const moevlm::ort::ApiBase* base) noexcept {
    using namespace moevlm;
    const ort::Api* api = base->get_api(ort::kApiVersion);
    if (!api) return base->get_api(1)->create_status(ort::kFail, "moevlm.cpu needs ONNX Runtime 1.17 or newer");
    return guarded(api, [&] { check(api->add_op_domain(options, operator_domain(api))); });
}
