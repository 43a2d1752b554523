// Mamba2 between its two projections: a short convolution, the recurrence, and the gated norm.
//
// The recurrence walks a sequence's tokens one after the other, a prompt's as a decoding sequence's: an
// element of the state goes through the same operations however a prompt is cut. Lanes are channels of x
// (the heads' rows, side by side), 32 of which are a strip: a strip of the state lies as [state_size][32],
// and y = S C needs no sum across lanes but adds up along the state, always in the same order.
#pragma once

#include "gemm.h"
#include "rows.h"

namespace {

using namespace nanovllm;

constexpr int SIDE = 2;                    // vectors of channels that are scanned together,
constexpr int DEEP = WIDTH == 16 ? 8 : 4;  // and rows of the state: what registers hold
constexpr int64_t CONV_CHANNELS = 512;     // of a token that a thread convolves
constexpr int64_t MOST_STRIPS = 8;         // of a task of the scan: they read the same B and C
constexpr int64_t TASKS_A_THREAD = 4;

inline V load_lanes(const float* p, int64_t lanes) { return lanes == WIDTH ? load(p) : load_part(p, lanes); }

inline void store_lanes(float* p, V v, int64_t lanes) {
    if (lanes == WIDTH)
        store(p, v);
    else
        store_part(p, v, lanes);
}

// log(1 + e^x) as max(x, 0) + log(1 + z), z = e^-|x|: an odd series in z / (2 + z), which is a third at most.
inline V softplus(V x) {
    const V z = exp(x < 0.0f ? x : -x), w = z / (z + 2.0f), square = w * w;
    V series = splat(1.0f / 15);
    for (int odd = 13; odd > 0; odd -= 2) series = series * square + 1.0f / odd;
    return (x < 0.0f ? V{} : x) + 2.0f * w * series;
}

// A sequence's part of a step.
struct Chunk {
    int64_t begin, count, position;  // its tokens, and where in the sequence the first one stands
    float *taps, *state;             // its slot

    Chunk(const Mamba2Call& m, int64_t b) : begin(m.query_start[b]), count(m.query_start[b + 1] - begin) {
        position = m.seq_lens[b] - count;
        taps = m.conv_states + m.slots[b] * (m.kernel - 1) * m.conv_size();
        state = m.states + m.slots[b] * m.groups * m.strips() * m.state_size * STRIP;
    }

    static Chunk of_token(const Mamba2Call& m, int64_t token) {
        return {m, std::upper_bound(m.query_start, m.query_start + m.batch, token) - m.query_start - 1};
    }
};

// silu(convolution) of a token's channels [first, last). There are no taps before the sequence's first
// token; those before the chunk are in the slot.
inline void convolve(const Mamba2Call& m, int64_t token, int64_t first, int64_t last, float* work) {
    const Chunk chunk = Chunk::of_token(m, token);
    const int64_t history = m.kernel - 1, size = m.conv_size(), t = token - chunk.begin;
    const int64_t oldest = std::max<int64_t>(0, history - chunk.position - t), own = std::max<int64_t>(0, history - t);
    const float* input = m.projected + token * m.stride + m.inner();
    for (int64_t c = first; c < last; c += WIDTH) {
        const int64_t lanes = std::min<int64_t>(WIDTH, last - c);
        const float* filter = m.filters + c;
        V sum = load_lanes(m.conv_bias + c, lanes);
        for (int64_t k = oldest; k < own; ++k)
            sum += load_lanes(chunk.taps + (t + k) * size + c, lanes) * load_lanes(filter + k * size, lanes);
        for (int64_t k = own; k <= history; ++k)
            sum += load_lanes(input + (k - history) * m.stride + c, lanes) * load_lanes(filter + k * size, lanes);
        store_lanes(work + token * m.work_width() + c, activate(Activation::SILU, sum), lanes);
    }
}

// A slot gets the last inputs of its sequence.
inline void remember(const Mamba2Call& m, const Chunk& chunk) {
    const int64_t history = m.kernel - 1, size = m.conv_size();
    for (int64_t i = 0; i < history; ++i) {  // upwards: what is still needed lies above
        const int64_t t = chunk.count - history + i;
        const float* input = m.projected + (chunk.begin + t) * m.stride + m.inner();
        const float* row = t < 0 ? chunk.taps + (t + history) * size : input;
        std::copy(row, row + size, chunk.taps + i * size);
    }
}

// dt of a token's heads, and what of the state each head keeps: exp(dt A).
inline void time_steps(const Mamba2Call& m, int64_t token, float* work) {
    const float* raw = m.projected + token * m.stride + m.inner() + m.conv_size();
    float* dt = work + token * m.work_width() + m.conv_size();
    for (int64_t h = 0; h < m.heads; h += WIDTH) {
        const int64_t lanes = std::min<int64_t>(WIDTH, m.heads - h);
        V v = softplus(load_lanes(raw + h, lanes) + load_lanes(m.dt_bias + h, lanes));
        v = v < m.shortest ? splat(m.shortest) : v;  // NaN stays NaN
        v = v > m.longest ? splat(m.longest) : v;
        store_lanes(dt + h, v, lanes);
        store_lanes(dt + m.heads + h, exp(v * load_lanes(m.A + h, lanes)), lanes);
    }
}

// Which heads the channels of a vector belong to, from `channel` on.
struct Heads {
    int64_t of[WIDTH], lanes;
    bool one;

    Heads(const Mamba2Call& m, int64_t channel, int64_t lanes) : lanes(lanes), one(m.head_dim % WIDTH == 0) {
        for (int64_t i = 0; i < (one ? std::min<int64_t>(1, lanes) : lanes); ++i) of[i] = (channel + i) / m.head_dim;
    }

    V spread(const float* values) const {
        if (one && lanes > 0) return splat(values[of[0]]);
        V v = {};
        for (int64_t i = 0; i < lanes; ++i) v[i] = values[of[i]];
        return v;
    }
};

// What some tokens bring to a strip: zeros where it has no channel.
struct Inputs {
    static constexpr int TOKENS = 32;
    float keep[TOKENS][STRIP], add[TOKENS][STRIP], y[TOKENS][STRIP];  // exp(dt A), dt x; D x, later all of y

    // channel, left: the strip's first one and how many follow in its group; x: work's rows of the tokens.
    Inputs(const Mamba2Call& m, const float* x, int64_t count, int64_t channel, int64_t left) {
        for (int64_t at = 0; at < STRIP; at += WIDTH) {
            const int64_t lanes = std::clamp<int64_t>(left - at, 0, WIDTH);
            const Heads heads(m, channel + at, lanes);
            const V D = heads.spread(m.D);
            for (int64_t t = 0; t < count; ++t) {
                const float *row = x + t * m.work_width(), *dt = row + m.conv_size();
                const V value = load_lanes(row + channel + at, lanes);
                store(keep[t] + at, heads.spread(dt + m.heads));
                store(add[t] + at, value * heads.spread(dt));
                store(y[t] + at, value * D);
            }
        }
    }
};

// S <- keep S + add B^T and y += S C for N rows of the state and SIDE vectors of channels, token by token.
template <int N>
void scan(float* state, Inputs& in, int64_t at, int64_t count, const float* B, const float* C, int64_t stride) {
    V s[N][SIDE];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
        for (int j = 0; j < SIDE; ++j) s[n][j] = load(state + n * STRIP + j * WIDTH);
    for (int64_t t = 0; t < count; ++t, B += stride, C += stride) {
        V keep[SIDE], add[SIDE], y[SIDE];
        for (int j = 0; j < SIDE; ++j) {
            keep[j] = load(in.keep[t] + at + j * WIDTH);
            add[j] = load(in.add[t] + at + j * WIDTH);
            y[j] = load(in.y[t] + at + j * WIDTH);
        }
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
            for (int j = 0; j < SIDE; ++j) {
                s[n][j] = s[n][j] * keep[j] + add[j] * B[n];
                y[j] += s[n][j] * C[n];
            }
        for (int j = 0; j < SIDE; ++j) store(in.y[t] + at + j * WIDTH, y[j]);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
        for (int j = 0; j < SIDE; ++j) store(state + n * STRIP + j * WIDTH, s[n][j]);
}

// Strips [first, last) of a sequence through all its tokens. Results go to m.out.
inline void scan_strips(const Mamba2Call& m, const Chunk& chunk, int64_t first, int64_t last, const float* work) {
    const int64_t size = m.state_size, width = m.work_width(), in_group = m.inner() / m.groups;
    if (chunk.position == 0) std::fill(chunk.state + first * size * STRIP, chunk.state + last * size * STRIP, 0.0f);
    for (int64_t t = 0; t < chunk.count; t += Inputs::TOKENS) {
        const int64_t count = std::min<int64_t>(Inputs::TOKENS, chunk.count - t), token = chunk.begin + t;
        const float* rows = work + token * width;
        for (int64_t strip = first; strip < last; ++strip) {
            const int64_t group = strip / m.strips(), begin = strip % m.strips() * STRIP;
            const int64_t channel = group * in_group + begin, left = std::min<int64_t>(STRIP, in_group - begin);
            const float *B = rows + m.inner() + group * size, *C = B + m.groups * size;
            Inputs in(m, rows, count, channel, left);
            for (int64_t at = 0; at < STRIP; at += SIDE * WIDTH) {
                float* state = chunk.state + strip * size * STRIP + at;
                int64_t n = 0;
                for (; n + DEEP <= size; n += DEEP) scan<DEEP>(state + n * STRIP, in, at, count, B + n, C + n, width);
                for (; n < size; ++n) scan<1>(state + n * STRIP, in, at, count, B + n, C + n, width);
            }
            float* out = m.out + token * m.inner() + channel;
            for (int64_t i = 0; i < count; ++i) std::copy(in.y[i], in.y[i] + left, out + i * m.inner());
        }
    }
}

// RMSNorm of y * silu(gate), each group of a token by itself. Where the one group's channels are on several
// ranks, its squares are only given out: what follows needs their sum.
inline void gated_norm(const Mamba2Call& m, int64_t token) {
    const int64_t size = m.inner() / m.groups;
    for (int64_t channel = 0; channel < m.inner(); channel += size) {
        float* y = m.out + token * m.inner() + channel;
        const float *gate = m.projected + token * m.stride + channel, *weight = m.norm + channel;
        for (int64_t i = 0; i < size; i += WIDTH) {
            const int64_t lanes = std::min<int64_t>(WIDTH, size - i);
            const V gated = load_lanes(y + i, lanes) * activate(Activation::SILU, load_lanes(gate + i, lanes));
            store_lanes(y + i, gated, lanes);
        }
        const float squares = row_sum(y, size, [](V v, int64_t) { return v * v; });
        if (m.squares != nullptr) {
            m.squares[token] = squares;
            continue;
        }
        const float scale = 1.0f / std::sqrt(squares / size + m.eps);
        for (int64_t i = 0; i < size; i += WIDTH) {
            const int64_t lanes = std::min<int64_t>(WIDTH, size - i);
            store_lanes(y + i, load_lanes(y + i, lanes) * scale * load_lanes(weight + i, lanes), lanes);
        }
    }
}

void mamba2(const Mamba2Call& m, Team& team) {
    float* work = (float*)team.shared(m.tokens * m.work_width() * sizeof(float));
    const int64_t parts = divide_up(m.conv_size(), CONV_CHANNELS);
    team.share(m.tokens * parts, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t channel = i % parts * CONV_CHANNELS;
            convolve(m, i / parts, channel, std::min(channel + CONV_CHANNELS, m.conv_size()), work);
        }
    });
    team.share(m.tokens, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t) time_steps(m, t, work);
    });
    team.barrier();
    const int64_t strips = m.groups * m.strips();
    const int64_t each = std::clamp<int64_t>(m.batch * strips / (TASKS_A_THREAD * team.threads), 1, MOST_STRIPS);
    const int64_t scan_tasks = divide_up(strips, each);
    team.each(m.batch * scan_tasks, [&](int64_t i) {
        const int64_t first = i % scan_tasks * each;
        scan_strips(m, Chunk(m, i / scan_tasks), first, std::min(first + each, strips), work);
    });
    team.share(m.batch, [&](int64_t first, int64_t last) {
        for (int64_t b = first; b < last; ++b) remember(m, Chunk(m, b));
    });
    team.barrier();
    team.share(m.tokens, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t) gated_norm(m, t);
    });
}

}  // namespace
