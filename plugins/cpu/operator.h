// What ONNX Runtime creates for a CachedAttention node, and how it is called.

#pragma once

#include <exception>
#include <new>
#include <stdexcept>
#include <vector>

#include "attention.h"
#include "ort_abi.h"

namespace moevlm {

// A status that ONNX Runtime made, on its way back to it.
struct Refused {
    ort::Status* status;
};

inline void check(ort::Status* status) {
    if (status) throw Refused{status};
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
struct Tensor {
    std::vector<int64_t> shape;
    ort::ElementType type = ort::kFloat;
    const void* data = nullptr;  // null: an optional input that is not there

    template <class T>
    const T* as() const {
        return static_cast<const T*>(data);
    }
};

// Its functions throw what `guarded` turns into a status: std::invalid_argument for a mistake of whoever wrote the
// graph or feeds it, with one line that names what is wrong and what is allowed.
class Operator {
  public:
    Operator(const ort::Api*, const ort::KernelInfo*);
    void compute(ort::KernelContext*) const;

    const ort::Api* const api;

  private:
    int64_t attribute(const ort::KernelInfo*, const char* name) const;
    Tensor input(const ort::KernelContext*, Input) const;
    void* output(ort::KernelContext*, Output, const std::vector<int64_t>& shape) const;
    Attention read_call(const Tensor (&inputs)[kInputs]) const;

    int64_t heads_, kv_heads_, rotary_dim_;
    float epsilon_;
};

}  // namespace moevlm
