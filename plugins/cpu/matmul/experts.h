// A bank of experts over packed weights: moevlm.plugins.ops.reference.experts.
//
// Two passes over the experts that tokens were sent to, each weight read once however many tokens it serves. First the
// hidden channels of every (token, expert) pair, quantized as they are made; a task is an expert and a range of its
// channels. Then the outputs; a task is a range of columns of y, for all experts in turn, so that no two tasks write to
// one place and a token's sum has one order, whatever the number of threads.
#pragma once
#include "matmul/kernels.h"
#include "parallel.h"

namespace moevlm::matmul {

struct ExpertsShape {
  int64_t experts, hidden, width;
  Packing packing;
  ActivationSpec activation;
  bool weight_on_input;

  // gate_up has two half panels a channel where gated: rows of the packed weight, with padding of the last panel.
  int64_t channels_of_panel() const { return activation.gated ? kPanel / 2 : kPanel; }
  int64_t up_panels() const { return ceil_div(width, channels_of_panel()); }
  int64_t up_rows() const { return width * (activation.gated ? 2 : 1); }
  int64_t up_bytes() const { return up_panels() * packing.panel_bytes(hidden); }
  int64_t down_bytes() const { return packing.bytes(hidden, width); }
  int64_t scratch_bytes(int64_t tokens, int64_t top_k) const;
};

struct ExpertsInputs {
  const float* x;           // [tokens, hidden]
  const int32_t* index;     // [tokens, top_k]
  const float* weight;      // [tokens, top_k]
  const uint8_t* gate_up;   // [experts, up_bytes]
  const uint8_t* down;      // [experts, down_bytes]
  const float* up_bias;     // [experts, up_rows], gate first, or null
  const float* down_bias;   // [experts, hidden] or null
  int64_t tokens, top_k;
};

// -> y [tokens, hidden]. Returns tokens * top_k, or the place of the first index that is no expert, with y untouched.
int64_t experts(const ExpertsShape& shape, const Kernels& kernels, const Pool& pool, const ExpertsInputs& in, float* y,
               uint8_t* scratch);

}  // namespace moevlm::matmul
