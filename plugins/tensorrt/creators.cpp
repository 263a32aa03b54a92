// The library's interface: the creators of its plugins, by which TensorRT finds them in a network or an engine.
#include <cstring>
#include <iterator>
#include <limits>
#include <vector>

#include "errors.h"
#include "plugin.h"

namespace moevlm::tensorrt {
namespace {

// The same as PLUGINS of runtime/core/names.py.
constexpr const char* kOps[] = {"MoERouter",      "MoEExperts", "PagedAttention", "SegmentAttention",
                                "CrossAttention", "GatedDelta", "Candidates"};

std::string_view program_field(const abi::Fields& fields) {
  for (int32_t i = 0; i < fields.count; ++i) {
    const abi::Field& field = fields.fields[i];
    if (!field.name || std::strcmp(field.name, ProgramPlugin::kField)) continue;
    if (field.type != abi::FieldType::kChar && field.type != abi::FieldType::kInt8 &&
        field.type != abi::FieldType::kUnknown)
      invalid("attribute program has TensorRT's field type ", static_cast<int32_t>(field.type),
              " (allowed: 3, 6 or 8, bytes)");
    if (!field.data || field.length < 1) break;
    return {static_cast<const char*>(field.data), static_cast<size_t>(field.length)};
  }
  invalid("attribute program is missing (a GPU program, as bytes)");
}

class ProgramCreator final : public abi::Creator {
 public:
  explicit ProgramCreator(const char* op) : op_(op) {}

  abi::Plugin* createPlugin(const char*, const abi::Fields* fields, abi::Phase phase) noexcept override {
    abi::Plugin* plugin = nullptr;
    guarded(op_, [&] {
      auto program = Program::read(program_field(*fields));
      if (program->op != op_) invalid("attribute program is for ", program->op);
      plugin = new ProgramPlugin(std::move(program), phase);
    });
    return plugin;
  }
  const abi::Fields* getFieldNames() noexcept override {
    static const abi::Field field{ProgramPlugin::kField, nullptr, abi::FieldType::kChar, 1};
    static const abi::Fields fields{1, &field};
    return &fields;
  }
  const char* getPluginName() const noexcept override { return op_; }
  const char* getPluginVersion() const noexcept override { return ProgramPlugin::kVersion; }
  const char* getPluginNamespace() const noexcept override { return ProgramPlugin::kNamespace; }

 private:
  const char* op_;
};

struct Creators {
  std::vector<ProgramCreator> creators{std::begin(kOps), std::end(kOps)};
  std::vector<abi::Creator*> pointers;

  Creators() {
    for (ProgramCreator& creator : creators) pointers.push_back(&creator);
  }
};

}  // namespace
}  // namespace moevlm::tensorrt

extern "C" __attribute__((visibility("default"))) moevlm::abi::Creator* const* getCreators(int32_t& count) {
  static moevlm::tensorrt::Creators all;
  count = static_cast<int32_t>(all.pointers.size());
  return all.pointers.data();
}
