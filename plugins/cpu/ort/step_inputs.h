// What operators on packed steps share: the steps' sequences, and pools of what sequences keep.
#pragma once
#include <cstring>

#include "ort/custom_op.h"

namespace moevlm {

// query_start [sequences + 1] rises from 0 to the number of tokens, the rows of qkv.
inline void require_query_start(const int32_t* query_start, int64_t sequences, int64_t tokens) {
  if (query_start[0] != 0) invalid("query_start[0] = ", query_start[0], " (allowed: 0)");
  for (int64_t n = 0; n < sequences; ++n) {
    if (query_start[n + 1] < query_start[n]) {
      invalid("query_start[", n + 1, "] = ", query_start[n + 1], " (allowed: ", query_start[n], " or more)");
    }
  }
  if (query_start[sequences] != tokens) {
    invalid("query_start[", sequences, "] = ", query_start[sequences], " (allowed: ", tokens, ", the rows of qkv)");
  }
}

// A pool [rows, ...] as it was, where the caller keeps it apart from the new one. element: bytes.
inline void copy_pool(const Pool& threads, const Tensor& from, char* to, size_t element) {
  const char* old = from.as<char>();
  const size_t rows = from.elements() ? from.shape[0] : 0;
  if (old == to || rows == 0) return;
  const size_t bytes = from.elements() / rows * element;
  parallel_for(threads, rows, [&](size_t i) { std::memcpy(to + i * bytes, old + i * bytes, bytes); });
}

}  // namespace moevlm
