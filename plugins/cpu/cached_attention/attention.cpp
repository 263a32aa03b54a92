// How one call is cut into tasks for the session's threads.

#include "cached_attention/attention.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "simd/instruction_set.h"

namespace moevlm {

namespace pairs { extern const Kernels kernels; }
namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }

namespace {

// Enough tasks that the threads of a large machine share the work of a single sequence.
constexpr int64_t kTasks = 64;
// A piece of the cache that is worth a task of its own: some ten microseconds, and more where a task's rows are many.
constexpr int64_t kPiece = 256, kPieceForMany = 1024;
constexpr int64_t kAppended = 16;  // tokens

// The widest vectors that divide a head.
const Kernels& kernels_for(int64_t head_dim) {
#if defined(__x86_64__)
  const InstructionSet set = instruction_set();
  if (set >= InstructionSet::avx512 && head_dim % avx512::kernels.lanes == 0) return avx512::kernels;
  if (set >= InstructionSet::avx2 && head_dim % avx2::kernels.lanes == 0) return avx2::kernels;
#endif
  return head_dim % baseline::kernels.lanes == 0 ? baseline::kernels : pairs::kernels;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A tile is a task's tokens, a share its heads of a group, a piece its part of the cache. The tasks of a tile and share
// leave partial results, and whoever is last joins them.
struct Plan {
  const Attention& call;
  const Kernels& kernels;
  int64_t heads, shares;  // per group
  int64_t tokens, tiles;  // per sequence and share
  int64_t entries, pieces;
  std::unique_ptr<float[]> partials;
  std::unique_ptr<std::atomic<int64_t>[]> done;

  explicit Plan(const Attention& call) : call(call), kernels(kernels_for(call.head_dim)) {
    shares = divide_up(call.group(), kTaskHeads);
    heads = divide_up(call.group(), shares);
    tokens = std::min(call.length, tile_rows(call.head_dim) / heads);
    tiles = divide_up(call.length, tokens);
    const int64_t longest = *std::max_element(call.position, call.position + call.batch) + call.length;
    const int64_t least = tokens * heads > kTaskHeads ? kPieceForMany : kPiece;
    const int64_t wanted = std::min(divide_up(longest, least), divide_up(kTasks, units()));
    entries = divide_up(divide_up(longest, wanted), 64) * 64;
    pieces = divide_up(longest, entries);
    if (pieces > 1) {
      partials.reset(new float[units() * pieces * partial_floats()]);
      done.reset(new std::atomic<int64_t>[units()]());
    }
  }

  bool appends_first() const { return tiles > 1 || shares > 1; }
  int64_t units() const { return call.batch * call.kv_heads * shares * tiles; }
  int64_t partial_floats() const { return Partial::floats(tokens * heads, call.head_dim); }

  void run_append(int64_t i) const {
    const int64_t chunks = divide_up(call.length, kAppended), head = i / chunks;
    const int64_t token = i % chunks * kAppended;
    kernels.append(
      call, head / call.kv_heads, head % call.kv_heads, token, std::min(kAppended, call.length - token));
  }

  void run_task(int64_t i) const {
    const int64_t unit = i / pieces, piece = i % pieces;
    // The last tile sees the most entries, so it starts first.
    const int64_t tiled = call.batch * call.kv_heads * shares;
    const int64_t tile = tiles - 1 - unit / tiled, group = unit % tiled / shares;
    const int64_t first_head = unit % shares * heads;  // of the group
    Task task = {};
    task.sequence = group / call.kv_heads;
    task.kv_head = group % call.kv_heads;
    task.head = task.kv_head * call.group() + first_head;
    task.heads = std::min(heads, call.group() - first_head);
    task.token = tile * tokens;
    task.tokens = std::min(tokens, call.length - task.token);
    const int64_t seen = call.position[task.sequence] + task.token + task.tokens;
    task.begin = piece * entries;
    task.end = std::min(task.begin + entries, seen);
    task.append = !appends_first();
    if (task.begin >= task.end) return;
    const int64_t count = divide_up(seen, entries);
    float* first = count > 1 ? partials.get() + unit * pieces * partial_floats() : nullptr;
    const int64_t apart = Partial::floats(task.rows(), call.head_dim);
    task.partial = first ? first + piece * apart : nullptr;
    kernels.attend(call, task);
    if (first && done[unit].fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
      kernels.combine(call, task, first, count);
    }
  }
};

}  // namespace

void attend(const Attention& call, const Pool& pool) {
  if (call.batch == 0 || call.length == 0) return;
  Plan plan(call);
  if (plan.appends_first()) {
    parallel_for(pool, call.batch * call.kv_heads * divide_up(call.length, kAppended),
                 [&](size_t i) { plan.run_append(static_cast<int64_t>(i)); });
  }
  parallel_for(pool, plan.units() * plan.pieces, [&](size_t i) { plan.run_task(static_cast<int64_t>(i)); });
}

}  // namespace moevlm
