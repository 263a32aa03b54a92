#include "sizes.h"

#include <algorithm>

namespace moevlm::tensorrt {
namespace {

constexpr int kRounds = 2 * kSymbolCount;  // T <= N and N <= 64 take two; more only narrow what is empty

}  // namespace

Sizes least(const Ranges& ranges) {
  Sizes sizes;
  for (size_t s = 0; s < kSymbolCount; ++s) sizes[s] = ranges[s].least;
  return sizes;
}

Sizes most(const Ranges& ranges) {
  Sizes sizes;
  for (size_t s = 0; s < kSymbolCount; ++s) sizes[s] = ranges[s].most;
  return sizes;
}

Ranges exactly(const Sizes& sizes) {
  Ranges ranges;
  for (size_t s = 0; s < kSymbolCount; ++s) ranges[s] = {sizes[s], sizes[s]};
  return ranges;
}

std::string text(const Range& range) {
  return std::to_string(range.least) + (range.least == range.most ? "" : ".." + std::to_string(range.most));
}

Wide Linear::at(const Sizes& sizes) const {
  Wide sum = offset;
  for (size_t s = 0; s < kSymbolCount; ++s) sum += Wide{coefficients[s]} * sizes[s];
  return sum;
}

Wide Linear::least(const Ranges& ranges) const {
  Sizes sizes;
  for (size_t s = 0; s < kSymbolCount; ++s) sizes[s] = coefficients[s] < 0 ? ranges[s].most : ranges[s].least;
  return at(sizes);
}

Wide Linear::most(const Ranges& ranges) const {
  Sizes sizes;
  for (size_t s = 0; s < kSymbolCount; ++s) sizes[s] = coefficients[s] < 0 ? ranges[s].least : ranges[s].most;
  return at(sizes);
}

int64_t Count::at(const Sizes& sizes) const {
  Wide number = (value.at(sizes) + divisor - 1) / divisor;
  if (has_limit) number = std::min(number, limit.at(sizes));
  return static_cast<int64_t>(std::min(number, Wide{std::numeric_limits<int64_t>::max()}));
}

bool narrow(Ranges& ranges, const std::vector<Linear>& bounds) {
  for (int round = 0; round < kRounds; ++round)
    for (const Linear& bound : bounds) {
      const Wide least = bound.least(ranges);
      if (least > 0) return false;
      // A symbol may leave the end where the bound is least by as much as brings the bound up to 0.
      for (size_t s = 0; s < kSymbolCount; ++s) {
        const Wide coefficient = bound.coefficients[s];
        Range& range = ranges[s];
        if (coefficient > 0)
          range.most = static_cast<int64_t>(std::min(Wide{range.most}, range.least - least / coefficient));
        else if (coefficient < 0)
          range.least = static_cast<int64_t>(std::max(Wide{range.least}, range.most - least / coefficient));
      }
    }
  return true;
}

}  // namespace moevlm::tensorrt
