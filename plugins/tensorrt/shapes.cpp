#include "shapes.h"

#include <algorithm>

#include "errors.h"

namespace moevlm::tensorrt {
namespace {

const char* dtype_name(int32_t dtype) {
  constexpr const char* kNames[] = {"float32", "float16", "int8",  "int32", "bool",          "uint8",
                                    "float8",  "bfloat16", "int64", "int4",  "float4_e2m1", "float8_e8m0"};
  return dtype >= 0 && dtype < 12 ? kNames[dtype] : "unknown";
}

// A dimension's bounds: what it may be within the profile, or what it is.
Range range(const abi::DynamicTensorDesc& tensor, size_t i) {
  const int64_t dim = tensor.desc.dims.d[i];
  return dim >= 0 ? Range{dim, dim} : Range{tensor.min.d[i], tensor.max.d[i]};
}
Range range(const abi::TensorDesc& tensor, size_t i) { return {tensor.dims.d[i], tensor.dims.d[i]}; }

// The symbol's size, where the dimension is that and a number.
Range without(const Range& dim, int64_t plus) { return {dim.least - plus, dim.most - plus}; }

const abi::TensorDesc& desc(const abi::DynamicTensorDesc& tensor) { return tensor.desc; }
const abi::TensorDesc& desc(const abi::TensorDesc& tensor) { return tensor; }

size_t rank(const abi::TensorDesc& tensor) {
  return static_cast<size_t>(std::clamp(tensor.dims.count, 0, abi::kMaxDims));
}

template <class Desc>
std::string shape_of(const Desc& tensor) {
  std::string shape = "[";
  for (size_t i = 0; i < rank(desc(tensor)); ++i) shape += (i ? ", " : "") + text(range(tensor, i));
  return shape + "]";
}

std::string shape_of(const Tensor& tensor) {
  std::string shape = "[";
  for (size_t i = 0; i < tensor.shape.size(); ++i) {
    const auto& [symbol, value] = tensor.shape[i];
    shape += i ? ", " : "";
    if (symbol) shape += kSymbols[*symbol];
    if (symbol && value) shape += " + ";
    if (!symbol || value) shape += std::to_string(value);
  }
  return shape + "]";
}

// Finds what a program's symbols are, tensor by tensor.
template <class Desc>
class Checker {
 public:
  explicit Checker(const Program& program) : program_(program), ranges_(program.possible()) {}

  void tensor(const char* role, const Tensor& expected, const Desc& given) {
    const int32_t dtype = static_cast<int32_t>(desc(given).type);
    if (dtype != expected.dtype)
      invalid(role, " ", expected.name, " has dtype ", dtype_name(dtype), ", its kernels were compiled for ",
              dtype_name(expected.dtype));
    if (desc(given).format != abi::TensorFormat::kLinear)
      invalid(role, " ", expected.name, " has format ", static_cast<int32_t>(desc(given).format),
              " (allowed: 0, linear)");
    bool same = rank(desc(given)) == expected.shape.size();
    for (size_t i = 0; same && i < expected.shape.size(); ++i) {
      const auto& [symbol, value] = expected.shape[i];
      same = symbol || range(given, i) == Range{value, value};
    }
    if (!same)
      invalid(role, " ", expected.name, " has shape ", shape_of(given), ", its kernels were compiled for ",
              shape_of(expected));
    for (size_t i = 0; i < expected.shape.size(); ++i)
      if (const auto& [symbol, plus] = expected.shape[i]; symbol)
        symbol_of(role, expected, *symbol, without(range(given, i), plus));
  }

  // The sizes, for which every image has a variant.
  Ranges ranges() const {
    for (const Image& image : program_.images)
      if (!image.takes(ranges_)) invalid("its kernels for sm", image.sm, " are not for ", program_.describe(ranges_));
    return ranges_;
  }

 private:
  void symbol_of(const char* role, const Tensor& tensor, size_t symbol, const Range& given) {
    if (!first_[symbol]) {
      const int64_t most = program_.largest[symbol];
      if (given.least < 1 || given.most > most)
        invalid(role, " ", tensor.name, " has ", kSymbols[symbol], " = ", text(given), " (allowed: 1 to ", most, ")");
      ranges_[symbol] = given;
      first_[symbol] = &tensor;
    } else if (!(given == ranges_[symbol])) {
      invalid(role, " ", tensor.name, " has ", kSymbols[symbol], " = ", text(given), ", ", first_[symbol]->name,
              " has ", kSymbols[symbol], " = ", text(ranges_[symbol]));
    }
  }

  const Program& program_;
  Ranges ranges_;
  std::array<const Tensor*, kSymbolCount> first_{};
};

std::string names(const std::vector<Tensor>& tensors) {
  std::string text;
  for (const Tensor& tensor : tensors) text += (text.empty() ? "" : ", ") + tensor.name;
  return text;
}

void check_count(const char* role, int32_t given, const std::vector<Tensor>& expected) {
  if (given != static_cast<int32_t>(expected.size()))
    invalid("it has ", given, " ", role, ", its kernels were compiled for ", expected.size(), ": ", names(expected));
}

template <class Desc>
Ranges check_all(const Program& program, const Desc* in, int32_t inputs, const Desc* out, int32_t outputs) {
  check_counts(program, inputs, outputs);
  Checker<Desc> checker(program);
  for (size_t i = 0; i < program.inputs.size(); ++i) checker.tensor("input", program.inputs[i], in[i]);
  for (size_t i = 0; i < program.outputs.size(); ++i) checker.tensor("output", program.outputs[i], out[i]);
  return checker.ranges();
}

template <class Desc>
Ranges found(const Program& program, const Desc* in) {
  Ranges ranges = program.possible();
  for (size_t s = 0; s < kSymbolCount; ++s)
    if (const auto& place = program.places[s])
      ranges[s] = without(range(in[place->input], place->dimension), place->plus);
  return ranges;
}

}  // namespace

void check_counts(const Program& program, int32_t inputs, int32_t outputs) {
  check_count("inputs", inputs, program.inputs);
  check_count("outputs", outputs, program.outputs);
}

Ranges check(const Program& program, const abi::DynamicTensorDesc* in, int32_t inputs,
             const abi::DynamicTensorDesc* out, int32_t outputs) {
  return check_all(program, in, inputs, out, outputs);
}

Sizes check(const Program& program, const abi::TensorDesc* in, int32_t inputs, const abi::TensorDesc* out,
            int32_t outputs) {
  return most(check_all(program, in, inputs, out, outputs));
}

Ranges ranges_of(const Program& program, const abi::DynamicTensorDesc* in) { return found(program, in); }

Sizes sizes_of(const Program& program, const abi::TensorDesc* in) { return most(found(program, in)); }

}  // namespace moevlm::tensorrt
