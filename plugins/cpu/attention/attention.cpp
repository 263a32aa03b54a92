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

// The widest vectors that divide a head.
const Kernels& kernels_for(const Call& call) {
  const auto fits = [&](const Kernels& kernels) {
    return call.key_dim % kernels.lanes == 0 && call.value_dim % kernels.lanes == 0;
  };
#if defined(__x86_64__)
  const InstructionSet set = instruction_set();
  if (set >= InstructionSet::avx512 && fits(avx512::kernels)) return avx512::kernels;
  if (set >= InstructionSet::avx2 && fits(avx2::kernels)) return avx2::kernels;
#endif
  return fits(baseline::kernels) ? baseline::kernels : pairs::kernels;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Some tokens of a sequence and all heads: `lanes` rows of tasks, one for each key/value head and share of its group.
struct Tile {
  int64_t sequence, token, tokens, position;
  int64_t begin, end;  // blocks that its tokens see
  int64_t parts;       // tasks that the blocks of a lane are cut into
  int64_t lane;        // number of its first lane among all that are cut, where parts > 1
  float* partials;

  int64_t work() const { return tokens * (end - begin); }
};

// Blocks begin to end of a tile, in every lane.
struct Part {
  const Tile* tile;
  int64_t begin, end;
};

// A call's tasks. Those of a lane leave partial results where they are several, and whoever is last joins them.
class Split {
 public:
  Split(const Call& call, size_t threads) : call_(call), kernels_(kernels_for(call)) {
    shares_ = divide_up(call.group(), kTaskHeads);
    heads_ = divide_up(call.group(), shares_);
    cut_tokens();
    cut_blocks(kTasksPerThread * static_cast<int64_t>(threads));
  }

  // Strips of new tokens that several tasks read.
  int64_t appends() const { return static_cast<int64_t>(appends_.size()) * call_.kv_heads; }
  void append(int64_t i) const {
    const Tile& strip = appends_[i / call_.kv_heads];
    kernels_.append(call_, strip.sequence, i % call_.kv_heads, strip.position, strip.position + strip.tokens);
  }

  int64_t tasks() const { return static_cast<int64_t>(parts_.size()) * lanes(); }
  void attend(int64_t i) const {
    const Part& part = parts_[i / lanes()];
    const Tile& tile = *part.tile;
    const int64_t lane = i % lanes(), first_head = lane % shares_ * heads_;  // of the group
    Task task = {};
    task.sequence = tile.sequence;
    task.kv_head = lane / shares_;
    task.head = task.kv_head * call_.group() + first_head;
    task.heads = std::min(heads_, call_.group() - first_head);
    task.token = tile.token;
    task.tokens = tile.tokens;
    task.position = tile.position;
    task.begin = part.begin;
    task.end = part.end;
    task.append = !appends_first(tile.sequence);
    if (tile.parts == 1) return kernels_.attend(call_, task);
    const int64_t apart = Partial::floats(tile.tokens * heads_, call_.value_dim);  // at least what the task needs
    float* const lane_partials = tile.partials + lane * (tile.end - tile.begin) * apart;
    const int64_t floats = Partial::floats(task.rows(), call_.value_dim);
    task.partials = lane_partials + (part.begin - tile.begin) * floats;
    kernels_.attend(call_, task);
    if (done_[tile.lane + lane].fetch_add(1, std::memory_order_acq_rel) + 1 == tile.parts) {
      task.begin = tile.begin;
      task.end = tile.end;
      kernels_.combine(call_, task, lane_partials);
    }
  }

 private:
  static constexpr int64_t kTasksPerThread = 4, kAppended = 16;

  int64_t lanes() const { return call_.kv_heads * shares_; }
  int64_t most_tokens() const { return tile_rows(std::max(call_.key_dim, call_.value_dim)) / heads_; }
  bool appends_first(int64_t sequence) const { return shares_ > 1 || call_.length(sequence) > most_tokens(); }

  void cut_tokens() {
    for (int64_t n = 0; n < call_.sequences; ++n) {
      const int64_t first = call_.query_start[n], length = call_.length(n), context = call_.context_len[n];
      for (int64_t t = 0; t < length; t += most_tokens()) {
        Tile tile = {};
        tile.sequence = n;
        tile.token = first + t;
        tile.tokens = std::min(most_tokens(), length - t);
        tile.position = context + t;
        tile.begin = call_.first_seen(tile.position) / kBlock;
        tile.end = divide_up(tile.position + tile.tokens, kBlock);
        tile.parts = 1;
        tiles_.push_back(tile);
      }
      if (!appends_first(n)) continue;
      for (int64_t entry = context; entry < context + length;) {
        const int64_t end = std::min((entry / kAppended + 1) * kAppended, context + length);
        Tile strip = {};
        strip.sequence = n;
        strip.position = entry;
        strip.tokens = end - entry;
        appends_.push_back(strip);
        entry = end;
      }
    }
  }

  // A tile with more than its share of the work is cut; the longest tasks start first.
  void cut_blocks(int64_t wanted) {
    int64_t work = 0, cut = 0, floats = 0;
    for (const Tile& tile : tiles_) work += tile.work() * lanes();
    const auto partial_floats = [&](const Tile& tile) {
      return (tile.end - tile.begin) * Partial::floats(tile.tokens * heads_, call_.value_dim) * lanes();
    };
    for (Tile& tile : tiles_) {
      tile.parts = std::min(tile.end - tile.begin, divide_up(wanted * tile.work(), work));
      if (tile.parts == 1) continue;
      tile.lane = cut;
      cut += lanes();
      floats += partial_floats(tile);
    }
    if (cut) {
      partials_.reset(new float[floats]);
      done_.reset(new std::atomic<int64_t>[cut]());
    }
    float* next = partials_.get();
    for (Tile& tile : tiles_) {
      if (tile.parts > 1) {
        tile.partials = next;
        next += partial_floats(tile);
      }
      const int64_t blocks = divide_up(tile.end - tile.begin, tile.parts);
      tile.parts = divide_up(tile.end - tile.begin, blocks);
      for (int64_t begin = tile.begin; begin < tile.end; begin += blocks) {
        parts_.push_back({&tile, begin, std::min(begin + blocks, tile.end)});
      }
    }
    const auto part_work = [](const Part& part) { return part.tile->tokens * (part.end - part.begin); };
    std::stable_sort(parts_.begin(), parts_.end(),
                     [&](const Part& a, const Part& b) { return part_work(a) > part_work(b); });
  }

  const Call& call_;
  const Kernels& kernels_;
  int64_t shares_, heads_;  // of a group
  std::vector<Tile> tiles_, appends_;
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
