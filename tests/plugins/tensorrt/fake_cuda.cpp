// A CUDA driver that records: it holds callers to the rules of the real one, runs nothing, and fails when told to.
//
// A kernel's image is text, "fake <entry> <bytes of each parameter ...>", as fake_cuda.py writes it.
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

namespace {

enum Result {
  kSuccess = 0,
  kInvalidValue = 1,
  kInvalidContext = 201,
  kInvalidHandle = 400,
  kNotFound = 500,
  kNotSupported = 801
};
constexpr unsigned kProgrammaticStreamSerialization = 6;
constexpr int kDevice = 3, kFirstDevice = 0;  // of contexts that a test makes; of the primary one
enum Attribute { kMajor = 75, kMinor = 76, kMaxDynamicShared = 8 };
constexpr unsigned kSharedWithoutOptIn = 48 * 1024, kSharedWithOptIn = 99 * 1024;

// CUlaunchAttribute and CUlaunchConfig.
struct LaunchAttribute {
  unsigned id, padding;
  int value[16];
};
struct LaunchConfig {
  unsigned grid[3], block[3], shared;
  void* stream;
  const LaunchAttribute* attributes;
  unsigned attribute_count;
};

// What a CUtensorMap is here: what it was made of, in its 128 bytes. Dimensions from the one of neighbours on.
struct TensorMap {
  uint64_t magic, address, sizes[5], strides[4];
  uint16_t block[5];
  uint8_t element_type, rank, swizzle, unused[27];
};
static_assert(sizeof(TensorMap) == 128);
constexpr uint64_t kMapMagic = 0x70614D726F736E65;

struct Context {
  int id;
  bool alive = true;
};

struct Function {
  int module;
  Context* context;
  std::string entry;
  std::vector<int> parameters;
  unsigned shared = kSharedWithoutOptIn;
};

std::mutex mutex;
std::vector<std::unique_ptr<Context>> contexts;
std::map<int, std::unique_ptr<Function>> modules;  // by the module's number, which is its handle
std::set<const Function*> functions;
std::map<std::string, std::pair<int, int>> failures;  // call: how many more succeed, then the error
std::vector<std::string> events;
int sm = 86, next_module = 1;

Context* primary = nullptr;  // alive while somebody retains it
int retained = 0;

thread_local std::vector<Context*> stack;
thread_local int thread_name = 0;

Context* current() { return stack.empty() ? nullptr : stack.back(); }

// The error that a call was told to return, 0 for none. With the mutex held.
int told(const char* call) {
  const auto found = failures.find(call);
  if (found == failures.end()) return kSuccess;
  return found->second.first-- > 0 ? kSuccess : found->second.second;
}

template <class... Parts>
void record(const char* call, const Parts&... parts) {
  std::ostringstream event;
  event << "{\"call\": \"" << call << "\", \"thread\": " << thread_name;
  event << ", \"context\": " << (current() ? current()->id : 0);
  static_cast<void>((event << ... << parts));
  events.push_back(event.str() + "}");
}

// The function of a launch or an attribute; null if its module is unloaded or of another context.
Function* usable(void* handle) {
  auto* function = static_cast<Function*>(handle);
  return functions.count(function) && function->context == current() && current()->alive ? function : nullptr;
}

Context* new_context() {
  contexts.push_back(std::make_unique<Context>(Context{static_cast<int>(contexts.size()) + 1}));
  return contexts.back().get();
}

void destroy(Context* context) {
  context->alive = false;
  for (auto it = modules.begin(); it != modules.end();) {
    if (it->second->context == context) functions.erase(it->second.get());
    it = it->second->context == context ? modules.erase(it) : std::next(it);
  }
}

template <class T>
void write(std::ostream& out, const char* name, const T* values, size_t count) {
  out << ", \"" << name << "\": [";
  for (size_t i = 0; i < count; ++i) out << (i ? ", " : "") << values[i];
  out << "]";
}

void write(std::ostream& out, const TensorMap& map) {
  out << "{\"address\": " << map.address << ", \"element_type\": " << int{map.element_type};
  write(out, "sizes", map.sizes, map.rank);
  write(out, "strides", map.strides, map.rank - 1u);
  write(out, "block", map.block, map.rank);
  out << ", \"swizzle\": " << int{map.swizzle} << "}";
}

// A launch, however it was asked for.
int launch(const char* call, void* handle, const unsigned (&grid)[3], const unsigned (&block)[3], unsigned shared,
           void* stream, void** parameters, void** extra) {
  if (const int error = told(call)) return error;
  Function* function = usable(handle);
  if (!function) return kInvalidHandle;
  if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 0x7FFFFFFF || grid[1] > 65535 || grid[2] > 65535 || !block[0] ||
      block[0] * block[1] * block[2] > 1024 || shared > function->shared || extra)
    return kInvalidValue;
  std::ostringstream arguments;
  for (size_t i = 0; i < function->parameters.size(); ++i) {
    arguments << (i ? ", " : "");
    if (function->parameters[i] == sizeof(TensorMap)) {
      TensorMap map;
      std::memcpy(&map, parameters[i], sizeof map);
      if (map.magic != kMapMagic) return kInvalidValue;
      write(arguments, map);
      continue;
    }
    uint64_t value = 0;
    std::memcpy(&value, parameters[i], static_cast<size_t>(function->parameters[i]));
    arguments << value;
  }
  record(call, ", \"entry\": \"", function->entry, "\", \"module\": ", function->module, ", \"grid\": [", grid[0],
         ", ", grid[1], ", ", grid[2], "], \"block\": [", block[0], ", ", block[1], ", ", block[2],
         "], \"shared\": ", shared, ", \"stream\": ", reinterpret_cast<uintptr_t>(stream), ", \"arguments\": [",
         arguments.str(), "]");
  return kSuccess;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void* fake_context() {
  const std::lock_guard<std::mutex> lock(mutex);
  return new_context();
}

// Of this thread; null for none.
EXPORT void fake_set_current(void* context) {
  stack.clear();
  if (context) stack.push_back(static_cast<Context*>(context));
}

// With the modules that are loaded in it.
EXPORT void fake_destroy(void* context) {
  const std::lock_guard<std::mutex> lock(mutex);
  destroy(static_cast<Context*>(context));
}

EXPORT void fake_set_sm(int value) { sm = value; }
EXPORT void fake_name_thread(int name) { thread_name = name; }
EXPORT int fake_loaded() {
  const std::lock_guard<std::mutex> lock(mutex);
  return static_cast<int>(modules.size());
}

// After `successes` more calls, the call returns `error`; a negative number of successes takes the failure back.
EXPORT void fake_fail(const char* call, int successes, int error) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (successes < 0) failures.erase(call);
  else failures[call] = {successes, error};
}

// A JSON list of the calls since the last time.
EXPORT const char* fake_take_events() {
  static std::string text;
  const std::lock_guard<std::mutex> lock(mutex);
  text = "[";
  for (const std::string& event : events) text += (text.size() > 1 ? ",\n" : "") + event;
  text += "]";
  events.clear();
  return text.c_str();
}

EXPORT int cuCtxGetCurrent(void** context) {
  const std::lock_guard<std::mutex> lock(mutex);
  *context = current();
  return told("cuCtxGetCurrent");
}

EXPORT int cuCtxPushCurrent_v2(void* context) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!static_cast<Context*>(context)->alive) return kInvalidContext;
  stack.push_back(static_cast<Context*>(context));
  return kSuccess;
}

EXPORT int cuCtxPopCurrent_v2(void** context) {
  if (stack.empty()) return kInvalidContext;
  *context = current();
  stack.pop_back();
  return kSuccess;
}

EXPORT int cuCtxGetDevice(int* device) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!current() || !current()->alive) return kInvalidContext;
  *device = current() == primary ? kFirstDevice : kDevice;
  return told("cuCtxGetDevice");
}

EXPORT int cuDevicePrimaryCtxRetain(void** context, int device) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (const int error = told("cuDevicePrimaryCtxRetain")) return error;
  if (device != kFirstDevice) return kInvalidValue;
  if (!retained++) primary = new_context();
  *context = primary;
  record("cuDevicePrimaryCtxRetain");
  return kSuccess;
}

EXPORT int cuDevicePrimaryCtxRelease_v2(int device) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (device != kFirstDevice || !retained) return kInvalidContext;
  record("cuDevicePrimaryCtxRelease");
  if (!--retained) destroy(primary);
  return kSuccess;
}

EXPORT int cuDeviceGetAttribute(int* value, int attribute, int device) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (device != kDevice && device != kFirstDevice) return kInvalidValue;
  if (attribute != kMajor && attribute != kMinor) return kInvalidValue;
  *value = attribute == kMajor ? sm / 10 : sm % 10;
  return told("cuDeviceGetAttribute");
}

EXPORT int cuModuleLoadData(void** module, const void* image) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (const int error = told("cuModuleLoadData")) return error;
  if (!current() || !current()->alive) return kInvalidContext;
  if (reinterpret_cast<uintptr_t>(image) % 8) return kInvalidValue;
  std::istringstream text(static_cast<const char*>(image));
  auto function = std::make_unique<Function>();
  std::string magic;
  text >> magic >> function->entry;
  for (int size; text >> size;) {
    if (size != 4 && size != 8 && size != static_cast<int>(sizeof(TensorMap))) return kInvalidValue;
    function->parameters.push_back(size);
  }
  if (magic != "fake") return kInvalidValue;
  function->context = current();
  function->module = next_module++;
  *module = reinterpret_cast<void*>(static_cast<intptr_t>(function->module));
  record("cuModuleLoadData", ", \"module\": ", function->module, ", \"entry\": \"", function->entry, "\"");
  modules[function->module] = std::move(function);
  return kSuccess;
}

EXPORT int cuModuleGetFunction(void** function, void* module, const char* name) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (const int error = told("cuModuleGetFunction")) return error;
  const auto found = modules.find(static_cast<int>(reinterpret_cast<intptr_t>(module)));
  if (found == modules.end()) return kInvalidHandle;
  if (found->second->entry != name) return kNotFound;
  *function = found->second.get();
  functions.insert(found->second.get());
  return kSuccess;
}

EXPORT int cuModuleUnload(void* module) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = modules.find(static_cast<int>(reinterpret_cast<intptr_t>(module)));
  if (found == modules.end()) return kInvalidHandle;
  if (found->second->context != current()) return kInvalidContext;
  record("cuModuleUnload", ", \"module\": ", found->first);
  functions.erase(found->second.get());
  modules.erase(found);
  return kSuccess;
}

EXPORT int cuFuncSetAttribute(void* handle, int attribute, int value) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (const int error = told("cuFuncSetAttribute")) return error;
  Function* function = usable(handle);
  if (!function) return kInvalidHandle;
  if (attribute != kMaxDynamicShared || value < 0 || value > static_cast<int>(kSharedWithOptIn)) return kInvalidValue;
  function->shared = static_cast<unsigned>(value);
  record("cuFuncSetAttribute", ", \"entry\": \"", function->entry, "\", \"shared\": ", value);
  return kSuccess;
}

EXPORT int cuLaunchKernel(void* handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared, void* stream, void** parameters, void** extra) {
  const std::lock_guard<std::mutex> lock(mutex);
  return launch("cuLaunchKernel", handle, {gx, gy, gz}, {bx, by, bz}, shared, stream, parameters, extra);
}

// Of all attributes it takes the one that lets a launch begin while the one before it ends, and that alone.
EXPORT int cuLaunchKernelEx(const LaunchConfig* config, void* handle, void** parameters, void** extra) {
  const std::lock_guard<std::mutex> lock(mutex);
  const LaunchAttribute* attribute = config->attributes;
  if (config->attribute_count != 1 || attribute->id != kProgrammaticStreamSerialization || attribute->value[0] != 1)
    return kInvalidValue;
  if (sm < 90) return kNotSupported;
  const auto& [grid, block, shared, stream, attributes, count] = *config;
  return launch("cuLaunchKernelEx", handle, grid, block, shared, stream, parameters, extra);
}

// The rules of cuda.h for arrays that are not interleaved, of the element types that programs have.
EXPORT int cuTensorMapEncodeTiled(void* made, int element_type, unsigned rank, void* address, const uint64_t* sizes,
                                  const uint64_t* strides, const uint32_t* block, const uint32_t* steps,
                                  int interleave, int swizzle, int promotion, int fill) {
  static const std::map<int, uint64_t> widths = {{0, 1}, {3, 4}, {6, 2}, {7, 4}, {9, 2}};
  const std::lock_guard<std::mutex> lock(mutex);
  if (const int error = told("cuTensorMapEncodeTiled")) return error;
  const auto aligned = [](const void* pointer, uintptr_t to) { return reinterpret_cast<uintptr_t>(pointer) % to == 0; };
  if (!aligned(made, 64) || !aligned(address, 16) || !address || !widths.count(element_type) || rank < 1 || rank > 5 ||
      interleave || swizzle < 0 || swizzle > 3 || promotion != 2 || fill)
    return kInvalidValue;
  TensorMap map{};
  uint64_t stride = widths.at(element_type);
  const uint64_t width = block[0] * stride;
  if (width % 16 || (swizzle && width > (uint64_t{16} << swizzle))) return kInvalidValue;
  for (unsigned i = 0; i < rank; ++i) {
    if (!sizes[i] || sizes[i] > uint64_t{1} << 32 || !block[i] || block[i] > 256 || steps[i] != 1) return kInvalidValue;
    map.sizes[i] = sizes[i];
    map.block[i] = static_cast<uint16_t>(block[i]);
    if (i + 1 == rank) break;
    stride *= sizes[i];
    if (strides[i] % 16 || strides[i] >= uint64_t{1} << 40 || strides[i] < stride) return kInvalidValue;
    map.strides[i] = stride = strides[i];
  }
  map.magic = kMapMagic;
  map.address = reinterpret_cast<uintptr_t>(address);
  map.element_type = static_cast<uint8_t>(element_type);
  map.rank = static_cast<uint8_t>(rank);
  map.swizzle = static_cast<uint8_t>(swizzle);
  std::memcpy(made, &map, sizeof map);
  record("cuTensorMapEncodeTiled", ", \"address\": ", map.address);
  return kSuccess;
}

EXPORT int cuMemsetD32Async(uint64_t address, unsigned value, size_t words, void* stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (const int error = told("cuMemsetD32Async")) return error;
  if (!current() || !current()->alive) return kInvalidContext;
  if (address % 4 || !words) return kInvalidValue;
  record("cuMemsetD32Async", ", \"address\": ", address, ", \"value\": ", value, ", \"words\": ", words,
         ", \"stream\": ", reinterpret_cast<uintptr_t>(stream));
  return kSuccess;
}

EXPORT int cuGetErrorName(int error, const char** name) {
  static const std::map<int, const char*> names = {
      {1, "CUDA_ERROR_INVALID_VALUE"},    {2, "CUDA_ERROR_OUT_OF_MEMORY"},  {201, "CUDA_ERROR_INVALID_CONTEXT"},
      {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"}, {400, "CUDA_ERROR_INVALID_HANDLE"}, {500, "CUDA_ERROR_NOT_FOUND"},
      {719, "CUDA_ERROR_LAUNCH_FAILED"}};
  const auto found = names.find(error);
  *name = found == names.end() ? nullptr : found->second;
  return found == names.end() ? kInvalidValue : kSuccess;
}

EXPORT int cuGetErrorString(int error, const char** text) {
  *text = error == 719 ? "unspecified launch failure" : nullptr;
  return *text ? kSuccess : kInvalidValue;
}
