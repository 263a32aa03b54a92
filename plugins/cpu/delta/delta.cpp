// How one call is cut into tasks for the session's threads.

#include "delta/delta.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "simd/instruction_set.h"

namespace moevlm::delta {

namespace pairs { extern const Kernels kernels; }
namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }

namespace {

// Tokens between two waits of all threads for each other; what they leave for each other stays in a shared cache.
constexpr int64_t kBlock = 64;
constexpr int64_t kTasksPerThread = 4;

#if defined(__x86_64__)
constexpr const Kernels* kTables[4] = {&baseline::kernels, &avx2::kernels, &avx512::kernels};
#else
constexpr const Kernels* kTables[4] = {&baseline::kernels};
#endif

const Kernels& kernels_for(const Call& call) {
  return fastest_for_heads(pairs::kernels, kTables, call.key_dim, call.value_dim, instruction_set());
}

struct Aligned {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};

class Blocks {
 public:
  Blocks(const Call& call, const Pool& pool) : call_(call), pool_(pool), kernels_(kernels_for(call)) {
    const int64_t tokens = std::min(kBlock, call.tokens);
    sequence_of_.resize(tokens);
    const size_t floats = tokens * (call.channels() + 2 * call.value_heads);
    memory_.reset(static_cast<float*>(::operator new[](floats * sizeof(float), std::align_val_t(64))));
  }

  void run() {
    for (int64_t first = 0, sequence = 0; first < call_.tokens; first += kBlock) {
      block_.first = first;
      block_.tokens = std::min(kBlock, call_.tokens - first);
      block_.sequence_of = sequence_of_.data();
      block_.heads = memory_.get();
      block_.decay = block_.heads + block_.tokens * call_.channels();
      block_.beta = block_.decay + block_.tokens * call_.value_heads;
      sequence = cut(sequence);
      mix();
      advance();
    }
  }

 private:
  // The block's pieces; sequences before `sequence` are done. Returns that of the block's last token.
  int64_t cut(int64_t sequence) {
    pieces_.clear();
    const int64_t end = block_.first + block_.tokens;
    for (int64_t token = block_.first; token < end;) {
      while (call_.query_start[sequence + 1] <= token) ++sequence;
      const int64_t stop = std::min<int64_t>(call_.query_start[sequence + 1], end);
      pieces_.push_back({sequence, token, stop - token});
      std::fill(sequence_of_.begin() + (token - block_.first), sequence_of_.begin() + (stop - block_.first), sequence);
      token = stop;
    }
    return sequence;
  }

  // Head after head, and each head's tokens, in about equal parts.
  void mix() const {
    const int64_t tokens = block_.tokens, units = call_.channel_heads() * tokens;
    const int64_t tasks = std::min(units, kTasksPerThread * pool_.threads);
    parallel_for(pool_, tasks, [&](int64_t i) {
      const int64_t last = units * (i + 1) / tasks;
      for (int64_t unit = units * i / tasks; unit < last;) {
        const int64_t head = unit / tokens, begin = unit % tokens, end = std::min(tokens, begin + last - unit);
        kernels_.mix(call_, block_, head, begin, end);
        if (head >= 2 * call_.key_heads) gates(head - 2 * call_.key_heads, begin, end);
        unit += end - begin;
      }
    });
  }

  void gates(int64_t head, int64_t begin, int64_t end) const {
    float* const decay = block_.decay + head * block_.tokens;
    float* const beta = block_.beta + head * block_.tokens;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = (block_.first + t) * call_.value_heads + head;
      const float x = call_.a[at] + call_.dt_bias[head];
      const float softplus = (x > 0 ? x : 0) + std::log1p(std::exp(-std::fabs(x)));
      decay[t] = std::exp(-call_.rate[head] * softplus);
      beta[t] = 1 / (1 + std::exp(-call_.b[at]));
    }
  }

  void advance() const {
    const int64_t heads = static_cast<int64_t>(pieces_.size()) * call_.value_heads;
    // A state that is passed over twice is read from memory, in whole rows 1.4 times as fast as in quarters of them.
    const bool alone = static_cast<int64_t>(pieces_.size()) == block_.tokens;
    const int64_t wanted = ceil_div((alone ? 1 : kTasksPerThread) * pool_.threads, heads);
    const int64_t units = ceil_div(call_.value_dim, kernels_.columns), shares = std::min(wanted, units);
    parallel_for(pool_, heads * shares, [&](int64_t i) {
      const int64_t share = i % shares, head = i / shares % call_.value_heads;
      const Piece& piece = pieces_[i / shares / call_.value_heads];
      const int64_t begin = units * share / shares * kernels_.columns;
      const int64_t end = std::min(units * (share + 1) / shares * kernels_.columns, call_.value_dim);
      kernels_.advance(call_, block_, piece, head, begin, end);
      if (share == 0 && piece.token + piece.tokens == call_.query_start[piece.sequence + 1]) keep(piece.sequence, head);
    });
  }

  // The last inputs of a value head's channels, and with a group's first head those of its query's and key's: nothing
  // reads the row any more.
  void keep(int64_t sequence, int64_t head) const {
    const int64_t width = call_.key_dim, all_keys = call_.key_heads * width, key_head = head / call_.group();
    keep_channels(sequence, 2 * all_keys + head * call_.value_dim, call_.value_dim);
    if (head % call_.group()) return;
    keep_channels(sequence, key_head * width, width);
    keep_channels(sequence, all_keys + key_head * width, width);
  }

  void keep_channels(int64_t sequence, int64_t channel, int64_t count) const {
    const int64_t channels = call_.channels(), kept = call_.kernel - 1;
    const int64_t start = call_.query_start[sequence], end = call_.query_start[sequence + 1];
    float* const row = call_.conv_state + call_.state_row[sequence] * kept * channels + channel;
    for (int64_t j = 0; j < kept; ++j) {
      const int64_t source = end - kept + j;
      const float* from = source < start ? row + (kept + source - start) * channels
                                         : call_.qkv + source * channels + channel;
      std::memmove(row + j * channels, from, count * sizeof(float));
    }
  }

  const Call& call_;
  const Pool& pool_;
  const Kernels& kernels_;
  Block block_ = {};
  std::vector<int32_t> sequence_of_;
  std::vector<Piece> pieces_;
  std::unique_ptr<float[], Aligned> memory_;
};

}  // namespace

void run(const Call& call, const Pool& pool) {
  if (call.tokens) Blocks(call, pool).run();
}

}  // namespace moevlm::delta
