#include "modules.h"

#include <map>
#include <mutex>

#include "errors.h"

namespace moevlm::tensorrt {
namespace {

constexpr uint32_t kSharedWithoutOptIn = 48 * 1024;
constexpr int kMaxDynamicSharedMemory = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

struct Loaded {
  std::mutex mutex;
  std::map<std::pair<CudaContext*, const Program*>, std::weak_ptr<const Modules>> modules;
};

// Never destroyed: plugins may outlive static objects.
Loaded& loaded() {
  static Loaded* const shared = new Loaded;
  return *shared;
}

std::string architectures(const Program& program) {
  std::string text;
  for (const Image& image : program.images) text += (text.empty() ? "sm" : ", sm") + std::to_string(image.sm);
  return text;
}

}  // namespace

std::shared_ptr<const Modules> Modules::load(std::shared_ptr<const Program> program) {
  CudaContext* context = driver().context();
  if (!context) throw std::runtime_error("no CUDA context is current");
  Loaded& all = loaded();
  const std::lock_guard<std::mutex> lock(all.mutex);
  for (auto each = all.modules.begin(); each != all.modules.end();)
    each = each->second.expired() ? all.modules.erase(each) : std::next(each);
  std::weak_ptr<const Modules>& entry = all.modules[{context, program.get()}];
  auto modules = entry.lock();
  if (!modules) entry = modules = std::make_shared<const Modules>(context, std::move(program));
  return modules;
}

Modules::Modules(CudaContext* context, std::shared_ptr<const Program> program)
    : context_(context), program_(std::move(program)) {
  const Driver& cuda = driver();
  const uint32_t sm = cuda.sm();
  image_ = program_->image(sm);
  if (!image_)
    throw std::runtime_error(join("it has kernels for ", architectures(*program_), "; this GPU is sm", sm));
  try {
    for (const Kernel& kernel : image_->kernels) {
      const std::string image(kernel.image);  // aligned, unlike the program's bytes
      CudaModule* module = nullptr;
      cuda.check(cuda.ModuleLoadData(&module, image.data()), "cuModuleLoadData", kernel.entry);
      modules_.push_back(module);
      CudaFunction* function = nullptr;
      cuda.check(cuda.ModuleGetFunction(&function, module, kernel.entry.c_str()), "cuModuleGetFunction", kernel.entry);
      functions_.push_back(function);
      if (kernel.shared > kSharedWithoutOptIn)
        cuda.check(cuda.FuncSetAttribute(function, kMaxDynamicSharedMemory, static_cast<int>(kernel.shared)),
                   "cuFuncSetAttribute", kernel.entry);
    }
  } catch (...) {
    unload();
    throw;
  }
}

Modules::~Modules() { unload(); }

// Errors do not count: with its context, or at the end of the process, the driver has unloaded a module already.
void Modules::unload() {
  const Driver& cuda = driver();
  if (cuda.CtxPushCurrent(context_)) return;
  for (CudaModule* module : modules_) cuda.ModuleUnload(module);
  CudaContext* popped = nullptr;
  cuda.CtxPopCurrent(&popped);
}

}  // namespace moevlm::tensorrt
