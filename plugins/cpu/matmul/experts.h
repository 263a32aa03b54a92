// The experts of a layer over packed weights: moevlm.plugins.ops.experts.experts.
//
// Two products, and the weights of each are read once however many tokens they serve. The first makes the channels of
// every pair of a token and one of its experts, and quantizes them; a task is an expert and a range of its channels.
// The second makes y; a task is a range of its columns, for one expert after another, so that no two tasks write to one
// place and a token's experts are added in the order of their numbers, whatever the number of threads.
#pragma once
#include "matmul/kernels.h"
#include "parallel.h"

namespace moevlm::matmul {

struct ExpertsShape {
  int64_t experts, hidden, width;
  Packing packing;
  ActivationSpec activation;
  bool weight_on_input;

  // Of gate_up: where gated, a panel holds the gate rows of 16 channels, then their up rows.
  int64_t channels_of_panel() const { return activation.gated ? kPanel / 2 : kPanel; }
  int64_t up_panels() const { return ceil_div(width, channels_of_panel()); }
  int64_t up_rows() const { return width * (activation.gated ? 2 : 1); }
  int64_t up_bytes() const { return up_panels() * packing.panel_bytes(hidden); }
  int64_t down_bytes() const { return packing.bytes(hidden, width); }
  int64_t scratch_bytes(int64_t tokens, int64_t top_k) const;
};

struct ExpertsInputs {
  const float* x;          // [tokens, hidden]
  const int32_t* index;    // [tokens, top_k]; -1 is no expert
  const float* weight;     // [tokens, top_k]
  const uint8_t* gate_up;  // [experts, up_bytes]
  const uint8_t* down;     // [experts, down_bytes]
  const float* up_bias;    // [experts, up_rows], gate first, or null
  const float* down_bias;  // [experts, hidden] or null
  int64_t tokens, top_k;
};

// Writes y [tokens, hidden] and returns tokens * top_k; or, where an index is no expert, leaves y as it is and returns
// the first such index's place. scratch: shape.scratch_bytes(tokens, top_k).
int64_t experts(const ExpertsShape& shape, const Kernels& kernels, const Pool& pool, const ExpertsInputs& in, float* y,
                uint8_t* scratch);

}  // namespace moevlm::matmul
