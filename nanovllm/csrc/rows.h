// Norms and rotary embedding: each row by itself.
#pragma once

#include <cmath>

#include "kernels.h"
#include "vec.h"

namespace {

using namespace nanovllm;

constexpr int64_t WORTH_A_THREAD = 8192;  // elements; below, waking a thread costs more than it saves

template <class F>
void each_row(const Rows& r, int threads, F f) {
    const int64_t rows = r.outer * r.inner;
    const int count = std::clamp<int64_t>(rows * r.size / WORTH_A_THREAD, 1, threads);
    auto one = [&](int64_t row) {
        const int64_t o = row / r.inner, i = row % r.inner;
        f(r.x + o * r.outer_stride + i * r.inner_stride, r.y + row * r.size, o);
    };
    if (count == 1) {
        for (int64_t row = 0; row < rows; ++row) one(row);
        return;
    }
#pragma omp parallel for num_threads(count) schedule(static)
    for (int64_t row = 0; row < rows; ++row) one(row);
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

void rms_norm(const Rows& rows, const float* weight, float eps, int threads) {
    const int64_t size = rows.size;
    each_row(rows, threads, [=](const float* x, float* y, int64_t) {
        const float squares = row_sum(x, size, [](V v, int64_t) { return v * v; });
        const V scale = splat(1.0f / std::sqrt(squares / size + eps));
        int64_t i = 0;
        for (; i + WIDTH <= size; i += WIDTH) store(y + i, load(x + i) * scale * load(weight + i));
        if (i < size) store_part(y + i, load_part(x + i, size - i) * scale * load_part(weight + i, size - i), size - i);
    });
}

void layer_norm(const Rows& rows, const float* weight, const float* bias, float eps, int threads) {
    const int64_t size = rows.size;
    each_row(rows, threads, [=](const float* x, float* y, int64_t) {
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

void rope(const Rows& rows, const float* cos, const float* sin, int64_t half, int threads) {
    const int64_t size = rows.size;
    each_row(rows, threads, [=](const float* x, float* y, int64_t outer) {
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

}  // namespace
