// The attention kernels for one instruction set: a file that includes this defines MOEVLM_ISA (a name), MOEVLM_LANES
// (floats in a vector) and MOEVLM_TILE_M (rows of the register tile), and has the compiler target set.
//
// A task with few rows (decode) waits for memory: it reads each key and value once, in the cache's order, for all
// rows. A task with many (prefill) waits for the multipliers: keys are transposed, and int8 turned to floats, once
// per block, and both products run in a register tile.

#include "vector.h"

#include <cmath>

#include "attention.h"

namespace moevlm::MOEVLM_ISA {

constexpr float kNothing = -1e30f;  // the score of an entry that a row does not see: its weight is exactly 0
constexpr int64_t kFewRows = 16, kFewRowsBlock = 256;
// Rows of float fill whole lines and processors foresee them, read in order. Rows of int8 end within a line, and are
// short enough that several are read side by side: those are asked for so many bytes ahead.
constexpr int64_t kAhead = 4096;
constexpr int64_t kPanel = 2 * kLanes;  // keys in a panel of the transposed block
constexpr int64_t kBlock = 64, kBlockFloats = 64 * 128;

template <int N>
struct Constant {
    static constexpr int value = N;
};

// The rows of one head's cache: each either head_dim floats, or head_dim int8 and their scale.
template <class T>
struct Rows {
    static constexpr bool quantized = sizeof(T) == 1;

    T* first;
    int64_t stride;  // in elements

    Rows(const Attention& call, void* cache, int64_t sequence, int64_t kv_head)
        : stride(quantized ? call.head_dim + 4 : call.head_dim) {
        first = static_cast<T*>(cache) + (sequence * call.kv_heads + kv_head) * call.capacity * stride;
    }

    T* row(int64_t entry) const { return first + entry * stride; }

    float scale(int64_t entry) const {
        if constexpr (!quantized) return 1;
        float value;
        std::memcpy(&value, row(entry) + stride - 4, sizeof value);
        return value;
    }
};

// out = x, normalised if there are weights, rotated, and scaled.
inline void prepare(
    const Attention& call, const float* x, const float* norm, int64_t row, float scale, float* __restrict out) {
    const int64_t size = call.head_dim, half = call.rotary_dim / 2;
    if (norm) {
        Vec squares = {};
        for (int64_t d = 0; d < size; d += kLanes) squares += load(x + d) * load(x + d);
        const float factor = scale / std::sqrt(sum(squares) / static_cast<float>(size) + call.epsilon);
        for (int64_t d = 0; d < size; d += kLanes) store(out + d, load(x + d) * factor * load(norm + d));
    } else {
        for (int64_t d = 0; d < size; d += kLanes) store(out + d, load(x + d) * scale);
    }
    const float *cos = call.cos + row * half, *sin = call.sin + row * half;
    float* __restrict upper = out + half;
    for (int64_t d = 0; d < half; ++d) {
        const float a = out[d], b = upper[d];
        out[d] = a * cos[d] - b * sin[d];
        upper[d] = b * cos[d] + a * sin[d];
    }
}

inline void write_row(const float* x, int64_t size, float* row) { std::memcpy(row, x, size * sizeof(float)); }

inline void write_row(const float* x, int64_t size, int8_t* row) {
    Vec top = {};
    for (int64_t d = 0; d < size; d += kLanes) top = larger(top, larger(load(x + d), -load(x + d)));
    const float most = largest(top), scale = most / 127, inverse = most > 0 ? 127 / most : 0;
    for (int64_t d = 0; d < size; ++d) row[d] = static_cast<int8_t>(std::nearbyint(x[d] * inverse));
    std::memcpy(row + size, &scale, sizeof scale);
}

template <class T>
void append(const Attention& call, int64_t sequence, int64_t kv_head, int64_t token, int64_t tokens) {
    const Rows<T> keys(call, call.key, sequence, kv_head), values(call, call.value, sequence, kv_head);
    const int64_t width = (call.heads + 2 * call.kv_heads) * call.head_dim;
    for (int64_t s = token; s < token + tokens; ++s) {
        const int64_t row = sequence * call.length + s, entry = call.position[sequence] + s;
        const float* k = call.qkv + row * width + (call.heads + kv_head) * call.head_dim;
        alignas(64) float rotated[kMaxHeadDim];
        prepare(call, k, call.k_norm, row, 1, rotated);
        write_row(rotated, call.head_dim, keys.row(entry));
        write_row(k + call.kv_heads * call.head_dim, call.head_dim, values.row(entry));
    }
}

// The rows of a task: their queries, and what is known of their result so far.
struct Tile {
    int64_t rows;  // of the group's heads, token by token
    int64_t size;  // head_dim
    alignas(64) float q[kTileFloats];
    alignas(64) float sums[kTileFloats];
    float top[kTileRows];   // maximum score
    float total[kTileRows]; // sum of weights

    // Queries are scaled so that scores are powers of two. Rows from `rows` on, up to the next multiple of the
    // register tile's, are zero.
    void fill(const Attention& call, const Task& task, int64_t padded) {
        const int64_t group = call.group(), width = (call.heads + 2 * call.kv_heads) * call.head_dim;
        rows = task.tokens * group;
        size = call.head_dim;
        const float scale = 1.44269504f / std::sqrt(static_cast<float>(size));
        for (int64_t t = 0; t < task.tokens; ++t) {
            const int64_t row = task.sequence * call.length + task.token + t;
            for (int64_t g = 0; g < group; ++g) {
                const float* x = call.qkv + row * width + (task.kv_head * group + g) * size;
                prepare(call, x, call.q_norm, row, scale, q + (t * group + g) * size);
            }
        }
        std::memset(q + rows * size, 0, (padded - rows) * size * sizeof(float));
        std::memset(sums, 0, padded * size * sizeof(float));
        for (int64_t r = 0; r < rows; ++r) {
            top[r] = kNothing;
            total[r] = 0;
        }
    }

    // Turns a block's scores of a row into weights, and rescales what was summed before. `seen` of `padded` scores
    // count. key_scale and value_scale belong to an int8 cache.
    template <bool Quantized>
    void weigh(int64_t row, float* scores, int64_t seen, int64_t padded, const float* key_scale,
               const float* value_scale) {
        for (int64_t j = seen > 0 ? seen : 0; j < padded; ++j) scores[j] = kNothing;
        Vec maximum = Vec{} + top[row];
        for (int64_t j = 0; j < padded; j += kLanes) {
            Vec x = load(scores + j);
            if (Quantized) store(scores + j, x = x * load(key_scale + j));
            maximum = larger(maximum, x);
        }
        const float before = top[row], now = largest(maximum);
        if (now <= kNothing) {  // the row sees none of the block
            for (int64_t j = 0; j < padded; j += kLanes) store(scores + j, Vec{});
            return;
        }
        Vec sums_of_weights = {};
        for (int64_t j = 0; j < padded; j += kLanes) {
            const Vec weight = exp2(load(scores + j) - now);
            sums_of_weights += weight;
            store(scores + j, Quantized ? weight * load(value_scale + j) : weight);
        }
        if (now > before) {
            const float factor = exp2(Vec{} + (before - now))[0];
            total[row] *= factor;
            for (int64_t d = 0; d < size; d += kLanes) store(sums + row * size + d, load(sums + row * size + d) * factor);
        }
        top[row] = now;
        total[row] += sum(sums_of_weights);
    }

    void finish(const Attention& call, const Task& task) const {
        if (task.partial) {
            std::memcpy(task.partial, sums, rows * size * sizeof(float));
            std::memcpy(task.partial + rows * size, top, rows * sizeof(float));
            std::memcpy(task.partial + rows * (size + 1), total, rows * sizeof(float));
            return;
        }
        const int64_t group = call.group();
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t row = task.sequence * call.length + task.token + r / group;
            float* y = call.y + (row * call.heads + task.kv_head * group + r % group) * size;
            const float factor = 1 / total[r];
            for (int64_t d = 0; d < size; d += kLanes) store(y + d, load(sums + r * size + d) * factor);
        }
    }
};

// scores[M][count] = q[M][size] . keys. May write up to kLanes - 1 scores too many.
template <int M, class T>
void dot(const float* q, const T* keys, int64_t stride, int64_t count, int64_t size, float* scores, int64_t ahead) {
    constexpr int K = kLanes / M;
    for (int64_t j = 0; j < count; j += K) {
        const T* key[K];
        Vec sums[kLanes] = {};
#pragma GCC unroll 16
        for (int k = 0; k < K; ++k) key[k] = keys + (j + k < count ? j + k : count - 1) * stride;
        if constexpr (sizeof(T) == 1) {
            for (int64_t d = 0; d < size; d += kLanes) {
                Vec x[K];
#pragma GCC unroll 16
                for (int k = 0; k < K; ++k) x[k] = load(key[k] + d);
#pragma GCC unroll 16
                for (int m = 0; m < M; ++m) {
                    const Vec row = load(q + m * size + d);
#pragma GCC unroll 16
                    for (int k = 0; k < K; ++k) sums[m * K + k] += row * x[k];
                }
            }
#pragma GCC unroll 16
            for (int k = 0; k < K; ++k) {
                for (int64_t d = 0; d < size; d += 64) prefetch(key[k] + d, kAhead);
            }
        } else {
#pragma GCC unroll 16
            for (int k = 0; k < K; ++k) {
                for (int64_t d = 0; d < size; d += kLanes) {
                    const Vec x = load(key[k] + d);
#pragma GCC unroll 16
                    for (int m = 0; m < M; ++m) sums[m * K + k] += load(q + m * size + d) * x;
                }
            }
        }
        alignas(64) float result[kLanes];
        store(result, lane_sums(sums));
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) std::memcpy(scores + m * ahead + j, result + m * K, K * sizeof(float));
    }
}

// sums[M][size] += weights[M][count] times values[count][size], in strips of as many vectors as registers hold.
template <int M, int N, int64_t Ahead, class T>
void add_values(const float* weights, int64_t weights_stride, const T* values, int64_t stride, int64_t count,
                int64_t size, float* sums) {
    int64_t d = 0;
    for (; d + N * kLanes <= size; d += N * kLanes) {
        multiply<M, N, true, Ahead>(weights, weights_stride, values + d, stride, sums + d, size, count);
    }
    for (; d < size; d += kLanes) {
        multiply<M, 1, true, Ahead>(weights, weights_stride, values + d, stride, sums + d, size, count);
    }
}

template <class T>
void attend_few_rows(const Attention& call, const Task& task) {
    const Rows<T> keys(call, call.key, task.sequence, task.kv_head), values(call, call.value, task.sequence, task.kv_head);
    constexpr int64_t ahead = kFewRowsBlock + kLanes;
    Tile tile;
    alignas(64) float scores[kFewRows * ahead], key_scale[kFewRowsBlock], value_scale[kFewRowsBlock];
    tile.fill(call, task, task.tokens * call.group());
    const int64_t size = tile.size;
    for (int64_t begin = task.begin; begin < task.end; begin += kFewRowsBlock) {
        const int64_t count = task.end - begin < kFewRowsBlock ? task.end - begin : kFewRowsBlock;
        const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
        int64_t r = 0;
        const auto dots = [&](auto m) {
            constexpr int M = decltype(m)::value;
            for (; r + M <= tile.rows; r += M) {
                dot<M>(tile.q + r * size, keys.row(begin), keys.stride, count, size, scores + r * ahead, ahead);
            }
        };
        dots(Constant<4>()), dots(Constant<2>()), dots(Constant<1>());
        if (Rows<T>::quantized) {
            for (int64_t j = 0; j < padded; ++j) {
                key_scale[j] = j < count ? keys.scale(begin + j) : 0;
                value_scale[j] = j < count ? values.scale(begin + j) : 0;
            }
        }
        for (r = 0; r < tile.rows; ++r) {
            const int64_t last = call.position[task.sequence] + task.token + r / call.group();
            const int64_t seen = last + 1 - begin < count ? last + 1 - begin : count;
            tile.weigh<Rows<T>::quantized>(r, scores + r * ahead, seen, padded, key_scale, value_scale);
        }
        // Few enough values at a time that all rows find them in the first-level cache.
        constexpr int64_t some = 32;
        constexpr int sums = kLanes == 16 ? 16 : 8;  // vectors of the result in registers
        for (int64_t j = 0; j < count; j += some) {
            const int64_t part = count - j < some ? count - j : some;
            const T* first = values.row(begin + j);
            r = 0;
            const auto add = [&](auto m, auto n) {
                constexpr int M = decltype(m)::value, N = decltype(n)::value;
                for (; r + M <= tile.rows; r += M) {
                    const float* weights = scores + r * ahead + j;
                    float* result = tile.sums + r * size;
                    if (Rows<T>::quantized && r == 0) {
                        add_values<M, N, kAhead>(weights, ahead, first, values.stride, part, size, result);
                    } else {
                        add_values<M, N, 0>(weights, ahead, first, values.stride, part, size, result);
                    }
                }
            };
            // Two rows rather than four where that takes a value of floats from end to end, in order.
            if (Rows<T>::quantized || size < sums / 2 * kLanes) add(Constant<4>(), Constant<sums / 4>());
            add(Constant<2>(), Constant<sums / 2>()), add(Constant<1>(), Constant<sums>());
        }
    }
    tile.finish(call, task);
}

// panels[count / kPanel][size][kPanel] = keys[count][size] transposed, with zeros for the keys that fill the last one.
template <class T>
void pack_keys(const Rows<T>& keys, int64_t begin, int64_t count, int64_t size, float* panels) {
    for (int64_t first = 0; first < count; first += kLanes) {
        float* panel = panels + first / kPanel * kPanel * size + first % kPanel;
        for (int64_t d = 0; d < size; d += kLanes) {
            Vec square[kLanes];
#pragma GCC unroll 16
            for (int j = 0; j < kLanes; ++j) {
                square[j] = first + j < count ? load(keys.row(begin + first + j) + d) : Vec{};
            }
            transpose(square);
#pragma GCC unroll 16
            for (int j = 0; j < kLanes; ++j) store(panel + (d + j) * kPanel, square[j]);
        }
    }
    if ((count + kLanes - 1) / kLanes % 2) {
        float* panel = panels + count / kPanel * kPanel * size + kLanes;
        for (int64_t d = 0; d < size; ++d) store(panel + d * kPanel, Vec{});
    }
}

template <class T>
void attend_many_rows(const Attention& call, const Task& task) {
    constexpr int M = MOEVLM_TILE_M;
    const Rows<T> keys(call, call.key, task.sequence, task.kv_head), values(call, call.value, task.sequence, task.kv_head);
    constexpr int64_t ahead = kBlock;
    Tile tile;
    alignas(64) float scores[kTileRows * ahead], panels[kBlockFloats], floats[Rows<T>::quantized ? kBlockFloats : 1];
    alignas(64) float key_scale[kBlock], value_scale[kBlock];
    tile.fill(call, task, (task.tokens * call.group() + M - 1) / M * M);
    const int64_t size = tile.size, fits = kBlockFloats / size / kPanel * kPanel;
    const int64_t block = fits < kBlock ? fits : kBlock;
    const int64_t position = call.position[task.sequence] + task.token;
    for (int64_t begin = task.begin; begin < task.end; begin += block) {
        const int64_t count = task.end - begin < block ? task.end - begin : block;
        const int64_t padded = (count + kPanel - 1) / kPanel * kPanel;
        // Tokens before the block's first entry see nothing of it.
        const int64_t from = begin > position ? (begin - position) * call.group() / M * M : 0;
        // How many of the block's entries the last of the M rows from r on sees.
        const auto seen_from = [&](int64_t r) {
            const int64_t row = r + M < tile.rows ? r + M - 1 : tile.rows - 1;
            const int64_t seen = position + row / call.group() + 1 - begin;
            return seen < count ? seen : count;
        };
        pack_keys(keys, begin, count, size, panels);
        for (int64_t j = 0; j < padded; j += kPanel) {
            for (int64_t r = from; r < tile.rows; r += M) {
                if (j >= seen_from(r)) continue;
                multiply<M, 2, false>(tile.q + r * size, size, panels + j * size, kPanel, scores + r * ahead + j, ahead, size);
            }
        }
        if (Rows<T>::quantized) {
            for (int64_t j = 0; j < padded; ++j) {
                key_scale[j] = j < count ? keys.scale(begin + j) : 0;
                value_scale[j] = j < count ? values.scale(begin + j) : 0;
            }
            for (int64_t j = 0; j < count; ++j) {
                for (int64_t d = 0; d < size; d += kLanes) store(floats + j * size + d, load(values.row(begin + j) + d));
            }
        }
        for (int64_t r = from; r < tile.rows; ++r) {
            const int64_t seen = position + r / call.group() + 1 - begin;
            tile.weigh<Rows<T>::quantized>(
                r, scores + r * ahead, seen < count ? seen : count, padded, key_scale, value_scale);
        }
        const float* first = Rows<T>::quantized ? floats : reinterpret_cast<const float*>(values.row(begin));
        int64_t d = 0;
        const auto add = [&](auto n) {
            constexpr int N = decltype(n)::value;
            for (; d + N * kLanes <= size; d += N * kLanes) {
                for (int64_t r = from; r < tile.rows; r += M) {
                    multiply<M, N, true>(scores + r * ahead, ahead, first + d, size, tile.sums + r * size + d, size, seen_from(r));
                }
            }
        };
        add(Constant<2>()), add(Constant<1>());
    }
    tile.finish(call, task);
}

template <class T>
void attend(const Attention& call, const Task& task) {
    if (task.append) {
        const int64_t position = call.position[task.sequence];
        const int64_t first = task.begin > position ? task.begin : position;
        if (first < task.end) append<T>(call, task.sequence, task.kv_head, first - position, task.end - first);
    }
    if (task.tokens * call.group() <= kFewRows) {
        attend_few_rows<T>(call, task);
    } else {
        attend_many_rows<T>(call, task);
    }
}

inline void combine(const Attention& call, const Task& task, const float* partials, int64_t count) {
    const int64_t size = call.head_dim, group = call.group(), rows = task.tokens * group;
    const int64_t apart = Partial::floats(rows, size);
    for (int64_t r = 0; r < rows; ++r) {
        float top = kNothing;
        for (int64_t i = 0; i < count; ++i) {
            const float other = partials[i * apart + rows * size + r];
            top = other > top ? other : top;
        }
        const int64_t row = task.sequence * call.length + task.token + r / group;
        float* y = call.y + (row * call.heads + task.kv_head * group + r % group) * size;
        float total = 0;
        for (int64_t d = 0; d < size; d += kLanes) store(y + d, Vec{});
        for (int64_t i = 0; i < count; ++i) {
            const float* partial = partials + i * apart;
            const float factor = exp2(Vec{} + (partial[rows * size + r] - top))[0];
            total += factor * partial[rows * (size + 1) + r];
            for (int64_t d = 0; d < size; d += kLanes) store(y + d, load(y + d) + load(partial + r * size + d) * factor);
        }
        const float factor = 1 / total;
        for (int64_t d = 0; d < size; d += kLanes) store(y + d, load(y + d) * factor);
    }
}

inline void append(const Attention& call, int64_t sequence, int64_t kv_head, int64_t token, int64_t tokens) {
    (call.quantized ? append<int8_t> : append<float>)(call, sequence, kv_head, token, tokens);
}

inline void attend(const Attention& call, const Task& task) {
    (call.quantized ? attend<int8_t> : attend<float>)(call, task);
}

extern const Kernels kernels;
const Kernels kernels = {kLanes, append, attend, combine};

}  // namespace moevlm::MOEVLM_ISA
