// How one call is cut into tasks for the session's threads.

#include "attention/attention.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "simd/instruction_set.h"

namespace moevlm::attention {

namespace pairs { extern const Kernels kernels; }
namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }

namespace {

#if defined(__x86_64__)
constexpr const Kernels* kTables[4] = {&baseline::kernels, &avx2::kernels, &avx512::kernels};
#else
constexpr const Kernels* kTables[4] = {&baseline::kernels};
#endif

const Kernels& kernels_for(const Call& call) {
  return fastest_for_heads(pairs::kernels, kTables, call.key_dim, call.value_dim, instruction_set());
}

// As many tokens of a sequence as a task takes. There are `lanes` rows of tasks for them: one for each key/value head
// and share of its group.
struct Chunk {
  int64_t sequence, token, tokens, position, stop;
  int64_t begin, end;  // blocks that its tokens see
  int64_t parts;       // tasks that the blocks of a lane are cut into
  int64_t lane;        // number of its first lane among all that are cut, where parts > 1
  float* partials;

  int64_t entries() const { return stop - begin * kBlock; }
  int64_t work() const { return tokens * entries(); }
};

// Blocks begin to end of what a chunk sees, in every lane.
struct Part {
  const Chunk* chunk;
  int64_t begin, end;
};

struct Entries {
  int64_t sequence, begin, end;
};

// A call's tasks. Those of a lane leave partial results where they are several, and whoever is last joins them.
class Split {
 public:
  Split(const Call& call, size_t threads) : call_(call), kernels_(kernels_for(call)) {
    shares_ = ceil_div(call.group(), kTaskHeads);
    heads_ = ceil_div(call.group(), shares_);
    cut_tokens();
    cut_blocks(kTasksPerThread * static_cast<int64_t>(threads));
  }

  // Strips of new tokens that several tasks read: written first.
  int64_t appends() const { return static_cast<int64_t>(appends_.size()) * call_.kv_heads; }
  void append(int64_t i) const {
    const Entries& strip = appends_[i / call_.kv_heads];
    kernels_.append(call_, strip.sequence, i % call_.kv_heads, strip.begin, strip.end);
  }

  int64_t tasks() const { return static_cast<int64_t>(parts_.size()) * lanes(); }
  void attend(int64_t i) const {
    const Part& part = parts_[i / lanes()];
    const Chunk& chunk = *part.chunk;
    const int64_t lane = i % lanes(), first_head = lane % shares_ * heads_;  // of the group
    Task task = {};
    task.sequence = chunk.sequence;
    task.kv_head = lane / shares_;
    task.head = task.kv_head * call_.group() + first_head;
    task.heads = std::min(heads_, call_.group() - first_head);
    task.token = chunk.token;
    task.tokens = chunk.tokens;
    task.position = chunk.position;
    task.stop = chunk.stop;
    task.begin = part.begin;
    task.end = part.end;
    task.append = !appends_first(chunk.sequence);
    if (chunk.parts == 1) return kernels_.attend(call_, task);
    const int64_t apart = Partial::floats(chunk.tokens * heads_, call_.value_dim);  // at least what the task needs
    float* const lane_partials = chunk.partials + lane * (chunk.end - chunk.begin) * apart;
    const int64_t floats = Partial::floats(task.rows(), call_.value_dim);
    task.partials = lane_partials + (part.begin - chunk.begin) * floats;
    kernels_.attend(call_, task);
    if (done_[chunk.lane + lane].fetch_add(1, std::memory_order_acq_rel) + 1 == chunk.parts) {
      task.begin = chunk.begin;
      task.end = chunk.end;
      kernels_.combine(call_, task, lane_partials);
    }
  }

 private:
  static constexpr int64_t kTasksPerThread = 4;

  int64_t lanes() const { return call_.kv_heads * shares_; }
  int64_t most_tokens() const { return tile_rows(std::max(call_.key_dim, call_.value_dim)) / heads_; }
  bool appends_first(int64_t sequence) const { return shares_ > 1 || call_.length(sequence) > most_tokens(); }

  // Of all its tokens.
  int64_t end_seen(const Chunk& chunk) const {
    int64_t end = chunk.position + chunk.tokens;
    for (int64_t t = 0; call_.visible_end && t < chunk.tokens; ++t) {
      end = std::max(end, call_.end_seen(chunk.token + t, chunk.position + t, call_.entries(chunk.sequence)));
    }
    return end;
  }

  void cut_tokens() {
    for (int64_t n = 0; n < call_.sequences; ++n) {
      const int64_t first = call_.query_start[n], length = call_.length(n), context = call_.context_len[n];
      for (int64_t t = 0; t < length; t += most_tokens()) {
        Chunk chunk = {};
        chunk.sequence = n;
        chunk.token = first + t;
        chunk.tokens = std::min(most_tokens(), length - t);
        chunk.position = context + t;
        chunk.stop = end_seen(chunk);
        chunk.begin = call_.first_seen(chunk.position) / kBlock;
        chunk.end = ceil_div(chunk.stop, kBlock);
        chunk.parts = 1;
        chunks_.push_back(chunk);
      }
      if (!appends_first(n)) continue;
      for (int64_t entry = context; entry < context + length;) {
        const int64_t end = std::min((entry / kStrip + 1) * kStrip, context + length);
        appends_.push_back({n, entry, end});
        entry = end;
      }
    }
  }

  // A chunk with more than its share of the work is cut; the longest tasks start first.
  void cut_blocks(int64_t wanted) {
    int64_t work = 0, cut = 0, floats = 0;
    for (const Chunk& chunk : chunks_) work += chunk.work() * lanes();
    const auto partial_floats = [&](const Chunk& chunk) {
      return (chunk.end - chunk.begin) * Partial::floats(chunk.tokens * heads_, call_.value_dim) * lanes();
    };
    for (Chunk& chunk : chunks_) {
      const int64_t whole_blocks = std::max<int64_t>(chunk.entries() / kBlock, 1);
      chunk.parts = std::min(whole_blocks, ceil_div(wanted * chunk.work(), work));
      if (chunk.parts == 1) continue;
      chunk.lane = cut;
      cut += lanes();
      floats += partial_floats(chunk);
    }
    if (cut) {
      partials_.reset(new float[floats]);
      done_.reset(new std::atomic<int64_t>[cut]());
    }
    float* next = partials_.get();
    for (Chunk& chunk : chunks_) {
      if (chunk.parts > 1) {
        chunk.partials = next;
        next += partial_floats(chunk);
      }
      const int64_t blocks = ceil_div(chunk.end - chunk.begin, chunk.parts);
      chunk.parts = ceil_div(chunk.end - chunk.begin, blocks);
      for (int64_t begin = chunk.begin; begin < chunk.end; begin += blocks) {
        parts_.push_back({&chunk, begin, std::min(begin + blocks, chunk.end)});
      }
    }
    const auto part_work = [](const Part& part) { return part.chunk->tokens * (part.end - part.begin); };
    std::stable_sort(parts_.begin(), parts_.end(),
                     [&](const Part& a, const Part& b) { return part_work(a) > part_work(b); });
  }

  const Call& call_;
  const Kernels& kernels_;
  int64_t shares_, heads_;  // of a group
  std::vector<Chunk> chunks_;
  std::vector<Entries> appends_;
  std::vector<Part> parts_;
  std::unique_ptr<float[]> partials_;
  std::unique_ptr<std::atomic<int64_t>[]> done_;
};

}  // namespace

void attend(const Call& call, const Pool& pool) {
  if (call.tokens == 0) return;
  const Split split(call, pool.threads);
  parallel_for(pool, split.appends(), [&](size_t i) { split.append(static_cast<int64_t>(i)); });
  parallel_for(pool, split.tasks(), [&](size_t i) { split.attend(static_cast<int64_t>(i)); });
}

}  // namespace moevlm::attention
