// A program's kernels, loaded into a CUDA context.
#pragma once
#include <memory>
#include <vector>

#include "driver.h"
#include "program.h"

namespace moevlm::tensorrt {

class Modules {
 public:
  // Those of `program` for the GPU of the current context, loaded if no other plugin has them. Throws
  // std::runtime_error if the driver does, or if the program has no kernels for this GPU.
  static std::shared_ptr<const Modules> load(std::shared_ptr<const Program> program);

  Modules(CudaContext* context, std::shared_ptr<const Program> program);
  ~Modules();
  Modules(const Modules&) = delete;
  Modules& operator=(const Modules&) = delete;

  CudaContext* context() const { return context_; }
  const Image& image() const { return *image_; }
  CudaFunction* function(uint32_t kernel) const { return functions_[kernel]; }

 private:
  void unload();

  CudaContext* context_;
  std::shared_ptr<const Program> program_;
  const Image* image_ = nullptr;
  std::vector<CudaModule*> modules_;
  std::vector<CudaFunction*> functions_;
};

}  // namespace moevlm::tensorrt
