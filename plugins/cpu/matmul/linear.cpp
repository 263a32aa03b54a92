#include "matmul/linear.h"

#include <algorithm>

namespace moevlm::matmul {

int64_t task_count(int64_t bytes, int64_t macs, int64_t most) {
  const int64_t by_memory = bytes / (100 << 10), by_arithmetic = macs / (1 << 20);
  return std::clamp<int64_t>(std::max(by_memory, by_arithmetic), 1, std::clamp<int64_t>(most, 1, 128));
}

void quantize_rows(const Kernels& kernels, const Pool& pool, Packing packing, const float* x, int64_t tokens, int64_t k,
                   uint8_t* rows) {
  const int64_t bytes = packing.activation_bytes(k);
  const int64_t chunks = std::clamp<int64_t>(tokens * k >> 15, 1, 64);
  parallel_for(pool, chunks, [&](int64_t chunk) {
    for (int64_t t = tokens * chunk / chunks; t < tokens * (chunk + 1) / chunks; ++t)
      kernels.quantize(x + t * k, k, packing, rows + t * bytes);
  });
}

void linear(const LinearShape& shape, const Kernels& kernels, const Pool& pool, const float* x, int64_t tokens,
            const uint8_t* weight, const float* bias, float* y, uint8_t* scratch) {
  if (tokens == 0) return;
  const int64_t heads = shape.heads, n = shape.n;
  quantize_rows(kernels, pool, shape.packing, x, tokens * heads, shape.k, scratch);
  const PanelKernel panel_kernel = kernels.panel(shape.packing);
  const int64_t panels = ceil_div(n, kPanel), groups = shape.packing.groups(shape.k);
  const int64_t panel_bytes = shape.packing.panel_bytes(shape.k), row_bytes = shape.packing.activation_bytes(shape.k);
  const int64_t batches = ceil_div(tokens, kMaxRows);  // of almost equal size: 8 rows are 4 and 4, not 6 and 2
  const int64_t tasks = task_count(shape.weight_bytes(), tokens * heads * n * shape.k, heads * panels);
  parallel_for(pool, tasks, [&](int64_t task) {
    alignas(64) float out[kMaxRows * kPanel];
    for (int64_t i = heads * panels * task / tasks; i < heads * panels * (task + 1) / tasks; ++i) {
      const int64_t head = i / panels, p = i % panels, column = head * n + p * kPanel;  // of y
      const uint8_t* const w = weight + head * shape.head_bytes() + p * panel_bytes;
      alignas(64) float panel_bias[kPanel] = {};
      const int count = static_cast<int>(std::min<int64_t>(kPanel, n - p * kPanel));
      if (bias) std::copy_n(bias + column, count, panel_bias);
      for (int64_t b = 0; b < batches; ++b) {
        const int64_t first = tokens * b / batches;
        const int rows = static_cast<int>(tokens * (b + 1) / batches - first);
        const uint8_t* q[kMaxRows];
        for (int r = 0; r < rows; ++r) q[r] = scratch + ((first + r) * heads + head) * row_bytes;
        panel_kernel(w, w + panel_bytes, q, rows, groups, shape.packing.group_size, out);
        for (int r = 0; r < rows; ++r)
          kernels.store(out + r * kPanel, panel_bias, count, y + (first + r) * heads * n + column);
      }
    }
  });
}

}  // namespace moevlm::matmul
