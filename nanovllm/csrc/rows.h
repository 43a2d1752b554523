// Norms, rotary embedding, rows of a table, arithmetic: each row or element by itself.
#pragma once

#include <cmath>

#include "formats.h"
#include "kernels.h"
#include "quant.h"
#include "vec.h"

namespace {

using namespace nanovllm;

template <class F>
void each_row(const Rows& r, const Team& team, F f) {
    team.share(r.outer * r.inner, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const int64_t o = row / r.inner, i = row % r.inner;
            f(r.x + o * r.outer_stride + i * r.inner_stride, r.y + row * r.size, o);
        }
    });
}

// Sum of f(x) over a row, four vectors at a time; f must give zero for zeros behind the end.
template <class F>
float row_sum(const float* x, int64_t size, F f) {
    V acc[4] = {};
    int64_t i = 0;
    for (; i + 4 * WIDTH <= size; i += 4 * WIDTH)
        for (int j = 0; j < 4; ++j) acc[j] += f(load(x + i + j * WIDTH), WIDTH);
    for (; i < size; i += WIDTH) {
        const int64_t count = std::min<int64_t>(WIDTH, size - i);
        acc[0] += f(load_part(x + i, count), count);
    }
    return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

void rms_norm(const Norm& norm, Team& team) {
    const int64_t size = norm.size;
    const float* weight = norm.weight;
    const float eps = norm.eps;
    each_row(norm, team, [=](const float* x, float* y, int64_t) {
        const float squares = row_sum(x, size, [](V v, int64_t) { return v * v; });
        const V scale = splat(1.0f / std::sqrt(squares / size + eps));
        int64_t i = 0;
        for (; i + WIDTH <= size; i += WIDTH) store(y + i, load(x + i) * scale * load(weight + i));
        if (i < size) store_part(y + i, load_part(x + i, size - i) * scale * load_part(weight + i, size - i), size - i);
    });
}

void rms_scale(const RmsScale& c, Team& team) {
    team.share(c.rows, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const float *x = c.x + row * c.size, scale = 1.0f / std::sqrt(c.squares[row] / c.over + c.eps);
            for (int64_t i = 0; i < c.size; i += WIDTH) {
                const int64_t lanes = std::min<int64_t>(WIDTH, c.size - i);
                store_part(c.y + row * c.size + i, load_part(x + i, lanes) * scale * load_part(c.weight + i, lanes), lanes);
            }
        }
    });
}

void layer_norm(const Norm& norm, Team& team) {
    const int64_t size = norm.size;
    const float *weight = norm.weight, *bias = norm.bias;
    const float eps = norm.eps;
    each_row(norm, team, [=](const float* x, float* y, int64_t) {
        const V mean = splat(row_sum(x, size, [](V v, int64_t) { return v; }) / size);
        const float squares = row_sum(x, size, [=](V v, int64_t count) {
            V d = v - mean;
            for (int64_t l = count; l < WIDTH; ++l) d[l] = 0;
            return d * d;
        });
        const V scale = splat(1.0f / std::sqrt(squares / size + eps));
        for (int64_t i = 0; i < size; i += WIDTH) {
            const int64_t count = std::min<int64_t>(WIDTH, size - i);
            V v = (load_part(x + i, count) - mean) * scale * load_part(weight + i, count);
            if (bias != nullptr) v += load_part(bias + i, count);
            store_part(y + i, v, count);
        }
    });
}

void rope(const Rope& rope, Team& team) {
    const int64_t size = rope.size, half = rope.half;
    const float *cos = rope.cos, *sin = rope.sin;
    each_row(rope, team, [=](const float* x, float* y, int64_t outer) {
        const float *c = cos + outer * half, *s = sin + outer * half;
        int64_t i = 0;
        for (; i + WIDTH <= half; i += WIDTH) {
            const V a = load(x + i), b = load(x + half + i), vc = load(c + i), vs = load(s + i);
            store(y + i, a * vc - b * vs);
            store(y + half + i, b * vc + a * vs);
        }
        if (i < half) {
            const int64_t n = half - i;
            const V a = load_part(x + i, n), b = load_part(x + half + i, n);
            const V vc = load_part(c + i, n), vs = load_part(s + i, n);
            store_part(y + i, a * vc - b * vs, n);
            store_part(y + half + i, b * vc + a * vs, n);
        }
        memcpy(y + 2 * half, x + 2 * half, (size - 2 * half) * sizeof(float));
    });
}

// A row of a packed weight: a word of one or two elements in every step of its pair of panels.
inline void gather_packed(const Gather& g, int64_t id, float* y) {
    const bool bf16 = g.format == Format::BF16;
    const int64_t per_word = bf16 ? 2 : 1, words = (g.width + per_word - 1) / per_word;
    const uint32_t* x = (const uint32_t*)g.table + id / PAIR * words * PAIR + id % PAIR;
    for (int64_t w = 0; w < words; ++w, x += PAIR) {
        const uint32_t low = bf16 ? *x << 16 : *x, high = *x & 0xffff0000u;
        memcpy(y + w * per_word, &low, sizeof low);
        if (bf16 && 2 * w + 1 < g.width) memcpy(y + 2 * w + 1, &high, sizeof high);
    }
}

inline float half_precision(const char* p) {
    uint16_t half[WIDTH] = {};
    memcpy(half, p, sizeof *half);
    return load_fp16(half)[0];
}

// A row's scale or least value. outer: what it is a multiple of, if it is nested.
inline float number(const Layout& form, const char* p, const char* outer) {
    if (form.scale_bytes == 4) return load_part((const float*)p, 1)[0];
    return form.nested() ? *(const int8_t*)p * half_precision(outer) : half_precision(p);
}

// What a code stands for.
inline float code_number(const Layout& form, int code) {
    if (!form.e4m3) return code;
    const int8_t codes[WIDTH] = {(int8_t)code};
    return numbers_e4m3(codes)[0];
}

// The weights that a linear layer multiplies by.
inline void gather_quantised(const Gather& g, int64_t id, float* y) {
    const Layout form = layout(g.format);
    const int64_t group = form.group, row = id % PAIR, values = PAIR * form.scale_bytes;
    const char *at = (const char*)g.table + id / PAIR * form.pair_bytes(g.width), *outer = at;
    for (int64_t first = 0; first < g.width; first += group, at += form.group_bytes()) {
        if (form.nested() && first % OUTER == 0) outer = at, at += form.outer_bytes();
        const char *codes = at + values * (1 + form.least), *mine = at + row * form.scale_bytes;
        const float scale = number(form, mine, outer + row * 2);
        const float least = form.least ? number(form, mine + values, outer + (PAIR + row) * 2) : 0.0f;
        for (int64_t c = first; c < std::min(first + group, g.width); ++c)
            y[c] = code_number(form, code_at(form, codes, row, c - first)) * scale + least;
    }
    for (int64_t c = 0; c < g.width; c += WIDTH) {
        const int64_t lanes = std::min<int64_t>(WIDTH, g.width - c);
        store_part(y + c, round_to_bf16(load_part(y + c, lanes)), lanes);
    }
}

void gather(const Gather& g, Team& team) {
    team.share(g.count, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            float* y = g.y + row * g.width;
            const int64_t id = g.ids[row] - g.first;
            if (id < 0 || id >= g.rows) {
                std::fill(y, y + g.width, 0.0f);
                continue;
            }
            if (g.packed) {
                layout(g.format).bits == 0 ? gather_packed(g, id, y) : gather_quantised(g, id, y);
                continue;
            }
            if (g.format == Format::F32) {
                memcpy(y, (const float*)g.table + id * g.width, g.width * sizeof(float));
                continue;
            }
            const uint16_t* x = (const uint16_t*)g.table + id * g.width;
            int64_t i = 0;
            for (; i + WIDTH <= g.width; i += WIDTH) store(y + i, load_bf16(x + i));
            for (; i < g.width; ++i) {
                const uint32_t bits = (uint32_t)x[i] << 16;
                memcpy(y + i, &bits, sizeof bits);
            }
        }
    });
}

template <class F>
void each_vector(const Elementwise& e, const Team& team, F f) {
    const int64_t n = e.rows * e.width;
    team.share((n + WIDTH - 1) / WIDTH, [&](int64_t first, int64_t last) {
        for (int64_t i = first * WIDTH; i < std::min(last * WIDTH, n); i += WIDTH) {
            const int64_t count = std::min<int64_t>(WIDTH, n - i);
            const V y = e.y == nullptr ? V{} : load_part(e.y + i, count);
            store_part(e.out + i, f(load_part(e.x + i, count), y), count);
        }
    });
}

void elementwise(const Elementwise& e, Team& team) {
    switch (e.map) {
        case Map::ADD:
            return each_vector(e, team, [](V x, V y) { return x + y; });
        case Map::SCALE:
            return each_vector(e, team, [&](V x, V) { return x * e.a; });
        case Map::DIVIDE:
            return each_vector(e, team, [&](V x, V) { return x / e.a; });
        case Map::CLAMP:  // NaN stays NaN
            return each_vector(e, team, [&](V x, V) {
                x = x < e.a ? splat(e.a) : x;
                return x > e.b ? splat(e.b) : x;
            });
    }
}

}  // namespace
