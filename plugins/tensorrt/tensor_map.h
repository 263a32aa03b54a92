// Tensors as the tensor memory accelerator of a GPU takes them: by value, 128 bytes that the driver encodes.
#pragma once
#include <cstddef>
#include <cstdint>

#include "driver.h"
#include "program.h"

namespace moevlm::tensorrt {

// A kernel's parameter: one map with so many rows.
class EncodedMap {
 public:
  EncodedMap(const TensorMap& map, int64_t rows) : map_(map), rows_(rows) {}

  // For this address, unless it is for that already. What the driver says.
  CudaResult encode(uint64_t address);

  void* parameter() { return bytes_; }

 private:
  alignas(kTensorMapAlignment) char bytes_[kTensorMapSize];
  const TensorMap& map_;
  int64_t rows_;
  uint64_t address_ = 0;
};

}  // namespace moevlm::tensorrt
