// The library's interface: the creators of its plugins, by which TensorRT finds them in a network or an engine.
#include <cstring>
#include <limits>

#include "errors.h"
#include "plugin.h"

namespace moevlm::tensorrt {
namespace {

std::string_view program_field(const abi::Fields& fields) {
  for (int32_t i = 0; i < fields.count; ++i) {
    const abi::Field& field = fields.fields[i];
    if (!field.name || std::strcmp(field.name, MoePlugin::kField)) continue;
    if (field.type != abi::FieldType::kChar && field.type != abi::FieldType::kInt8 &&
        field.type != abi::FieldType::kUnknown)
      invalid("attribute program has TensorRT's field type ", static_cast<int32_t>(field.type),
              " (allowed: 3, 6 or 8, bytes)");
    if (!field.data || field.length < 1) break;
    return {static_cast<const char*>(field.data), static_cast<size_t>(field.length)};
  }
  invalid("attribute program is missing (a GPU program, as bytes)");
}

class MoeCreator final : public abi::Creator {
 public:
  explicit MoeCreator(const char* op) : op_(op) {}

  abi::Plugin* createPlugin(const char*, const abi::Fields* fields, abi::Phase phase) noexcept override {
    abi::Plugin* plugin = nullptr;
    guarded(op_, [&] {
      auto program = Program::read(program_field(*fields));
      if (program->op != op_) invalid("attribute program is for ", program->op);
      plugin = new MoePlugin(std::move(program), phase);
    });
    return plugin;
  }
  const abi::Fields* getFieldNames() noexcept override { return &fields_; }
  const char* getPluginName() const noexcept override { return op_; }
  const char* getPluginVersion() const noexcept override { return MoePlugin::kVersion; }
  const char* getPluginNamespace() const noexcept override { return MoePlugin::kNamespace; }

 private:
  const char* op_;
  abi::Field field_{MoePlugin::kField, nullptr, abi::FieldType::kChar, 1};
  abi::Fields fields_{1, &field_};
};

}  // namespace
}  // namespace moevlm::tensorrt

extern "C" __attribute__((visibility("default"))) moevlm::abi::Creator* const* getCreators(int32_t& count) {
  static moevlm::tensorrt::MoeCreator router("MoERouter"), experts("MoEExperts");
  static moevlm::abi::Creator* const creators[] = {&router, &experts};
  count = 2;
  return creators;
}
