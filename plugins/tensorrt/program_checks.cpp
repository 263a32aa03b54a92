#include "program_checks.h"

#include <algorithm>
#include <limits>

#include "errors.h"

namespace moevlm::tensorrt {
namespace {

constexpr int64_t kMaxWorkspace = int64_t{1} << 44;
constexpr int64_t kMaxGrid[3] = {std::numeric_limits<int32_t>::max(), 65535, 65535};
// Of cuTensorMapEncodeTiled: sizes and strides are 32 and 40 bits wide.
constexpr int64_t kMaxMapSize = int64_t{1} << 32, kMaxMapStride = (int64_t{1} << 40) - 1, kMapUnit = 16;
constexpr uint32_t kMaxBlock = 256;

}  // namespace

std::string text(const Linear& linear) {
  std::string sum = std::to_string(linear.offset);
  for (size_t s = 0; s < kSymbolCount; ++s)
    if (linear.coefficients[s]) sum += join(" + ", linear.coefficients[s], " ", kSymbols[s]);
  return sum;
}

bool has_negative(const Linear& linear) {
  return linear.offset < 0 || *std::min_element(linear.coefficients.begin(), linear.coefficients.end()) < 0;
}

void check_outputs(const Program& program) {
  for (const Tensor& output : program.outputs) {
    if (output.written) invalid("output ", output.name, " of the program is marked as written (allowed: inputs)");
    for (const Dimension& dimension : output.shape)
      if (dimension.symbol && !program.places[*dimension.symbol])
        invalid("output ", output.name, " of the program has ", kSymbols[*dimension.symbol],
                " in its shape, no input has");
  }
}

Sizes find_largest(const Program& program) {
  Sizes largest = most(program.possible());
  for (const Image& image : program.images) {
    Sizes of_image{};
    for (const Variant& variant : image.variants) {
      Ranges ranges = program.possible();
      if (!narrow(ranges, variant.bounds)) continue;
      for (size_t s = 0; s < kSymbolCount; ++s) of_image[s] = std::max(of_image[s], ranges[s].most);
    }
    for (size_t s = 0; s < kSymbolCount; ++s) largest[s] = std::min(largest[s], of_image[s]);
  }
  return largest;
}

// Counts never fall, so what holds at the ends of a variant's sizes holds between them.
void check_grid(const std::array<Count, 3>& grid, const Kernel& kernel, const Program& program, const Ranges& ranges) {
  for (int axis = 0; axis < 3; ++axis)
    for (const Sizes& sizes : {least(ranges), most(ranges)}) {
      const int64_t size = grid[axis].at(sizes);
      if (size < 1 || size > kMaxGrid[axis])
        invalid("kernel ", kernel.entry, " of the program has a grid of ", size, " along ", "xyz"[axis], " for ",
                program.describe(exactly(sizes)), " (allowed: 1 to ", kMaxGrid[axis], ")");
    }
}

void check_buffers(const std::vector<Count>& buffers, const Program& program, const Ranges& ranges) {
  const Sizes sizes = most(ranges);
  int64_t room = kMaxWorkspace;
  for (const Count& buffer : buffers) {
    const int64_t bytes = buffer.at(sizes);
    if (bytes > room - int64_t{kAlignment})
      invalid("a variant of the program has buffers of over ", kMaxWorkspace, " bytes for ",
              program.describe(exactly(sizes)));
    room -= static_cast<int64_t>(aligned(bytes));
  }
}

void check_map(const TensorMap& map, const Program& program, const Ranges& ranges) {
  const size_t rank = map.block.size();
  if (rank < 2 || rank > kMaxMapRank || map.inner.size() + 1 != rank)
    invalid("a tensor map of the program has ", map.inner.size() + 1, " dimensions and blocks of ", rank,
            " (allowed: as many, 2 to ", kMaxMapRank, ")");
  for (const int64_t size : map.inner)
    if (size < 1 || size > kMaxMapSize)
      invalid("a tensor map of the program has a dimension ", size, " (allowed: 1 to ", kMaxMapSize, ")");
  for (const Sizes& sizes : {least(ranges), most(ranges)})
    if (const Wide rows = map.rows.at(sizes); has_negative(map.rows) || rows < 1 || rows > kMaxMapSize)
      invalid("a tensor map of the program has ", text(map.rows), " rows for ", program.describe(exactly(sizes)),
              " (allowed: 1 to ", kMaxMapSize, ")");
  for (const uint32_t size : map.block)
    if (size < 1 || size > kMaxBlock)
      invalid("a tensor map of the program has blocks of ", size, " (allowed: 1 to ", kMaxBlock, ")");
  const int64_t stride = map.inner.back() * dtype_bytes(map.dtype), width = map.block.back() * dtype_bytes(map.dtype);
  if (stride % kMapUnit || map.row_bytes() > kMaxMapStride)
    invalid("a tensor map of the program has rows that lie ", stride, " bytes apart (allowed: multiples of ", kMapUnit,
            ", up to ", kMaxMapStride, " in all)");
  const bool is_swizzle = map.swizzle == 0 || map.swizzle == 32 || map.swizzle == 64 || map.swizzle == 128;
  if (width % kMapUnit || !is_swizzle || (map.swizzle && width > map.swizzle))
    invalid("a tensor map of the program has blocks ", width, " bytes wide with a swizzle of ", map.swizzle,
            " bytes (allowed: multiples of ", kMapUnit, ", up to the swizzle, which is 32, 64 or 128, or 0 for none)");
}

}  // namespace moevlm::tensorrt
