// What pages hold: how a token's keys and values are put there, and how they are multiplied.
//
// For each head a page has a tile for every 16 keys and, in the cache's other half, one for their values. In a tile of
// keys the sixteen are the lanes of a vector: [D / 2][16][2] bfloat16 or codes, or [D][16] float. In a tile of values
// lanes are dimensions: [8][D][2] or [16][D]. Tiles of codes end with the float scales of their sixteen tokens.
#pragma once

#include <cmath>

#include "gemm.h"

namespace {

using namespace nanovllm;

constexpr int TILE = 16;  // keys side by side
constexpr int MAX_HEAD = 256;

// As the weights of linear layers.
template <class Weight>
struct PlainKV : Weight {
    using Sum = V;
    static constexpr bool SCALED = false;
    static constexpr int64_t BYTES = Weight::K_PER_STEP == 2 ? 2 : 4;  // of a number
    static constexpr int64_t SCALE_BYTES = 0;                          // of a token
    static constexpr int64_t VECTOR_BYTES = sizeof(V);                 // that `step` takes as a vector

    static V vector(const char* p) { return load(p); }
    static V vector_part(const char* p, int64_t lanes) { return load_part((const float*)p, lanes); }
    static V score(V sums, const char* /* scales */) { return sums; }
    static V value(V sums, float /* unit */) { return sums; }

    // Returns what the copy is to be multiplied by.
    static float copy_query(const float* q, typename Weight::Element* to, int64_t count) {
        Weight::copy(q, to, count);
        return 1.0f;
    }

    // Token `at` of two tiles. clear: what shares words with its values.
    static void put_token(const float* k, const float* v, int64_t count, int64_t at, bool clear, char* keys, char* values) {
        if constexpr (BYTES == 2) {
            uint16_t rounded[2][MAX_HEAD + WIDTH];
            for (int64_t d = 0; d < count; d += WIDTH) {
                const int64_t lanes = std::min<int64_t>(WIDTH, count - d);
                store_bf16(rounded[0] + d, load_part(k + d, lanes));
                store_bf16(rounded[1] + d, load_part(v + d, lanes));
            }
            uint16_t *key = (uint16_t*)keys + at * 2, *value = (uint16_t*)values + at / 2 * 2 * count + at % 2;
            for (int64_t d = 0; d < count; d += 2) memcpy(key + d * TILE, rounded[0] + d, 2 * sizeof(uint16_t));
            for (int64_t d = 0; d < count; ++d) {
                value[d * 2] = rounded[1][d];
                if (clear) value[d * 2 + 1] = 0;
            }
        } else {
            for (int64_t d = 0; d < count; ++d) ((float*)keys)[d * TILE + at] = k[d];
            memcpy((float*)values + at * count, v, count * sizeof(float));
        }
    }
};

// Signed bytes times a scale of the token: its largest magnitude is 127. Queries, and weights of a span, are integers
// of 16 bits times a unit, so that sums of products are exact: up to 256 of them fit 32 bits.
struct Int8KV {
    using Sum = I;
    using Element = uint32_t;  // a pair
    static constexpr bool SCALED = true;
    static constexpr int PER_STEP = 1, K_PER_STEP = 2;
    static constexpr int64_t BYTES = 1, SCALE_BYTES = sizeof(float), VECTOR_BYTES = 2 * WIDTH;
    static constexpr float MOST = 32767.0f, MOST_CODE = 127.0f;
    static constexpr float LEAST = 1e-30f;  // what is smaller counts as zero

    static V vector(const char* p) {  // widened to pairs of 16 bits
#if defined(__AVX512F__)
        return (V)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
        return (V)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
#else
        typedef int8_t Codes __attribute__((vector_size(2 * NV_WIDTH)));
        typedef int16_t Pairs __attribute__((vector_size(4 * NV_WIDTH)));
        Codes codes;
        memcpy(&codes, p, sizeof codes);
        return (V)__builtin_convertvector(codes, Pairs);
#endif
    }

    static V vector_part(const char* p, int64_t lanes) {
        char codes[VECTOR_BYTES] = {};
        memcpy(codes, p, 2 * lanes);
        return vector(codes);
    }

    template <int N>
    static inline void step(I* acc, const V* w, const Element* x) {
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) {
#if defined(__AVX512VNNI__)
            acc[j] = (I)_mm512_dpwssd_epi32((__m512i)acc[j], (__m512i)w[j], _mm512_set1_epi32(*x));
#elif defined(__AVX512F__)
            acc[j] += (I)_mm512_madd_epi16((__m512i)w[j], _mm512_set1_epi32(*x));
#elif defined(__AVX2__)
            acc[j] += (I)_mm256_madd_epi16((__m256i)w[j], _mm256_set1_epi32(*x));
#else
            acc[j] += ((I)w[j] << 16 >> 16) * (int16_t)*x + ((I)w[j] >> 16) * (int16_t)(*x >> 16);
#endif
        }
    }

    static V score(I sums, const char* scales) { return __builtin_convertvector(sums, V) * load(scales); }
    static V value(I sums, float unit) { return __builtin_convertvector(sums, V) * unit; }

    // The nearest, ties to even. No sum that the compiler would fuse with the product that x is: every level has the
    // same codes.
    static I integers(V x) {
#if defined(__AVX512F__)
        return (I)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
        return (I)_mm256_cvtps_epi32((__m256)x);
#else
        I n;
        for (int l = 0; l < WIDTH; ++l) n[l] = lrintf(x[l]);
        return n;
#endif
    }

    static void put(V x, Element* to) {
        typedef int16_t Half __attribute__((vector_size(2 * NV_WIDTH)));
        const Half h = __builtin_convertvector(integers(x), Half);
        memcpy(to, &h, sizeof h);
    }

    // f(i, the vector from there) of numbers; zeros behind the last.
    template <class F>
    static void vectors(const float* x, int64_t count, F f) {
        int64_t i = 0;
        for (; i + WIDTH <= count; i += WIDTH) f(i, load(x + i));
        if (i < count) f(i, load_part(x + i, count - i));
    }

    // f(i, vector times a factor that makes the largest magnitude `to`); returns what brings it back.
    template <class F>
    static float scaled(const float* x, int64_t count, float to, F f) {
        V sizes = {};
        vectors(x, count, [&](int64_t, V v) {
            const V size = v < 0.0f ? -v : v;
            sizes = size > sizes ? size : sizes;
        });
        const float largest = reduce(sizes, [](float a, float b) { return b > a ? b : a; });
        const float factor = to / std::max(largest, LEAST);
        vectors(x, count, [&](int64_t i, V v) { f(i, v * factor); });
        return largest / to;
    }

    static float copy_query(const float* q, Element* to, int64_t count) {
        return scaled(q, count, MOST, [&](int64_t i, V v) { put(v, to + i / 2); });
    }

    static float encode(const float* x, int64_t count, int8_t* codes) {
        typedef int8_t Quarter __attribute__((vector_size(NV_WIDTH)));
        return scaled(x, count, MOST_CODE, [&](int64_t i, V v) {
            const Quarter q = __builtin_convertvector(integers(v), Quarter);
            memcpy(codes + i, &q, sizeof q);
        });
    }

    static void put_token(const float* k, const float* v, int64_t count, int64_t at, bool, char* keys, char* values) {
        int8_t codes[2][MAX_HEAD + WIDTH];
        const float scales[] = {encode(k, count, codes[0]), encode(v, count, codes[1])};
        for (int64_t d = 0; d < count; d += 2) memcpy(keys + d * TILE + at * 2, codes[0] + d, 2);
        char* value = values + at / 2 * 2 * count + at % 2;
        for (int64_t d = 0; d < count; ++d) value[d * 2] = codes[1][d];
        ((float*)(keys + TILE * count))[at] = scales[0];
        ((float*)(values + TILE * count))[at] = scales[1];
    }
};

}  // namespace
