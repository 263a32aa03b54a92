// Where a token's key and value lie in the pools of pages. Nobody else looks into a page: it is copied whole.
//
//   pool      [pages][kv_heads] pages of one head; a page holds `page` tokens, a multiple of 16, as strips of 16:
//
//   keys      token  0   1   2  ... 15             so that a score is a sum of q[d] times the 16 lanes of line d, for
//   dim 0     [      k   k   k  ...  k  ]          one row or for many, with no sum across lanes and no copy
//   dim 1     [      k   k   k  ...  k  ]
//   ...
//   dim D-1   [      k   k   k  ...  k  ]
//   (int8)    [      s   s   s  ...  s  ]          a float scale per token
//
//   values    token  0  [ v v v ... v ] (dims)     so that a result is a sum of weights times lines
//   ...
//             token 15  [ v v v ... v ]
//   (int8)              [ s s ... s   ]            a float scale per token
//
// A strip takes the same bytes whatever the instruction set. Included by kernels.h, once per instruction set.

#pragma once

#include <cstring>

#include "attention/attention.h"
#include "simd/vector.h"

namespace moevlm::attention::MOEVLM_ISA {

using namespace moevlm::MOEVLM_ISA;

constexpr int kTileM = MOEVLM_TILE_M;  // most rows that go through a product side by side
static_assert(kRowUnit % kTileM == 0 && kStrip % kLanes == 0);

// The pages of one head of a sequence, of keys or of values, with T float or int8_t.
template <class T>
struct Pages {
  static constexpr bool quantized = sizeof(T) == 1;

  T* first;  // page 0
  const int32_t* table;
  int64_t page;         // tokens
  int64_t dim;
  int64_t page_stride;  // in elements, as below

  Pages(const Call& call, void* pool, int64_t dim, int64_t sequence, int64_t kv_head)
      : table(call.page_table + sequence * call.table_width), page(call.page), dim(dim) {
    page_stride = call.kv_heads * page * width();
    first = static_cast<T*>(pool) + kv_head * page * width();
  }

  int64_t width() const { return quantized ? dim + 4 : dim; }

  // Of the 16 entries from `row` on, a multiple of 16, in one of the sequence's pages.
  T* strip(int64_t place, int64_t row) const { return first + table[place] * page_stride + row * width(); }

  // at[i] = strip i of those from `entry` on, for i < count. Returns the end of `at`.
  T** strips(int64_t entry, int64_t count, T** at) const {
    int64_t place = entry / page, row = entry % page;
    for (int64_t i = 0; i < count; ++i) {
      *at++ = strip(place, row);
      row += kStrip;
      if (row == page) {
        row = 0;
        ++place;
      }
    }
    return at;
  }

  // [kStrip], behind an int8 strip; anywhere, so they are copied
  T* scales(T* strip) const { return strip + kStrip * dim; }
};

}  // namespace moevlm::attention::MOEVLM_ISA
