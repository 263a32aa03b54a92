// The CUDA driver, found at run time: the library builds and loads where there is none.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace moevlm::tensorrt {

struct CudaContext;
struct CudaModule;
struct CudaFunction;
using CudaResult = int;
using CudaDevice = int;
using CudaAddress = uint64_t;

// CUlaunchAttribute and CUlaunchConfig of cuda.h.
struct alignas(8) LaunchAttribute {
  unsigned id;
  char padding[4];
  int is_set;
  char rest[60];
};
static_assert(sizeof(LaunchAttribute) == 72 && offsetof(LaunchAttribute, is_set) == 8);
constexpr unsigned kProgrammaticStreamSerialization = 6;

struct LaunchConfig {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared;
  void* stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};
static_assert(sizeof(LaunchConfig) == 56 && offsetof(LaunchConfig, stream) == 32);

// CUtensorMap.
constexpr size_t kTensorMapSize = 128, kTensorMapAlignment = 64;

// Functions of libcuda.so.1 by their names there, less the "cu".
struct Driver {
  CudaResult (*CtxGetCurrent)(CudaContext**);
  CudaResult (*CtxPushCurrent)(CudaContext*);
  CudaResult (*CtxPopCurrent)(CudaContext**);
  CudaResult (*CtxGetDevice)(CudaDevice*);
  CudaResult (*DevicePrimaryCtxRetain)(CudaContext**, CudaDevice);
  CudaResult (*DevicePrimaryCtxRelease)(CudaDevice);
  CudaResult (*DeviceGetAttribute)(int*, int attribute, CudaDevice);
  CudaResult (*ModuleLoadData)(CudaModule**, const void* image);
  CudaResult (*ModuleGetFunction)(CudaFunction**, CudaModule*, const char* name);
  CudaResult (*ModuleUnload)(CudaModule*);
  CudaResult (*FuncSetAttribute)(CudaFunction*, int attribute, int value);
  CudaResult (*LaunchKernel)(CudaFunction*, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                             unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** parameters,
                             void** extra);
  CudaResult (*LaunchKernelEx)(const LaunchConfig*, CudaFunction*, void** parameters, void** extra);
  CudaResult (*MemsetD32Async)(CudaAddress, unsigned value, size_t words, void* stream);
  CudaResult (*TensorMapEncodeTiled)(void* map, int element_type, unsigned rank, void* address, const uint64_t* sizes,
                                     const uint64_t* strides, const uint32_t* block, const uint32_t* steps,
                                     int interleave, int swizzle, int promotion, int fill);
  CudaResult (*GetErrorName)(CudaResult, const char**);
  CudaResult (*GetErrorString)(CudaResult, const char**);

  // Throws std::runtime_error naming the call, what it was for, and the error, unless result is success.
  void check(CudaResult result, const char* call, const std::string& what) const;

  // The context of this thread; null if it has none.
  CudaContext* context() const;
  // Of the current context's device, 86 for compute capability 8.6.
  uint32_t sm() const;
};

// The first device's primary context, which CUDA's runtime works in: kept alive until the last of these goes.
class PrimaryContext {
 public:
  PrimaryContext();  // throws std::runtime_error if the driver does
  ~PrimaryContext();
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;

  CudaContext* get() const { return context_; }

 private:
  CudaContext* context_ = nullptr;
};

// Makes a context current to this thread for as long as it lives.
class Current {
 public:
  explicit Current(CudaContext* context);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
};

// Throws std::runtime_error where no driver is installed, or one that lacks a function.
const Driver& driver();

}  // namespace moevlm::tensorrt
