// What every operator of the library needs around its computation: tensors in and out, attributes, errors as statuses.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <new>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "ort/abi.h"
#include "parallel.h"
#include "sizes.h"

namespace moevlm {

// A status that ONNX Runtime made, on its way back to it.
struct Refused {
  ort::Status* status;
};

inline void check(ort::Status* status) {
  if (status) throw Refused{status};
}

template <class... Parts>
[[noreturn]] void invalid(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// Runs body; whatever it throws becomes a status that begins with the operator's name.
template <class Body>
ort::Status* guarded(const ort::Api* api, const char* name, Body body) noexcept {
  const auto status = [&](ort::ErrorCode code, const char* what) {
    try {
      return api->create_status(code, (std::string(name) + ": " + what).c_str());
    } catch (...) {
      return api->create_status(code, name);
    }
  };
  try {
    body();
    return nullptr;
  } catch (const Refused& refused) {
    return refused.status;
  } catch (const std::invalid_argument& error) {
    return status(ort::kInvalidArgument, error.what());
  } catch (const std::bad_alloc&) {
    return status(ort::kFail, "out of memory");
  } catch (...) {
    return status(ort::kFail, "internal error");
  }
}

using Shape = std::vector<int64_t>;

inline std::string text(const Shape& shape) {
  std::string result = "[";
  for (size_t i = 0; i < shape.size(); ++i) result += (i ? ", " : "") + std::to_string(shape[i]);
  return result + "]";
}

struct Attributes {
  const ort::Api* api;
  const ort::KernelInfo* info;

  int64_t integer(const char* name) const {
    int64_t value = 0;
    if (!found(api->attribute_int(info, name, &value))) invalid("attribute ", name, " is missing (an integer)");
    return value;
  }

  // One of `low` to `high`.
  int64_t integer(const char* name, int64_t low, int64_t high) const {
    const int64_t value = integer(name);
    if (value < low || value > high) invalid(name, " = ", value, " (allowed: ", low, " to ", high, ")");
    return value;
  }

  int64_t integer_or(const char* name, int64_t otherwise, int64_t low, int64_t high) const {
    int64_t value = 0;
    return found(api->attribute_int(info, name, &value)) ? integer(name, low, high) : otherwise;
  }

  float number_or(const char* name, float otherwise) const {
    float value = 0;
    return found(api->attribute_float(info, name, &value)) ? value : otherwise;
  }

  // The place of the attribute's value among `allowed`; 0 where it is missing.
  template <size_t N>
  int choice(const char* name, const char* const (&allowed)[N]) const {
    char value[64] = {};
    size_t size = sizeof(value);
    if (!found(api->attribute_string(info, name, value, &size))) {
      if (size > sizeof(value)) invalid(name, " is ", size - 1, " characters long (allowed: ", list(allowed), ")");
      return 0;
    }
    for (size_t i = 0; i < N; ++i)
      if (std::string(value) == allowed[i]) return static_cast<int>(i);
    invalid(name, " = \"", value, "\" (allowed: ", list(allowed), ")");
  }

 private:
  bool found(ort::Status* status) const {
    if (status) api->release_status(status);
    return !status;
  }

  template <size_t N>
  static std::string list(const char* const (&allowed)[N]) {
    std::string all = allowed[0];
    for (size_t i = 1; i < N; ++i) all += std::string(", ") + allowed[i];
    return all;
  }
};

struct Tensor {
  Shape shape;
  const void* data = nullptr;  // null: an optional input that is not there

  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
  // A size of 0 makes no elements, whatever the others are.
  int64_t elements() const {
    if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;
    return std::accumulate(shape.begin(), shape.end(), int64_t{1}, product);
  }
};

// One call of an operator.
class Call {
 public:
  Call(const ort::Api* api, ort::KernelContext* context) : api_(api), context_(context) {}

  Tensor input(size_t index) const {
    Tensor tensor;
    size_t count = 0, rank = 0;
    check(api_->input_count(context_, &count));
    const ort::Value* value = nullptr;
    if (index < count) check(api_->input(context_, index, &value));
    if (!value) return tensor;
    ort::ShapeInfo* info = nullptr;
    check(api_->type_and_shape(value, &info));
    const auto release = [this](ort::ShapeInfo* held) { api_->release_shape_info(held); };
    const std::unique_ptr<ort::ShapeInfo, decltype(release)> held(info, release);
    check(api_->dimensions_count(info, &rank));
    tensor.shape.resize(rank);
    check(api_->dimensions(info, tensor.shape.data(), rank));
    void* data = nullptr;
    check(api_->tensor_data(const_cast<ort::Value*>(value), &data));
    static const char nothing[1] = {};  // an empty tensor is there, wherever its data is
    tensor.data = data ? data : nothing;
    return tensor;
  }

  template <class T>
  T* output(size_t index, const Shape& shape) const {
    ort::Value* value = nullptr;
    check(api_->output(context_, index, shape.data(), shape.size(), &value));
    if (!value) invalid("output ", index, " must be named");
    void* data = nullptr;
    check(api_->tensor_data(value, &data));
    return static_cast<T*>(data);
  }

  // The session's threads; valid as long as this call.
  Pool pool() {
    static const int64_t processors = std::max(1u, std::thread::hardware_concurrency());
    return {this, processors, [](void* self, size_t total, void (*task)(void*, size_t), void* argument) {
              const Call& call = *static_cast<Call*>(self);
              check(call.api_->parallel_for(call.context_, task, total, 0, argument));
            }};
  }

 private:
  const ort::Api* api_;
  ort::KernelContext* context_;
};

inline void require_shape(const char* name, const Tensor& tensor, const Shape& shape, const char* meaning) {
  if (tensor.data && tensor.shape != shape)
    invalid(name, " has shape ", text(tensor.shape), " (allowed: ", text(shape), ", ", meaning, ")");
}

struct Port {
  const char* name;
  ort::ElementType type;
  ort::Characteristic required = ort::kRequired;
};

// The inputs of a call. ONNX Runtime refuses graphs in which one that is required is missing.
template <size_t N>
std::array<Tensor, N> read_inputs(const Call& call, const Port (&)[N]) {
  std::array<Tensor, N> tensors;
  for (size_t i = 0; i < N; ++i) tensors[i] = call.input(i);
  return tensors;
}

// Op has: static name, inputs, outputs (arrays of Port); a constructor from Attributes; compute(Call&) const.
template <class Op>
struct Operator : ort::CustomOp {
  Operator() {
    name = [](const CustomOp*) { return Op::name; };
    execution_provider = [](const CustomOp*) -> const char* { return nullptr; };
    input_type_count = [](const CustomOp*) -> size_t { return sizeof(Op::inputs) / sizeof(Port); };
    input_type = [](const CustomOp*, size_t i) { return Op::inputs[i].type; };
    input_characteristic = [](const CustomOp*, size_t i) { return Op::inputs[i].required; };
    input_memory_type = [](const CustomOp*, size_t) { return ort::kDefaultMemory; };
    output_type_count = [](const CustomOp*) -> size_t { return sizeof(Op::outputs) / sizeof(Port); };
    output_type = [](const CustomOp*, size_t i) { return Op::outputs[i].type; };
    output_characteristic = [](const CustomOp*, size_t i) { return Op::outputs[i].required; };
    start_version = end_version = [](const CustomOp*) { return 1; };
    create_kernel = [](const CustomOp*, const ort::Api* api, const ort::KernelInfo* info, void** kernel) {
      return guarded(api, Op::name, [&] { *kernel = new Held{Op(Attributes{api, info}), api}; });
    };
    compute = [](void* kernel, ort::KernelContext* context) {
      const Held& held = *static_cast<Held*>(kernel);
      return guarded(held.api, Op::name, [&] {
        Call call(held.api, context);
        held.op.compute(call);
      });
    };
    destroy_kernel = [](void* kernel) { delete static_cast<Held*>(kernel); };
  }

 private:
  struct Held {
    Op op;
    const ort::Api* api;
  };
};

}  // namespace moevlm
