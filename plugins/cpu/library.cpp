// The operator library that ONNX Runtime loads: domain moevlm.cpu, version 1, operators CachedAttention, Linear,
// MoEExperts and MoERouter.

#include "matmul_ops.h"
#include "operator.h"
#include "ort_abi.h"

namespace moevlm {
namespace {

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
            return guarded(api, [&] { *kernel = new Operator(api, info); });
        };
        compute = [](void* kernel, ort::KernelContext* context) {
            const Operator* self = static_cast<Operator*>(kernel);
            return guarded(self->api, [&] { self->compute(context); });
        };
        destroy_kernel = [](void* kernel) { delete static_cast<Operator*>(kernel); };
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
