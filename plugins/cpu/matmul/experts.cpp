#include "matmul/experts.h"

#include <algorithm>
#include <numeric>

#include "matmul/linear.h"

namespace moevlm::matmul {
namespace {

constexpr int64_t kRows = 8 * kMaxRows;  // whose channels a task keeps as floats until it quantizes them

// The pairs of a token and one of its experts, sorted by expert. A pair's number is token * top_k + choice. A pair of no
// expert, -1, is not among them.
struct Routing {
  int32_t* pairs;   // [tokens * top_k], those of an expert one after another
  int32_t* first;   // [experts + 1]: where an expert's pairs begin
  int32_t* active;  // [experts]: experts that have any
  int64_t active_count = 0;

  int64_t rows(int64_t expert) const { return first[expert + 1] - first[expert]; }

  void sort(const int32_t* index, int64_t count, int64_t experts) {
    std::fill_n(first, experts + 1, 0);
    for (int64_t i = 0; i < count; ++i)
      if (index[i] >= 0) ++first[index[i] + 1];
    for (int64_t e = 0; e < experts; ++e)
      if (first[e + 1]) active[active_count++] = static_cast<int32_t>(e);
    std::partial_sum(first, first + experts + 1, first);
    for (int64_t i = 0; i < count; ++i)
      if (index[i] >= 0) pairs[first[index[i]]++] = static_cast<int32_t>(i);
    for (int64_t e = experts; e > 0; --e) first[e] = first[e - 1];
    first[0] = 0;
  }
};

int64_t round_up(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

class ExpertsCall {
 public:
  ExpertsCall(const ExpertsShape& shape, const Kernels& kernels, const Pool& pool, const ExpertsInputs& in, float* y,
              uint8_t* scratch)
      : shape_(shape), kernels_(kernels), pool_(pool), in_(in), y_(y), panel_kernel_(kernels.panel(shape.packing)) {
    const int64_t pairs = in.tokens * in.top_k;
    x_bytes_ = shape.packing.activation_bytes(shape.hidden);
    h_bytes_ = shape.packing.activation_bytes(shape.width);
    x_rows_ = scratch;
    h_rows_ = x_rows_ + round_up(in.tokens * x_bytes_);
    routing_.pairs = reinterpret_cast<int32_t*>(h_rows_ + round_up(pairs * h_bytes_));
    routing_.first = routing_.pairs + pairs;
    routing_.active = routing_.first + shape.experts + 1;
  }

  void run() {
    const int64_t pairs = in_.tokens * in_.top_k;
    routing_.sort(in_.index, pairs, shape_.experts);
    if (!routing_.active_count) {
      std::fill_n(y_, in_.tokens * shape_.hidden, 0.0f);
      return;
    }
    quantize_rows(kernels_, pool_, shape_.packing, in_.x, in_.tokens, shape_.hidden, x_rows_);

    const int64_t count = routing_.active_count;
    // A multiple of the groups' size and of a panel's channels, so that a task quantizes whole groups.
    const int64_t unit = std::lcm<int64_t>(shape_.packing.group_size, shape_.channels_of_panel());
    const bool many = count * ceil_div(shape_.width, 128) >= 4 * pool_.threads;
    const int64_t chunk = unit * std::max<int64_t>(1, (many ? 128 : 64) / unit);
    const int64_t chunks = ceil_div(shape_.width, chunk);
    parallel_for(pool_, count * chunks,
                 [&](int64_t task) { first_product(routing_.active[task / chunks], task % chunks * chunk, chunk); });

    const int64_t panels = ceil_div(shape_.hidden, kPanel);
    // A task reads some panels of every expert: a piece of memory each. Pieces of 48 KB take three quarters of the time
    // of pieces of ten, because the processor has to look up the addresses of every piece anew.
    const int64_t pieces = std::max(shape_.down_bytes() / (48 << 10), 2 * pool_.threads);
    const int64_t macs = pairs * shape_.hidden * shape_.width;
    const int64_t ranges =
        std::max(std::min(task_count(count * shape_.down_bytes(), 0, panels), pieces), task_count(0, macs / 4, panels));
    parallel_for(pool_, ranges,
                 [&](int64_t range) { second_product(panels * range / ranges, panels * (range + 1) / ranges); });
  }

 private:
  // Quantized channels [from, from + chunk) of all pairs of an expert.
  void first_product(int64_t expert, int64_t from, int64_t chunk) {
    alignas(64) float channels[kRows * kMaxChunk];
    alignas(64) float out[kMaxRows * kPanel];
    const int64_t step = shape_.channels_of_panel(), panel_bytes = shape_.packing.panel_bytes(shape_.hidden);
    const int64_t to = std::min(from + chunk, shape_.width), groups = shape_.packing.groups(shape_.hidden);
    const int64_t h_offset = shape_.packing.activation_bytes(from);
    const uint8_t* const weight = in_.gate_up + expert * shape_.up_bytes();
    const int64_t end = routing_.first[expert + 1];
    for (int64_t begin = routing_.first[expert]; begin < end; begin += kRows) {
      const int64_t rows = std::min(kRows, end - begin), batches = ceil_div(rows, kMaxRows);
      for (int64_t c = from; c < to; c += step) {
        alignas(64) float bias[kPanel] = {};
        if (in_.up_bias) panel_bias(expert, c, bias);
        const uint8_t* const w = weight + c / step * panel_bytes;
        for (int64_t batch = 0; batch < batches; ++batch) {
          const int64_t first = rows * batch / batches, last = rows * (batch + 1) / batches;
          const uint8_t* x[kMaxRows];
          for (int64_t r = first; r < last; ++r)
            x[r - first] = x_rows_ + routing_.pairs[begin + r] / in_.top_k * x_bytes_;
          panel_kernel_(w, w + panel_bytes, x, static_cast<int>(last - first), groups, shape_.packing.group_size, out);
          for (int64_t r = first; r < last; ++r) {
            // A row was quantized without the weight that a pair puts on it: the scaled row has the same bytes.
            const float factor = shape_.weight_on_input ? in_.weight[routing_.pairs[begin + r]] : 1.0f;
            kernels_.activate(out + (r - first) * kPanel, bias, factor, shape_.activation,
                              channels + r * chunk + (c - from));
          }
        }
      }
      for (int64_t r = 0; r < rows; ++r)
        kernels_.quantize(channels + r * chunk, to - from, shape_.packing, h_rows_ + (begin + r) * h_bytes_ + h_offset);
    }
  }

  void panel_bias(int64_t expert, int64_t channel, float* bias) const {
    const int64_t step = shape_.channels_of_panel(), count = std::min(step, shape_.width - channel);
    const float* all = in_.up_bias + expert * shape_.up_rows() + channel;
    std::copy_n(all, count, bias);
    if (shape_.activation.gated) std::copy_n(all + shape_.width, count, bias + step);
  }

  // The columns of panels [from, to) of all rows of y.
  void second_product(int64_t from, int64_t to) {
    alignas(64) float out[kMaxRows * kPanel];
    const int64_t panel_bytes = shape_.packing.panel_bytes(shape_.width), groups = shape_.packing.groups(shape_.width);
    const int64_t column = from * kPanel, width = std::min(to * kPanel, shape_.hidden) - column;
    for (int64_t t = 0; t < in_.tokens; ++t) std::fill_n(y_ + t * shape_.hidden + column, width, 0.0f);
    for (int64_t i = 0; i < routing_.active_count; ++i) {
      const int64_t expert = routing_.active[i], next = routing_.active[i + 1 < routing_.active_count ? i + 1 : i];
      const int64_t begin = routing_.first[expert], rows = routing_.rows(expert), batches = ceil_div(rows, kMaxRows);
      // Asks for the addresses of the next expert's piece, a page each.
      const uint8_t* const later = in_.down + next * shape_.down_bytes() + from * panel_bytes;
      for (int64_t at = 0; at < (to - from) * panel_bytes; at += 4096) __builtin_prefetch(later + at);
      for (int64_t p = from; p < to; ++p) {
        alignas(64) float bias[kPanel] = {};
        const int count = static_cast<int>(std::min<int64_t>(kPanel, shape_.hidden - p * kPanel));
        if (in_.down_bias) std::copy_n(in_.down_bias + expert * shape_.hidden + p * kPanel, count, bias);
        const uint8_t* const w = in_.down + expert * shape_.down_bytes() + p * panel_bytes;
        const uint8_t* const ahead =
            p + 1 < to ? w + panel_bytes : in_.down + next * shape_.down_bytes() + from * panel_bytes;
        for (int64_t batch = 0; batch < batches; ++batch) {
          const int64_t first = begin + rows * batch / batches, last = begin + rows * (batch + 1) / batches;
          const uint8_t* h[kMaxRows];
          for (int64_t r = first; r < last; ++r) h[r - first] = h_rows_ + r * h_bytes_;
          panel_kernel_(w, ahead, h, static_cast<int>(last - first), groups, shape_.packing.group_size, out);
          for (int64_t r = first; r < last; ++r) {
            const int64_t pair = routing_.pairs[r], token = pair / in_.top_k;
            const float weight = shape_.weight_on_input ? 1.0f : in_.weight[pair];
            kernels_.accumulate(out + (r - first) * kPanel, bias, weight, count,
                                y_ + token * shape_.hidden + p * kPanel);
          }
        }
      }
    }
  }

  static constexpr int64_t kMaxChunk = 2 * kMaxGroup;

  const ExpertsShape& shape_;
  const Kernels& kernels_;
  const Pool& pool_;
  const ExpertsInputs& in_;
  float* const y_;
  const PanelKernel panel_kernel_;
  int64_t x_bytes_, h_bytes_;
  uint8_t *x_rows_, *h_rows_;
  Routing routing_;
};

}  // namespace

int64_t ExpertsShape::scratch_bytes(int64_t tokens, int64_t top_k) const {
  const int64_t pairs = tokens * top_k;
  return round_up(tokens * packing.activation_bytes(hidden)) + round_up(pairs * packing.activation_bytes(width)) +
         sizeof(int32_t) * (pairs + 2 * experts + 1);
}

int64_t experts(const ExpertsShape& shape, const Kernels& kernels, const Pool& pool, const ExpertsInputs& in, float* y,
                uint8_t* scratch) {
  const int64_t pairs = in.tokens * in.top_k;
  for (int64_t i = 0; i < pairs; ++i)
    if (in.index[i] < -1 || in.index[i] >= shape.experts) return i;
  if (pairs) ExpertsCall(shape, kernels, pool, in, y, scratch).run();
  return pairs;
}

}  // namespace moevlm::matmul
