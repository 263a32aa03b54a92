#include "matmul/float_linear.h"

#include <algorithm>
#include <cstring>

#include "matmul/linear.h"

namespace moevlm::matmul {
namespace {

constexpr int64_t kRows = kMaxFloatRows, kDepth = kFloatDepth;
// A block of y is made at once: its rows share the panels in the cache, its panels share the rows.
constexpr int64_t kBlockRows = 4 * kRows, kBlockPanels = 4;

struct Product {
  const FloatLinearShape& shape;
  const Kernels& kernels;
  const float* x;
  const float* weight;
  const float* bias;
  float* y;

  // Rows [from, to) of y, at most kBlockRows, in the columns of panels [first, last), at most kBlockPanels.
  void block(int64_t from, int64_t to, int64_t first, int64_t last) const {
    const int64_t k = shape.k, n = shape.n;
    alignas(64) float sums[kBlockPanels][kBlockRows][kPanel];
    alignas(64) float side_by_side[kRows * kDepth];
    for (int64_t p = 0; p < last - first; ++p) std::memset(sums[p], 0, (to - from) * sizeof(sums[p][0]));
    for (int64_t d = 0; d < k; d += kDepth) {
      const int64_t depth = std::min(kDepth, k - d);
      for (int64_t t = from; t < to; t += kRows) {
        const int64_t rows = std::min(kRows, to - t);
        // Copied, because rows whose distance is a power of two would all want one place in the cache.
        for (int64_t r = 0; r < rows; ++r) std::copy_n(x + (t + r) * k + d, depth, side_by_side + r * kDepth);
        for (int64_t p = first; p < last; ++p)
          kernels.float_panel(weight + (p * k + d) * kPanel, side_by_side, static_cast<int>(rows), depth,
                              sums[p - first][t - from]);
      }
    }
    for (int64_t t = from; t < to; ++t) {
      for (int64_t p = first; p < last; ++p) {
        const float* const row = sums[p - first][t - from];
        const int64_t column = p * kPanel, count = std::min<int64_t>(kPanel, n - column);
        for (int64_t i = 0; i < count; ++i) y[t * n + column + i] = bias ? row[i] + bias[column + i] : row[i];
      }
    }
  }
};

}  // namespace

void float_linear(const FloatLinearShape& shape, const Kernels& kernels, const Pool& pool, const float* x,
                  int64_t tokens, const float* weight, const float* bias, float* y) {
  if (tokens == 0) return;
  const Product product{shape, kernels, x, weight, bias, y};
  const int64_t panels = shape.panels(), groups = ceil_div(tokens, kRows), most = kBlockRows / kRows;
  // A multiplication of floats takes as long as four of bytes.
  const int64_t wanted = task_count(shape.weights() * sizeof(float), tokens * shape.n * shape.k / 4, groups * panels);
  const int64_t chunks = std::min(wanted, 4 * pool.threads);
  // Rows are divided only where they are many, because each part of them reads the weights again.
  const int64_t row_chunks = groups <= most ? 1 : std::clamp(chunks, ceil_div(groups, most), groups);
  const int64_t panel_chunks = std::min(ceil_div(chunks, row_chunks), panels);
  const int64_t together = groups > 1 ? kBlockPanels : 1;  // a panel that is read once is best read from end to end
  parallel_for(pool, row_chunks * panel_chunks, [&](int64_t task) {
    const int64_t i = task / panel_chunks, j = task % panel_chunks;
    const int64_t from = groups * i / row_chunks * kRows, to = std::min(groups * (i + 1) / row_chunks * kRows, tokens);
    const int64_t end = panels * (j + 1) / panel_chunks;
    for (int64_t p = panels * j / panel_chunks; p < end; p += together)
      product.block(from, to, p, std::min(p + together, end));
  });
}

}  // namespace moevlm::matmul
