// Plays TensorRT for the plugin library, as plain C functions: what bench/plugin_harness.py calls.
//
// It reaches plugins as TensorRT does, from getCreators through the vtables of abi.h.
#include <dlfcn.h>

#include <cstring>
#include <string>
#include <vector>

#include "abi.h"

using namespace moevlm::abi;

namespace moevlm::abi {
struct DimensionExpr {
  int64_t value;
};
}  // namespace moevlm::abi

namespace {

thread_local std::string messages;

void add(Severity severity, const char* message) noexcept {
  messages += severity == Severity::kError ? "" : "(not an error) ";
  messages.append(message).append("\n");
}

struct OldLogger final : Logger10 {
  void log(Severity severity, const char* message) noexcept override { add(severity, message); }
};
struct OldFinder final : LoggerFinder10 {
  Logger10* findLogger() override {
    static OldLogger logger;
    return &logger;
  }
};

struct NewLogger final : Logger11 {
  void log(Severity severity, const char* message) noexcept override { add(severity, message); }
};
struct NewFinder final : LoggerFinder11 {
  Logger11* findLogger() override {
    static NewLogger logger;
    return &logger;
  }
};

struct Expressions final : ExprBuilderImpl {
  std::vector<DimensionExpr*> made;
  const DimensionExpr* constant(int64_t value) override {
    made.push_back(new DimensionExpr{value});
    return made.back();
  }
  const DimensionExpr* operation(DimensionOperation operation, const DimensionExpr& first,
                                 const DimensionExpr& second) override {
    return operation == DimensionOperation::kSum ? constant(first.value + second.value) : nullptr;
  }
  ~Expressions() override {
    for (DimensionExpr* each : made) delete each;
  }
};

template <class Interface>
Interface& capability(Plugin* plugin, Capability type) {
  return *static_cast<Interface*>(plugin->getCapabilityInterface(type));
}
PluginCore& core(Plugin* plugin) { return capability<PluginCore>(plugin, Capability::kCore); }
PluginBuild& build(Plugin* plugin) { return capability<PluginBuild>(plugin, Capability::kBuild); }
PluginRuntime& runtime(Plugin* plugin) { return capability<PluginRuntime>(plugin, Capability::kRuntime); }

Creator* creator(void* library, const char* op) {
  const auto get = reinterpret_cast<Creator* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
  if (!get) return nullptr;
  int32_t count = 0;
  Creator* const* creators = get(count);
  for (int32_t i = 0; i < count; ++i)
    if (!std::strcmp(creators[i]->getPluginName(), op)) return creators[i];
  return nullptr;
}

}  // namespace

extern "C" {

// Names of the plugins, each on a line.
const char* library_ops(void* library) {
  thread_local std::string names;
  names.clear();
  int32_t count = 0;
  Creator* const* creators = reinterpret_cast<Creator* const* (*)(int32_t&)>(dlsym(library, "getCreators"))(count);
  for (int32_t i = 0; i < count; ++i) names.append(creators[i]->getPluginName()).append("\n");
  return names.c_str();
}

void* library_open(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) add(Severity::kError, dlerror());
  return library;
}

// version: the major one of the TensorRT whose loggers it is given; 0 takes the logger away.
void library_set_logger(void* library, int version) {
  static OldFinder old_finder;
  static NewFinder new_finder;
  const auto set = reinterpret_cast<void (*)(void*)>(dlsym(library, "setLoggerFinder"));
  set(version == 0 ? nullptr : version == 10 ? static_cast<void*>(&old_finder) : static_cast<void*>(&new_finder));
}

const char* library_error(void* library) {
  return reinterpret_cast<const char* (*)()>(dlsym(library, "moevlm_plugin_error"))();
}

// What was logged on this thread since the last call, a line each.
const char* take_messages() {
  thread_local std::string taken;
  taken.swap(messages);
  messages.clear();
  return taken.c_str();
}

Plugin* plugin_create(void* library, const char* op, const Fields* fields, int32_t phase) {
  Creator* found = creator(library, op);
  return found ? found->createPlugin(op, fields, static_cast<Phase>(phase)) : nullptr;
}

// Those of the creator: names of fields, each on a line.
const char* field_names(void* library, const char* op) {
  thread_local std::string names;
  names.clear();
  const Fields* fields = creator(library, op)->getFieldNames();
  for (int32_t i = 0; i < fields->count; ++i) names.append(fields->fields[i].name).append("\n");
  return names.c_str();
}

void plugin_destroy(Plugin* plugin) { delete plugin; }
Plugin* plugin_clone(Plugin* plugin) { return plugin->clone(); }
Plugin* plugin_attach(Plugin* plugin) { return runtime(plugin).attachToContext(nullptr); }

// Name, version, namespace and the kinds of the four interfaces, each on a line.
const char* plugin_identity(Plugin* plugin) {
  thread_local std::string text;
  text.clear();
  PluginCore& own = core(plugin);
  for (const char* part : {own.getPluginName(), own.getPluginVersion(), own.getPluginNamespace(),
                           plugin->getInterfaceInfo().kind, own.getInterfaceInfo().kind,
                           build(plugin).getInterfaceInfo().kind, runtime(plugin).getInterfaceInfo().kind})
    text.append(part).append("\n");
  return text.c_str();
}

int32_t plugin_outputs(Plugin* plugin) { return build(plugin).getNbOutputs(); }

int32_t plugin_output_types(Plugin* plugin, int32_t* out, int32_t outputs, const int32_t* in, int32_t inputs) {
  return build(plugin).getOutputDataTypes(reinterpret_cast<DataType*>(out), outputs,
                                          reinterpret_cast<const DataType*>(in), inputs);
}

int32_t plugin_output_shapes(Plugin* plugin, const Dims* in, int32_t inputs, Dims* out, int32_t outputs) {
  struct Builder final : ExprBuilder {
  } builder;
  Expressions expressions;
  builder.impl = &expressions;
  std::vector<DimsExprs> given(inputs), made(outputs);
  for (int32_t i = 0; i < inputs; ++i) {
    given[i].count = in[i].count;
    for (int32_t d = 0; d < in[i].count; ++d) given[i].d[d] = expressions.constant(in[i].d[d]);
  }
  const int32_t status =
      build(plugin).getOutputShapes(given.data(), inputs, nullptr, 0, made.data(), outputs, builder);
  for (int32_t o = 0; !status && o < outputs; ++o) {
    out[o].count = made[o].count;
    for (int32_t d = 0; d < made[o].count; ++d) out[o].d[d] = made[o].d[d]->value;
  }
  return status;
}

int32_t plugin_supports(Plugin* plugin, int32_t position, const DynamicTensorDesc* tensors, int32_t inputs,
                        int32_t outputs) {
  return build(plugin).supportsFormatCombination(position, tensors, inputs, outputs);
}

int32_t plugin_configure(Plugin* plugin, const DynamicTensorDesc* in, int32_t inputs, const DynamicTensorDesc* out,
                         int32_t outputs) {
  return build(plugin).configurePlugin(in, inputs, out, outputs);
}

size_t plugin_workspace(Plugin* plugin, const DynamicTensorDesc* in, int32_t inputs, const DynamicTensorDesc* out,
                        int32_t outputs) {
  return build(plugin).getWorkspaceSize(in, inputs, out, outputs);
}

const Fields* plugin_fields(Plugin* plugin) { return runtime(plugin).getFieldsToSerialize(); }

int32_t plugin_shape_change(Plugin* plugin, const TensorDesc* in, int32_t inputs, const TensorDesc* out,
                            int32_t outputs) {
  return runtime(plugin).onShapeChange(in, inputs, out, outputs);
}

int32_t plugin_enqueue(Plugin* plugin, const TensorDesc* in, const TensorDesc* out, const void* const* inputs,
                       void* const* outputs, void* workspace, void* stream) {
  return runtime(plugin).enqueue(in, out, inputs, outputs, workspace, static_cast<CudaStream*>(stream));
}

}  // extern "C"
