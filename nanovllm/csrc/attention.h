// Attention over pages, for prompt chunks and decoding sequences in one call.
//
// The rows of a task are the queries (token, query head) that read one key/value head, up to ROWS of
// them, whatever tokens they belong to. Keys are walked in spans of SPAN at absolute positions: a span
// gives each row its largest score, its sum and its weighted values, and spans are merged in order.
// So a row's bits depend on its own keys alone, however a prompt is cut and whoever shares the task,
// and spans may be computed by different threads.
//
// Keys and values lie as [page][head][page size / 16] tiles, which `step` multiplies as they are, or widened
// (kv_formats.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "kv_formats.h"
#include "rows.h"

namespace {

using namespace nanovllm;

constexpr int SPAN = 256;  // keys
constexpr int TILE_VECTORS = TILE / WIDTH;
constexpr int ROWS = 14;
constexpr int FETCH_ROWS = 6;  // with more, there is more to compute than to fetch
constexpr float UNSEEN = -std::numeric_limits<float>::infinity();

// --- what a task works with --------------------------------------------------------------------

// Where one key/value head of a sequence lies.
struct Pages {
    const char *keys, *values;                                    // of this head in page 0
    int64_t page_bytes;                                           // from a page to the next
    const int32_t* table;
    int64_t page_size, row_bytes;  // of a token's keys or values

    // position: a multiple of TILE
    const char* at(const char* base, int64_t position) const {
        return base + table[position / page_size] * page_bytes + position % page_size * row_bytes;
    }
};

// The keys [first, last) of a span: where each tile of them lies, and of their values. Offsets are from
// the span's start, and the first key is that of a tile.
struct Span {
    int64_t start, first, last;
    const char *keys[SPAN / TILE], *values[SPAN / TILE];

    // of the span that starts there, what lies in [first_key, last_key)
    Span(const Pages& pages, int64_t start, int64_t first_key, int64_t last_key)
        : start(start),
          first(std::max<int64_t>(0, first_key - start) / TILE * TILE),
          last(std::min<int64_t>(SPAN, last_key - start)) {
        for (int64_t i = 0; i < tiles(); ++i) {
            keys[i] = pages.at(pages.keys, start + first + i * TILE);
            values[i] = pages.at(pages.values, start + first + i * TILE);
        }
    }

    int64_t tiles() const { return divide_up(last - first, TILE); }
    int64_t offset(int64_t tile) const { return first + tile * TILE; }
};

struct Row {
    int64_t position, first;  // it sees the keys [first, position]
    float slope;
    float unit;  // of its scores, before what the keys are multiplied by
    float* out;
};

// Up to ROWS queries that read the same head of the same sequence.
template <class W>
struct Task {
    static constexpr int64_t STRIDE = MAX_HEAD / W::K_PER_STEP * W::PER_STEP;
    Pages pages;
    int64_t head_dim;
    int count;
    int64_t first_key, last_key;  // [first, last) that any of the rows sees
    Row rows[ROWS];
    alignas(64) typename W::Element q[ROWS][STRIDE];
};

// What a row has of some keys: the largest score, the sum of the weights relative to it, and the sum
// of the values by these weights.
struct Gathered {
    float largest, total;
    alignas(64) float values[MAX_HEAD];
};

template <class W>
struct Scratchpad {
    static constexpr int64_t STRIDE = SPAN / W::K_PER_STEP * W::PER_STEP;
    alignas(64) float scores[ROWS][SPAN];
    alignas(64) typename W::Element weights[ROWS][STRIDE];
    float units[ROWS];  // that weights are multiples of
};

// --- products ------------------------------------------------------------------------------------

// scores[row][key] of N tiles of keys from the `tile`th on. Meanwhile their values are fetched.
template <class W, int R, int N>
void score_tiles(const typename W::Element* q, const Span& span, int64_t tile, int64_t head_dim, float* scores) {
    constexpr int NV = N * TILE_VECTORS;
    constexpr int64_t STEP_BYTES = TILE_VECTORS * W::VECTOR_BYTES;
    typename W::Sum acc[R][NV] = {};
    const int64_t steps = head_dim / W::K_PER_STEP;
    for (int64_t d = 0; d < steps; ++d) {
        V b[NV];
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j)
            b[j] = W::vector(span.keys[tile + j / TILE_VECTORS] + d * STEP_BYTES + j % TILE_VECTORS * W::VECTOR_BYTES);
        if (R <= FETCH_ROWS && d * STEP_BYTES % 64 == 0)
            for (int j = 0; j < N; ++j) __builtin_prefetch(span.values[tile + j] + d * STEP_BYTES, 0, W::SCALED ? 3 : 2);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) W::template step<NV>(acc[i], b, q + i * Task<W>::STRIDE + d * W::PER_STEP);
    }
    scores += span.offset(tile);
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
        const char* scales = span.keys[tile + j / TILE_VECTORS] + steps * STEP_BYTES + j % TILE_VECTORS * sizeof(V);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) store(scores + i * SPAN + j * WIDTH, W::score(acc[i][j], scales));
    }
}

// values[row][dim] of N vectors of dimensions from `dim` on, the last one `lanes` wide, summed over a
// span's keys. Meanwhile the keys are fetched that are needed next, if any.
template <class W, int R, int N>
void sum_values(const typename W::Element* weights, const float* units, const Span& span, int64_t head_dim, int64_t dim,
                int64_t lanes, const Span* next, Gathered* to) {
    constexpr int64_t DIM_BYTES = W::VECTOR_BYTES / WIDTH;  // of a step
    typename W::Sum acc[R][N] = {};
    const int64_t to_fetch = R <= FETCH_ROWS && next != nullptr ? next->tiles() : 0;
    for (int64_t tile = 0; tile < span.tiles(); ++tile) {
        const char* v = span.values[tile] + dim * DIM_BYTES;
        const char* fetched = tile < to_fetch ? next->keys[tile] + dim * DIM_BYTES : v;
        const int64_t steps = divide_up(std::min<int64_t>(TILE, span.last - span.offset(tile)), W::K_PER_STEP);
        const typename W::Element* w = weights + span.offset(tile) / W::K_PER_STEP * W::PER_STEP;
        for (int64_t k = 0; k < steps; ++k, v += head_dim * DIM_BYTES, w += W::PER_STEP) {
            if constexpr (R <= FETCH_ROWS) {
                for (int j = 0; j < N * W::VECTOR_BYTES; j += 64) __builtin_prefetch(fetched + j, 0, W::SCALED ? 3 : 2);
                fetched += head_dim * DIM_BYTES;
            }
            V b[N];
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j)
                b[j] = j + 1 < N || lanes == WIDTH ? W::vector(v + j * W::VECTOR_BYTES)
                                                   : W::vector_part(v + j * W::VECTOR_BYTES, lanes);
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i) W::template step<N>(acc[i], b, w + i * Scratchpad<W>::STRIDE);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) store(to[i].values + dim + j * WIDTH, W::value(acc[i][j], units[i]));
}

template <class W, int R>
void span_scores(const Task<W>& task, int row, const Span& span, Scratchpad<W>& pad) {
    constexpr int N = WIDTH == 16 ? (R > 6 ? 2 : 4) : 1;
    if (W::SCALED && R <= FETCH_ROWS)
        for (int64_t i = 0; i < span.tiles(); ++i) __builtin_prefetch(span.values[i] + TILE * task.head_dim);
    int64_t tile = 0;
    for (; tile + N <= span.tiles(); tile += N)
        score_tiles<W, R, N>(task.q[row], span, tile, task.head_dim, pad.scores[row]);
    for (; tile < span.tiles(); ++tile)
        score_tiles<W, R, 1>(task.q[row], span, tile, task.head_dim, pad.scores[row]);
}

template <class W, int R>
void span_values(const Task<W>& task, int row, const Span& span, const Scratchpad<W>& pad, const Span* next,
                 Gathered* to) {
    constexpr int N = WIDTH == 16 ? (R > 6 ? 2 : 4) : 2;
    const int64_t head_dim = task.head_dim;
    if (W::SCALED && R <= FETCH_ROWS && next != nullptr)
        for (int64_t i = 0; i < next->tiles(); ++i) __builtin_prefetch(next->keys[i] + TILE * head_dim);
    int64_t dim = 0;
    for (; dim + N * WIDTH <= head_dim; dim += N * WIDTH)
        sum_values<W, R, N>(pad.weights[row], pad.units + row, span, head_dim, dim, WIDTH, next, to + row);
    for (; dim < head_dim; dim += WIDTH)
        sum_values<W, R, 1>(pad.weights[row], pad.units + row, span, head_dim, dim,
                            std::min<int64_t>(WIDTH, head_dim - dim), next, to + row);
}

// f(R, first row) for all rows in groups of as many as the registers hold. R may exceed the rows that are
// left; what is computed for these is not used.
template <class F>
void in_groups(int count, F f) {
    constexpr int most = WIDTH == 16 ? ROWS : 4;
    for (int first = 0; first < count; first += most) {
        const int left = std::min(most, count - first);
        if (left <= 1) f(std::integral_constant<int, 1>(), first);
        else if (left <= 2) f(std::integral_constant<int, 2>(), first);
        else if (left <= 3) f(std::integral_constant<int, 3>(), first);
        else if (left <= 4) f(std::integral_constant<int, 4>(), first);
        else if constexpr (most > 4) {
            if (left <= 6) f(std::integral_constant<int, 6>(), first);
            else if (left <= 8) f(std::integral_constant<int, 8>(), first);
            else if (left <= 10) f(std::integral_constant<int, 10>(), first);
            else if (left <= 12) f(std::integral_constant<int, 12>(), first);
            else f(std::integral_constant<int, 14>(), first);
        }
    }
}

// --- a row's softmax, and how spans come together ---------------------------------------------------

inline float to_bf16(float x) { return round_to_bf16(splat(x))[0]; }

inline V lane_numbers() {
    V v;
    for (int i = 0; i < WIDTH; ++i) v[i] = i;
    return v;
}

// From scores to the exponents of weights.
struct Softmax {
    float scale;
    bool rounded;  // ALiBi: see attention/alibi.py
    float factor;

    static constexpr float LOG2_E = 1.44269504f;  // weights are powers of two, one operation less than of e

    float exponent_scale(const Row& row) const { return row.slope == 0.0f ? scale * row.unit * LOG2_E : LOG2_E; }

    // the scores of the keys at these positions, scaled and biased
    V with_bias(const Row& row, V scores, V keys) const {
        if (rounded) return scores * (scale * row.unit) + factor * round_to_bf16(to_bf16(row.slope) * round_to_bf16(keys));
        return scores * (scale * row.unit) + factor * row.slope * (keys - (float)row.position);
    }
};

// A span's scores into weights relative to the largest: zero for keys that the row does not see, and up to
// the end of the last tile. `largest` is an exponent of two.
template <class W>
void span_softmax(const Task<W>& task, int index, const Softmax& softmax, const Span& span, Scratchpad<W>& pad, Gathered& to) {
    const Row& row = task.rows[index];
    float* scores = pad.scores[index];
    const int64_t from = std::max(row.first - span.start, span.first);
    const int64_t until = std::min(row.position + 1 - span.start, span.last);
    const int64_t end = divide_up(span.last, TILE) * TILE;
    auto put = [&](int64_t i, V v) { W::put(v, pad.weights[index] + i / W::K_PER_STEP * W::PER_STEP); };
    auto scales = [&](int64_t i) {  // of the values of a vector of keys
        return load(span.values[(i - span.first) / TILE] + TILE * task.head_dim * W::BYTES + i % TILE * sizeof(float));
    };
    to.largest = UNSEEN;
    to.total = 0;
    if (from >= until) {
        for (int64_t i = span.first; i < end; i += WIDTH) put(i, V{});
        return;
    }
    const int64_t begin = from / WIDTH * WIDTH, stop = divide_up(until, WIDTH) * WIDTH;
    if (row.slope != 0.0f)
        for (int64_t i = begin; i < stop; i += WIDTH)
            store(scores + i, softmax.with_bias(row, load(scores + i), lane_numbers() + (float)(span.start + i)));
    auto hide = [&](int64_t i) {  // what the row does not see of a vector
        const V key = lane_numbers() + (float)i;
        store(scores + i, ((key >= (float)from) & (key < (float)until)) ? load(scores + i) : splat(UNSEEN));
    };
    if (begin < from) hide(begin);
    if (stop > until) hide(stop - WIDTH);
    V most = splat(UNSEEN);
    for (int64_t i = begin; i < stop; i += WIDTH) {
        const V s = load(scores + i);
        most = s > most ? s : most;
    }
    const float scale = softmax.exponent_scale(row);
    to.largest = scale * reduce(most, [](float a, float b) { return b > a ? b : a; });
    V total = {}, most_scaled = {};
    for (int64_t i = span.first; i < begin; i += WIDTH) put(i, V{});
    for (int64_t i = begin; i < stop; i += WIDTH) {
        const V s = load(scores + i);
        const bool partly = i < from || i + WIDTH > until;
        V weight = exp2_below(s * scale - to.largest);
        if (partly) weight = s == UNSEEN ? V{} : weight;
        if constexpr (W::SCALED) {
            V scaled = weight * scales(i);
            if (partly) scaled = s == UNSEEN ? V{} : scaled;
            store(scores + i, scaled);
            most_scaled = scaled > most_scaled ? scaled : most_scaled;
        } else {
            put(i, weight);
        }
        total += weight;
    }
    if constexpr (W::SCALED) {
        const float most = reduce(most_scaled, [](float a, float b) { return b > a ? b : a; });
        const float factor = W::MOST / std::max(most, W::LEAST);
        for (int64_t i = begin; i < stop; i += WIDTH) put(i, load(scores + i) * factor);
        pad.units[index] = most / W::MOST;
    }
    for (int64_t i = stop; i < end; i += WIDTH) put(i, V{});
    to.total = sum(total);
}

// One span for all rows of a task.
template <class W>
void gather_span(const Task<W>& task, const Softmax& softmax, const Span& span, const Span* next,
                 Scratchpad<W>& pad, Gathered* to) {
    in_groups(task.count, [&](auto rows, int row) { span_scores<W, rows()>(task, row, span, pad); });
    for (int i = 0; i < task.count; ++i)
        span_softmax<W>(task, i, softmax, span, pad, to[i]);
    in_groups(task.count, [&](auto rows, int row) { span_values<W, rows()>(task, row, span, pad, next, to); });
}

// Add a later span to what there is.
inline void merge(Gathered& all, const Gathered& span, int64_t head_dim) {
    if (span.total == 0.0f) return;  // it saw nothing
    if (all.total == 0.0f) {
        all.largest = span.largest, all.total = span.total;
        memcpy(all.values, span.values, head_dim * sizeof(float));
        return;
    }
    const float change = span.largest - all.largest;
    const float less = exp2_below(splat(change > 0.0f ? -change : change))[0];
    const float before = change > 0.0f ? less : 1.0f, now = change > 0.0f ? 1.0f : less;
    all.total = all.total * before + span.total * now;
    all.largest = std::max(all.largest, span.largest);
    for (int64_t d = 0; d < head_dim; d += WIDTH)
        store(all.values + d, load(all.values + d) * before + load(span.values + d) * now);
}

inline void finish(const Row& row, const Gathered& all, int64_t head_dim) {
    const float scale = 1.0f / all.total;
    int64_t d = 0;
    for (; d + WIDTH <= head_dim; d += WIDTH) store(row.out + d, load(all.values + d) * scale);
    if (d < head_dim) store_part(row.out + d, load(all.values + d) * scale, head_dim - d);
}

// --- a step ------------------------------------------------------------------------------------------

// Which tasks there are: those of all heads of the first sequence, then of the second, ...
struct Tasks {
    const AttentionCall& call;
    std::vector<int64_t> begin;  // [batch + 1]

    explicit Tasks(const AttentionCall& c) : call(c), begin(c.batch + 1) {
        for (int64_t b = 0; b < c.batch; ++b) begin[b + 1] = begin[b] + c.kv_heads * tasks_a_head(b);
    }

    int64_t count() const { return begin.back(); }
    int64_t rows_a_head(int64_t b) const {
        return (call.query_start[b + 1] - call.query_start[b]) * (call.heads / call.kv_heads);
    }
    int64_t tasks_a_head(int64_t b) const { return divide_up(rows_a_head(b), ROWS); }

    int64_t sequence(int64_t index) const {
        return std::upper_bound(begin.begin(), begin.end(), index) - begin.begin() - 1;
    }

    template <class W>
    Pages pages(int64_t b, int64_t kv_head) const {
        const int64_t row_bytes = call.head_dim * W::BYTES + W::SCALE_BYTES, head_bytes = call.page_size * row_bytes;
        return {(const char*)call.keys + kv_head * head_bytes, (const char*)call.values + kv_head * head_bytes,
                call.kv_heads * head_bytes, call.tables + b * call.table_stride, call.page_size, row_bytes};
    }

    template <class W>
    void prepare(int64_t index, Task<W>& task) const {
        const int64_t b = sequence(index), of_head = tasks_a_head(b), kv_head = (index - begin[b]) / of_head;
        const int64_t row0 = (index - begin[b]) % of_head * ROWS, group = call.heads / call.kv_heads;
        const int64_t queries = call.query_start[b + 1] - call.query_start[b];
        task.pages = pages<W>(b, kv_head);
        task.head_dim = call.head_dim;
        task.count = std::min<int64_t>(ROWS, rows_a_head(b) - row0);
        for (int i = 0; i < task.count; ++i) {
            const int64_t token = (row0 + i) / group, head = kv_head * group + (row0 + i) % group;
            const int64_t position = call.seq_lens[b] - queries + token, t = call.query_start[b] + token;
            const int64_t first = call.window > 0 ? std::max<int64_t>(0, position - call.window + 1) : 0;
            const float unit = W::copy_query(call.q + t * call.q_stride + head * call.head_dim, task.q[i], call.head_dim);
            task.rows[i] = {position, first, call.slopes ? call.slopes[head] : 0.0f, unit,
                            call.out + (t * call.heads + head) * call.head_dim};
        }
        task.first_key = task.rows[0].first;
        task.last_key = task.rows[task.count - 1].position + 1;
    }

    // Towards the cache: the queries of a task and the place of its results.
    void fetch(int64_t index) const {
        const int64_t b = sequence(index), of_head = tasks_a_head(b), kv_head = (index - begin[b]) / of_head;
        const int64_t row0 = (index - begin[b]) % of_head * ROWS, group = call.heads / call.kv_heads;
        const int64_t rows = std::min<int64_t>(ROWS, rows_a_head(b) - row0);
        for (int64_t t = row0 / group; t <= (row0 + rows - 1) / group; ++t) {
            const float* q = call.q + (call.query_start[b] + t) * call.q_stride + kv_head * group * call.head_dim;
            const float* out = call.out + ((call.query_start[b] + t) * call.heads + kv_head * group) * call.head_dim;
            for (int64_t i = 0; i < group * call.head_dim; i += 16) {
                __builtin_prefetch(q + i);
                __builtin_prefetch(out + i, 1);
            }
        }
    }

    // What a task reads first; nothing if there is none.
    template <class W>
    Span beginning(int64_t index, int64_t end) const {
        if (index >= end) return {{}, 0, 0, 0};
        const int64_t b = sequence(index), first_key = call.seq_lens[b] - call.seen(b);
        return {pages<W>(b, (index - begin[b]) / tasks_a_head(b)), first_key / SPAN * SPAN, first_key, call.seq_lens[b]};
    }

    Softmax softmax() const { return {call.scale, call.rounded, call.factor}; }
};

template <class W>
struct Worker {  // of one thread; large, and so not on the stack
    Task<W> task;
    Scratchpad<W> pad;
    Gathered span[ROWS], all[ROWS];
};

template <class W>
Worker<W>& worker() {
    static thread_local std::unique_ptr<Worker<W>> mine = std::make_unique<Worker<W>>();
    return *mine;
}

// The thread goes on to the next task if that is before `end`.
template <class W>
void whole_task(const Tasks& tasks, int64_t index, int64_t end) {
    const int64_t head_dim = tasks.call.head_dim;
    Worker<W>& w = worker<W>();
    tasks.prepare(index, w.task);
    if (index + 1 < end) tasks.fetch(index + 1);
    const int64_t begin = w.task.first_key / SPAN * SPAN, last_key = w.task.last_key;
    Span span(w.task.pages, begin, w.task.first_key, last_key);
    for (;;) {
        const bool more = span.start + SPAN < last_key;
        const Span next = more ? Span(w.task.pages, span.start + SPAN, 0, last_key) : tasks.beginning<W>(index + 1, end);
        gather_span(w.task, tasks.softmax(), span, &next, w.pad, span.start == begin ? w.all : w.span);
        if (span.start > begin)
            for (int i = 0; i < w.task.count; ++i) merge(w.all[i], w.span[i], head_dim);
        if (!more) break;
        span = next;
    }
    for (int i = 0; i < w.task.count; ++i) finish(w.task.rows[i], w.all[i], head_dim);
}

// Too few tasks for the threads: each span of each task is a job of its own, merged in order afterwards.
template <class W>
void by_spans(const Tasks& tasks, int64_t max_spans, Team& team) {
    const AttentionCall& call = tasks.call;
    const int64_t count = tasks.count();
    Gathered* parts = (Gathered*)team.shared(count * max_spans * ROWS * sizeof(Gathered));
    Worker<W>& w = worker<W>();
    team.each(count * max_spans, [&](int64_t job) {
        tasks.prepare(job / max_spans, w.task);
        const int64_t start = (w.task.first_key / SPAN + job % max_spans) * SPAN;
        Gathered* to = parts + job * ROWS;
        if (start < w.task.last_key) {
            const Span span(w.task.pages, start, w.task.first_key, w.task.last_key);
            gather_span<W>(w.task, tasks.softmax(), span, nullptr, w.pad, to);
        } else {
            for (int i = 0; i < w.task.count; ++i) to[i].total = 0;
        }
    });
    team.barrier();
    team.each(count, [&](int64_t index) {
        tasks.prepare(index, w.task);
        Gathered* all = parts + index * max_spans * ROWS;
        for (int64_t s = 1; s < max_spans; ++s)
            for (int i = 0; i < w.task.count; ++i) merge(all[i], all[s * ROWS + i], call.head_dim);
        for (int i = 0; i < w.task.count; ++i) finish(w.task.rows[i], all[i], call.head_dim);
    });
}

template <class W>
void attention(const AttentionCall& call, Team& team) {
    const Tasks tasks(call);
    int64_t longest = 0;
    for (int64_t b = 0; b < call.batch; ++b) longest = std::max(longest, call.seen(b, ROWS));
    const int64_t count = tasks.count(), spans = longest / SPAN + 2;
    if (team.threads > 1 && count < 4 * team.threads && spans > 2) return by_spans<W>(tasks, spans, team);
    const int64_t chunk = std::max<int64_t>(1, count / (8 * team.threads));  // neighbours, each fetching for the next
    team.each(divide_up(count, chunk), [&](int64_t i) {
        const int64_t end = std::min(count, (i + 1) * chunk);
        for (int64_t index = i * chunk; index < end; ++index) whole_task<W>(tasks, index, end);
    });
}

}  // namespace
