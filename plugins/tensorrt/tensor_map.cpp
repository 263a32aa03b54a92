#include "tensor_map.h"

namespace moevlm::tensorrt {
namespace {

// CUtensorMapDataType, by TensorRT's number of a dtype; what is one byte wide is moved as bytes.
int element_type(int32_t dtype) {
  switch (dtype) {
    case 0: return 7;
    case 1: return 6;
    case 3: return 3;
    case 7: return 9;
    default: return 0;
  }
}

int swizzle_mode(uint32_t bytes) { return bytes == 32 ? 1 : bytes == 64 ? 2 : bytes == 128 ? 3 : 0; }

constexpr int kNotInterleaved = 0, kPromotedTo128Bytes = 2, kZerosBeyond = 0;

}  // namespace

// The driver counts dimensions from the one whose elements are neighbours.
CudaResult EncodedMap::encode(uint64_t address) {
  if (address == address_) return 0;
  const size_t rank = map_.block.size();
  uint64_t sizes[kMaxMapRank], strides[kMaxMapRank], stride = static_cast<uint64_t>(dtype_bytes(map_.dtype));
  uint32_t block[kMaxMapRank], steps[kMaxMapRank];
  for (size_t i = 0; i < rank; ++i) {
    sizes[i] = static_cast<uint64_t>(i + 1 < rank ? map_.inner[rank - 2 - i] : rows_);
    strides[i] = stride *= sizes[i];
    block[i] = map_.block[rank - 1 - i];
    steps[i] = 1;
  }
  const CudaResult result = driver().TensorMapEncodeTiled(
      bytes_, element_type(map_.dtype), static_cast<unsigned>(rank), reinterpret_cast<void*>(address), sizes, strides,
      block, steps, kNotInterleaved, swizzle_mode(map_.swizzle), kPromotedTo128Bytes, kZerosBeyond);
  address_ = result ? 0 : address;
  return result;
}

}  // namespace moevlm::tensorrt
