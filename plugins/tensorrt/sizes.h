// Sizes that are known only when an op runs, and numbers that follow from them.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace moevlm::tensorrt {

// 128 bits hold a sum of products of a program's 64-bit numbers and sizes.
__extension__ using Wide = __int128;

// T: tokens, patches or rows. N: sequences or images. M: columns of a page table. P: pages, or rows of states.
constexpr char kSymbols[] = {'T', 'N', 'M', 'P'};
constexpr size_t kSymbolCount = sizeof kSymbols;
// What each may be, whatever a variant's bounds; kernels take them as int32. As LARGEST_SIZES of plugins/gpu/sizes.py.
constexpr std::array<int64_t, kSymbolCount> kLargest = {1 << 20, 1 << 16, std::numeric_limits<int32_t>::max(),
                                                        std::numeric_limits<int32_t>::max()};

// One number per symbol; 1 for those that a program does not have.
using Sizes = std::array<int64_t, kSymbolCount>;

struct Range {
  int64_t least, most;
  bool operator==(const Range& other) const { return least == other.least && most == other.most; }
};
using Ranges = std::array<Range, kSymbolCount>;

Sizes least(const Ranges& ranges);
Sizes most(const Ranges& ranges);
Ranges exactly(const Sizes& sizes);

std::string text(const Range& range);  // "5" or "1..64"

// offset plus, for each symbol, coefficient times size.
struct Linear {
  int64_t offset;
  Sizes coefficients;

  Wide at(const Sizes& sizes) const;
  Wide least(const Ranges& ranges) const;
  Wide most(const Ranges& ranges) const;
};

// min(ceil(value / divisor), limit), of no negative numbers: it never falls as a size rises.
struct Count {
  Linear value;
  int64_t divisor;
  bool has_limit;
  Linear limit;

  int64_t at(const Sizes& sizes) const;
};

// Takes sizes out of `ranges` where some bound is above 0, as far as each bound alone tells; false if none is left.
bool narrow(Ranges& ranges, const std::vector<Linear>& bounds);

}  // namespace moevlm::tensorrt
