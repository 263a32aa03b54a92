#include "driver.h"

#include <dlfcn.h>

#include <mutex>
#include <stdexcept>

#include "errors.h"

#ifndef MOEVLM_CUDA_DRIVER
#define MOEVLM_CUDA_DRIVER "libcuda.so.1"
#endif

namespace moevlm::tensorrt {
namespace {

constexpr CudaDevice kFirstDevice = 0;
constexpr int kComputeCapabilityMajor = 75, kComputeCapabilityMinor = 76;

Driver resolve() {
  void* library = dlopen(MOEVLM_CUDA_DRIVER, RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(join("no NVIDIA driver: ", dlerror()));
  Driver driver{};
  const auto find = [&](auto& function, const char* name) {
    void* address = dlsym(library, name);
    if (!address) throw std::runtime_error(join("the NVIDIA driver has no ", name, " (install a newer one)"));
    function = reinterpret_cast<std::decay_t<decltype(function)>>(address);
  };
  find(driver.CtxGetCurrent, "cuCtxGetCurrent");
  find(driver.CtxPushCurrent, "cuCtxPushCurrent_v2");
  find(driver.CtxPopCurrent, "cuCtxPopCurrent_v2");
  find(driver.CtxGetDevice, "cuCtxGetDevice");
  find(driver.DevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
  find(driver.DevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2");
  find(driver.DeviceGetAttribute, "cuDeviceGetAttribute");
  find(driver.ModuleLoadData, "cuModuleLoadData");
  find(driver.ModuleGetFunction, "cuModuleGetFunction");
  find(driver.ModuleUnload, "cuModuleUnload");
  find(driver.FuncSetAttribute, "cuFuncSetAttribute");
  find(driver.LaunchKernel, "cuLaunchKernel");
  find(driver.LaunchKernelEx, "cuLaunchKernelEx");
  find(driver.MemsetD32Async, "cuMemsetD32Async");
  find(driver.TensorMapEncodeTiled, "cuTensorMapEncodeTiled");
  find(driver.GetErrorName, "cuGetErrorName");
  find(driver.GetErrorString, "cuGetErrorString");
  return driver;
}

}  // namespace

const Driver& driver() {
  static const Driver shared = resolve();  // tried again after it threw
  return shared;
}

void Driver::check(CudaResult result, const char* call, const std::string& what) const {
  if (!result) return;
  const char* name = nullptr;
  const char* text = nullptr;
  GetErrorName(result, &name);
  GetErrorString(result, &text);
  throw std::runtime_error(join(call, " of ", what, ": ", name ? name : "unknown error", " (", result, ")",
                                text ? ", " : "", text ? text : ""));
}

CudaContext* Driver::context() const {
  CudaContext* current = nullptr;
  // An error here, such as a driver that was not initialised yet, says the same: no context.
  return CtxGetCurrent(&current) ? nullptr : current;
}

uint32_t Driver::sm() const {
  CudaDevice device = 0;
  int major = 0, minor = 0;
  check(CtxGetDevice(&device), "cuCtxGetDevice", "the current context");
  check(DeviceGetAttribute(&major, kComputeCapabilityMajor, device), "cuDeviceGetAttribute", "the compute capability");
  check(DeviceGetAttribute(&minor, kComputeCapabilityMinor, device), "cuDeviceGetAttribute", "the compute capability");
  return static_cast<uint32_t>(10 * major + minor);
}

PrimaryContext::PrimaryContext() {
  const Driver& cuda = driver();
  cuda.check(cuda.DevicePrimaryCtxRetain(&context_, kFirstDevice), "cuDevicePrimaryCtxRetain", "the first device");
}

PrimaryContext::~PrimaryContext() { driver().DevicePrimaryCtxRelease(kFirstDevice); }

Current::Current(CudaContext* context) {
  const Driver& cuda = driver();
  cuda.check(cuda.CtxPushCurrent(context), "cuCtxPushCurrent", "a CUDA context");
}

Current::~Current() {
  CudaContext* popped = nullptr;
  driver().CtxPopCurrent(&popped);
}

}  // namespace moevlm::tensorrt
