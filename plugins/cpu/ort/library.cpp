// The operator library that ONNX Runtime loads: domain moevlm.cpu, version 1. Its operators are those below.
#include "ort/attention_op.h"
#include "ort/candidates_op.h"
#include "ort/custom_op.h"
#include "ort/delta_op.h"
#include "simd/instruction_set.h"
#include "ort/matmul_ops.h"

namespace moevlm {
namespace {

// Session options point to it and do not own it, nor say when they are gone: one for the life of the process.
ort::OpDomain* operator_domain(const ort::Api* api) {
  static ort::OpDomain* const shared = [api] {
    instruction_set();  // throws here rather than in the first call of an operator
    ort::OpDomain* domain = nullptr;
    check(api->create_op_domain("moevlm.cpu", &domain));
    for (auto operators : {attention_operators(), matmul::matmul_operators(), delta_operators(), candidates_operators()})
      for (auto op = operators; *op; ++op) check(api->op_domain_add(domain, *op));
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
  return guarded(api, "moevlm.cpu", [&] { check(api->add_op_domain(options, operator_domain(api))); });
}
