#include "shapes.h"

#include <algorithm>

#include "errors.h"

namespace moevlm::tensorrt {
namespace {

struct Range {
  int64_t least, most;
  bool operator==(const Range& other) const { return least == other.least && most == other.most; }
};

const char* dtype_name(int32_t dtype) {
  constexpr const char* kNames[] = {"float32", "float16", "int8",  "int32", "bool",          "uint8",
                                    "float8",  "bfloat16", "int64", "int4",  "float4_e2m1", "float8_e8m0"};
  return dtype >= 0 && dtype < 12 ? kNames[dtype] : "unknown";
}

// A dimension's bounds: what it may be within the profile, or what it is.
Range range(const abi::DynamicTensorDesc& tensor, int32_t i) {
  const int64_t dim = tensor.desc.dims.d[i];
  return dim >= 0 ? Range{dim, dim} : Range{tensor.min.d[i], tensor.max.d[i]};
}
Range range(const abi::TensorDesc& tensor, int32_t i) { return {tensor.dims.d[i], tensor.dims.d[i]}; }

const abi::TensorDesc& desc(const abi::DynamicTensorDesc& tensor) { return tensor.desc; }
const abi::TensorDesc& desc(const abi::TensorDesc& tensor) { return tensor; }

int32_t rank(const abi::TensorDesc& tensor) { return std::clamp(tensor.dims.count, 0, abi::kMaxDims); }

template <class Desc>
std::string shape_of(const Desc& tensor) {
  std::string text = "[";
  for (int32_t i = 0; i < rank(desc(tensor)); ++i) {
    const Range dim = range(tensor, i);
    text += (i ? ", " : "") + std::to_string(dim.least);
    if (dim.most != dim.least) text += ".." + std::to_string(dim.most);
  }
  return text + "]";
}

std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (size_t i = 0; i < tensor.shape.size(); ++i)
    text += (i ? ", " : "") + (tensor.shape[i] == kTokens ? "T" : std::to_string(tensor.shape[i]));
  return text + "]";
}

template <class Desc>
class Checker {
 public:
  explicit Checker(const Program& program) : program_(program) {}

  void tensor(const char* role, const Tensor& expected, const Desc& given) {
    const int32_t dtype = static_cast<int32_t>(desc(given).type);
    if (dtype != expected.dtype)
      invalid(role, " ", expected.name, " has dtype ", dtype_name(dtype), ", its kernels were compiled for ",
              dtype_name(expected.dtype));
    if (desc(given).format != abi::TensorFormat::kLinear)
      invalid(role, " ", expected.name, " has format ", static_cast<int32_t>(desc(given).format),
              " (allowed: 0, linear)");
    bool same = static_cast<size_t>(rank(desc(given))) == expected.shape.size();
    for (size_t i = 0; same && i < expected.shape.size(); ++i) {
      const Range dim = range(given, static_cast<int32_t>(i));
      same = expected.shape[i] == kTokens || dim == Range{expected.shape[i], expected.shape[i]};
    }
    if (!same)
      invalid(role, " ", expected.name, " has shape ", shape_of(given), ", its kernels were compiled for ",
              shape_of(expected));
    for (size_t i = 0; i < expected.shape.size(); ++i)
      if (expected.shape[i] == kTokens) tokens(role, expected, range(given, static_cast<int32_t>(i)));
  }

  Range tokens() const { return tokens_; }

 private:
  void tokens(const char* role, const Tensor& tensor, const Range& given) {
    if (!first_) {
      if (given.least < 1 || given.most > program_.max_tokens())
        invalid(role, " ", tensor.name, " has ", text(given), " tokens (allowed: 1 to ", program_.max_tokens(), ")");
      tokens_ = given;
      first_ = &tensor;
    } else if (!(given == tokens_)) {
      invalid(role, " ", tensor.name, " has ", text(given), " tokens, ", first_->name, " has ", text(tokens_));
    }
  }

  static std::string text(const Range& range) {
    return range.least == range.most ? join(range.least) : join(range.least, "..", range.most);
  }

  const Program& program_;
  const Tensor* first_ = nullptr;
  Range tokens_{};
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
Range check_all(const Program& program, const Desc* in, int32_t inputs, const Desc* out, int32_t outputs) {
  check_counts(program, inputs, outputs);
  Checker<Desc> checker(program);
  for (size_t i = 0; i < program.inputs.size(); ++i) checker.tensor("input", program.inputs[i], in[i]);
  for (size_t i = 0; i < program.outputs.size(); ++i) checker.tensor("output", program.outputs[i], out[i]);
  return checker.tokens();
}

}  // namespace

void check_counts(const Program& program, int32_t inputs, int32_t outputs) {
  check_count("inputs", inputs, program.inputs);
  check_count("outputs", outputs, program.outputs);
}

Tokens check(const Program& program, const abi::DynamicTensorDesc* in, int32_t inputs,
             const abi::DynamicTensorDesc* out, int32_t outputs) {
  const Range tokens = check_all(program, in, inputs, out, outputs);
  return {tokens.least, tokens.most};
}

int64_t check(const Program& program, const abi::TensorDesc* in, int32_t inputs, const abi::TensorDesc* out,
              int32_t outputs) {
  return check_all(program, in, inputs, out, outputs).most;
}

TokensAt tokens_at(const Program& program) {
  for (size_t i = 0; i < program.inputs.size(); ++i) {
    const auto& shape = program.inputs[i].shape;
    const auto found = std::find(shape.begin(), shape.end(), kTokens);
    if (found != shape.end()) return {i, static_cast<size_t>(found - shape.begin())};
  }
  invalid("no input of the program has the number of tokens in its shape");
}

}  // namespace moevlm::tensorrt
