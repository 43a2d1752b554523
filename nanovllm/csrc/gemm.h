// Linear layers: rows times a packed weight.
//
// A tile of H rows and NR panels is summed over the whole of k in registers, one product after the
// other, so every element of y is one chain of additions whatever H and NR are. That is what makes
// a row's bits independent of its company; do not split k between threads or accumulators.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels.h"
#include "vec.h"

namespace {

using namespace nanovllm;

constexpr int P = PANEL / WIDTH;  // vectors a panel
constexpr int STEP_BYTES = 128;   // of a pair of panels: 16 pairs of bfloat16 or 16 floats, twice
constexpr int BLOCK = 32;         // steps of a row that lie together in the copy of x
constexpr int64_t SCRATCH_BYTES = 512 << 10;  // of that copy: to stay in the second-level cache

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- the weights' formats: how a row of x is copied, and one step of the sum -------------------

#if defined(__AVX512BF16__)
struct Bf16Weight {  // two products a lane and instruction; x rounded to pairs of bfloat16
    using Element = uint32_t;
    static constexpr int PER_STEP = 1, K_PER_STEP = 2, MAX_ROWS = 14;

    template <int N>
    static inline void step(V* acc, const V* w, const Element* x) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(*x);
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) acc[j] = (V)_mm512_dpbf16_ps((__m512)acc[j], (__m512bh)w[j], pair);
    }

    static inline void put(V x, Element* to) { store_bf16((uint16_t*)to, x); }  // WIDTH elements

    static void copy(const float* x, Element* to, int64_t count) {
        uint16_t* out = (uint16_t*)to;
        int64_t i = 0;
        for (; i + WIDTH <= count; i += WIDTH) store_bf16(out + i, load(x + i));
        if (i < count) {
            uint16_t rest[WIDTH];
            store_bf16(rest, load_part(x + i, count - i));
            memcpy(out + i, rest, (count - i + 1) / 2 * sizeof(Element));  // an odd k gets a zero
        }
    }

    static void copy(const uint16_t* x, Element* to, int64_t count) {
        to[(count - 1) / 2] = 0;
        memcpy(to, x, count * sizeof(uint16_t));
    }
};
#else
struct Bf16Weight {  // widened to float step by step; x rounded the same way
    using Element = float;
    static constexpr int PER_STEP = 2, K_PER_STEP = 2;
    static constexpr int MAX_ROWS = WIDTH == 16 ? 12 : 4;

    template <int N>
    static inline void step(V* acc, const V* w, const Element* x) {
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) {
            acc[j] += (V)((U)w[j] << 16) * x[0];
            acc[j] += (V)((U)w[j] & 0xffff0000u) * x[1];
        }
    }

    static inline void put(V x, Element* to) { store(to, round_to_bf16(x)); }

    static void copy(const float* x, Element* to, int64_t count) {
        int64_t i = 0;
        for (; i + WIDTH <= count; i += WIDTH) store(to + i, round_to_bf16(load(x + i)));
        if (i < count) store_part(to + i, round_to_bf16(load_part(x + i, count - i)), count - i);
        if (count % 2) to[count] = 0;
    }

    static void copy(const uint16_t* x, Element* to, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            const uint32_t bits = (uint32_t)x[i] << 16;
            memcpy(to + i, &bits, sizeof bits);
        }
        if (count % 2) to[count] = 0;
    }
};
#endif

struct F32Weight {
    using Element = float;
    static constexpr int PER_STEP = 1, K_PER_STEP = 1;
    static constexpr int MAX_ROWS = WIDTH == 16 ? 14 : 6;

    template <int N>
    static inline void step(V* acc, const V* w, const Element* x) {
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) acc[j] += w[j] * *x;
    }

    static inline void put(V x, Element* to) { store(to, x); }
    static void copy(const float* x, Element* to, int64_t count) { memcpy(to, x, count * sizeof(float)); }
    static void copy(const uint16_t*, Element*, int64_t) {}  // ops/native.py widens such rows before it calls
};

// --- a tile --------------------------------------------------------------------------------------

// x: [blocks][rows][BLOCK steps], so that all rows are read at constant offsets from one pointer.
// w: at a pair of panels, or at the second of it. Each step fetches a line for each panel from `next`,
// which moves on by next_step: the weights that follow, towards the second-level cache.
template <class W, int ROWS, int PANELS>
void tile(const typename W::Element* x, const char* w, int64_t steps, const char* next, int64_t next_step, float* out) {
    constexpr int N = PANELS * P;
    V acc[ROWS][N] = {};
    for (; steps > 0; steps -= BLOCK, x += ROWS * BLOCK * W::PER_STEP) {
        const int64_t count = std::min<int64_t>(steps, BLOCK);
        for (int64_t s = 0; s < count; ++s, w += STEP_BYTES) {
            V b[N];
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j) b[j] = load(w + j * sizeof(V));
            // with few rows the hardware's own prefetching keeps up, and these would only cost slots
            if constexpr (ROWS > 4) {
#pragma GCC unroll 8
                for (int j = 0; j < PANELS; ++j) __builtin_prefetch(next + j * 64, 0, 2);
                next += next_step;
            }
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; ++i) W::template step<N>(acc[i], b, x + (i * BLOCK + s) * W::PER_STEP);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) store(out + (i * N + j) * WIDTH, acc[i][j]);
}

template <class W>
using Tile = void (*)(const typename W::Element*, const char*, int64_t, const char*, int64_t, float*);

// The tile function for each number of rows from 1.
template <class W, int PANELS, int... I>
constexpr Tile<W> pick_tile(int rows, std::integer_sequence<int, I...>) {
    constexpr Tile<W> tiles[] = {tile<W, I + 1, PANELS>...};
    return tiles[rows - 1];
}

// Two panels in one tile where registers allow it, else one after the other.
template <class W>
void two_panels(int rows, const typename W::Element* x, const char* w, int64_t steps, const char* next,
                int64_t next_step, float* out) {
    constexpr auto all = std::make_integer_sequence<int, W::MAX_ROWS>();
    if constexpr (WIDTH == 16) {
        pick_tile<W, 2>(rows, all)(x, w, steps, next, next_step, out);
    } else {
        float half[2][W::MAX_ROWS][PANEL];
        for (int j = 0; j < 2; ++j) pick_tile<W, 1>(rows, all)(x, w + j * 64, steps, next, next_step, half[j][0]);
        for (int i = 0; i < rows; ++i)
            for (int j = 0; j < 2; ++j) memcpy(out + (2 * i + j) * PANEL, half[j][i], sizeof half[j][i]);
    }
}

// --- what happens to the sums ----------------------------------------------------------------------

inline V activate(Activation act, V x) {
    switch (act) {
        case Activation::SILU:
            return x / (1.0f + exp(-x));
        case Activation::GELU:
            return 0.5f * x * (1.0f + erf(x * 0.70710678f));
        case Activation::GELU_TANH:
            return 0.5f * x * (1.0f + tanh(0.79788456f * (x + 0.044715f * x * x * x)));
        case Activation::RELU:
            return x < 0.0f ? V{} : x;
        default:
            return x;
    }
}

inline void add_bias(float* values, const float* bias, int64_t column, int64_t width) {
    if (bias != nullptr)
        for (int64_t l = 0; l < width; ++l) values[l] += bias[column + l];
}

inline void add_residual(float* values, const float* residual, int64_t width) {
    if (width < PANEL)
        for (int64_t l = 0; l < width; ++l) values[l] += residual[l];
    else
        for (int l = 0; l < PANEL; l += WIDTH) store(values + l, load(values + l) + load(residual + l));
}

// Towards the cache, while the sums are computed.
inline void fetch_residual(const Linear& g, int64_t row, int rows, int64_t pair) {
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < 2; ++j) __builtin_prefetch(g.residual + (row + i) * g.ldr + (2 * pair + j) * PANEL);
}

// One row's 16 (or fewer) results of a panel.
inline void store_panel(const Linear& g, int64_t row, int64_t column, int64_t width, const float* values) {
    if (!g.y_bf16) {
        float* to = (float*)g.y + row * g.ldy + column;
        if (width < PANEL) return (void)memcpy(to, values, width * sizeof(float));
        for (int l = 0; l < PANEL; l += WIDTH) store(to + l, load(values + l));
        return;
    }
    uint16_t* to = (uint16_t*)g.y + row * g.ldy + column;
    uint16_t rounded[PANEL];
    for (int l = 0; l < PANEL; l += WIDTH) store_bf16(rounded + l, load(values + l));
    if (width < PANEL) return (void)memcpy(to, rounded, width * sizeof(uint16_t));
    memcpy(to, rounded, sizeof rounded);
}

// sums: [rows][2][16], of a pair of panels
inline void finish(const Linear& g, float* sums, int64_t row, int rows, int64_t pair) {
    for (int i = 0; i < rows; ++i) {
        float *first = sums + 2 * i * PANEL, *second = first + PANEL;
        if (g.gated) {
            const int64_t column = pair * PANEL, width = std::min<int64_t>(PANEL, g.n - column);
            add_bias(first, g.bias, column, width);
            add_bias(second, g.bias, g.n + column, width);
            for (int l = 0; l < PANEL; l += WIDTH) store(first + l, activate(g.act, load(first + l)) * load(second + l));
            store_panel(g, row + i, column, width, first);
            continue;
        }
        for (int j = 0; j < 2; ++j) {
            const int64_t column = (2 * pair + j) * PANEL, width = std::min<int64_t>(PANEL, g.n - column);
            if (width <= 0) break;
            float* panel = first + j * PANEL;
            add_bias(panel, g.bias, column, width);
            if (g.act != Activation::NONE)
                for (int l = 0; l < PANEL; l += WIDTH) store(panel + l, activate(g.act, load(panel + l)));
            if (g.residual != nullptr) add_residual(panel, g.residual + (row + i) * g.ldr + column, width);
            store_panel(g, row + i, column, width, panel);
        }
    }
}

// --- a thread's share --------------------------------------------------------------------------------

template <class W, class X>
void copy_row(const X* x, const int32_t* columns, int64_t size, typename W::Element* to, int64_t block_stride) {
    constexpr int64_t width = BLOCK * W::K_PER_STEP;
    for (int64_t k = 0; k < size; k += width, to += block_stride) {
        const int64_t count = std::min(width, size - k);
        if (columns == nullptr) {
            W::copy(x + k, to, count);
            continue;
        }
        X picked[width];
        for (int64_t i = 0; i < count; ++i) picked[i] = x[columns[k + i]];
        W::copy(picked, to, count);
    }
}

template <class W>
void copy_row(const Linear& g, int64_t row, typename W::Element* to, int64_t block_stride) {
    const int64_t start = (g.rows == nullptr ? row : g.rows[row]) * g.ldx;
    if (g.x_bf16)
        copy_row<W>((const uint16_t*)g.x + start, g.columns, g.k, to, block_stride);
    else
        copy_row<W>((const float*)g.x + start, g.columns, g.k, to, block_stride);
}

// Weights that lie in memory as a tile reads them: one of the sources that `part` takes. quant.h has others.
template <class Weight>
class Plain {
public:
    using W = Weight;

    Plain(const Linear& g, int64_t steps) : pairs_((const char*)g.weight), steps_(steps) {}

    // The pair of panels that comes next, for so many rows.
    void open(int64_t pair, int64_t /* rows */) { pair_ = pairs_ + pair * steps_ * STEP_BYTES; }

    // Sums [rows][2][16] of one of so many tiles.
    void sums(int rows, const typename W::Element* x, int64_t tile, int64_t tiles, float* out) const {
        // each tile of rows fetches its part of the next pair: all at once would wait for memory
        const char* next = pair_ + (steps_ + tile * steps_ / tiles) * STEP_BYTES;
        two_panels<W>(rows, x, pair_, steps_, next, tiles == 1 ? STEP_BYTES : 64, out);
    }

private:
    const char* pairs_;
    int64_t steps_;
    const char* pair_ = nullptr;
};

// Rows [m0, m1) times pairs of panels [pair0, pair1).
template <class Source>
void part(const Linear& g, int64_t m0, int64_t m1, int64_t pair0, int64_t pair1) {
    using W = typename Source::W;
    using Element = typename W::Element;
    const int64_t steps = divide_up(g.k, W::K_PER_STEP);
    const int64_t row_elements = divide_up(steps, BLOCK) * BLOCK * W::PER_STEP;
    const int64_t held = SCRATCH_BYTES / (row_elements * (int64_t)sizeof(Element));
    const int64_t most = std::max<int64_t>(1, held / W::MAX_ROWS) * W::MAX_ROWS;
    static thread_local Scratch scratch;
    Element* x = (Element*)scratch.get(std::min(most, m1 - m0) * row_elements * sizeof(Element));
    alignas(64) float sums[W::MAX_ROWS * 2 * PANEL];
    Source source(g, steps);
    for (int64_t m = m0; m < m1; m += most) {
        const int64_t rows = std::min(most, m1 - m), tiles = divide_up(rows, W::MAX_ROWS);
        // tiles of equal height: a low one waits for its few sums instead of computing
        auto start = [&](int64_t t) { return t * rows / tiles; };
        for (int64_t t = 0; t < tiles; ++t)
            for (int64_t r = start(t); r < start(t + 1); ++r)
                copy_row<W>(g, m + r, x + start(t) * row_elements + (r - start(t)) * BLOCK * W::PER_STEP,
                            (start(t + 1) - start(t)) * BLOCK * W::PER_STEP);
        for (int64_t pair = pair0; pair < pair1; ++pair) {
            source.open(pair, rows);
            for (int64_t t = 0; t < tiles; ++t) {
                const int height = start(t + 1) - start(t);
                if (g.residual != nullptr) fetch_residual(g, m + start(t), height, pair);
                source.sums(height, x + start(t) * row_elements, t, tiles, sums);
                finish(g, sums, m + start(t), height, pair);
            }
        }
    }
}

}  // namespace
