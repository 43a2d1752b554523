// Quantised weights: their codes become bfloat16 on the way to the products of gemm.h.
//
// A code has one bfloat16 whoever asks for it, and sums are the chains of gemm.h: for few rows codes are widened
// in registers, for more a pair of panels is widened once for all of them, with the same bits.
#pragma once

#include "formats.h"
#include "gemm.h"
#include "vec.h"

namespace {

using namespace nanovllm;

constexpr int64_t AHEAD = 5120;  // bytes that are fetched early: what is read is small for what is made of it
constexpr int R = 2 * PANEL / WIDTH;  // vectors of a panel's step: columns [16][2]

// Two panels' step as it is widened, before it is rounded.
struct Widened {
    V v[2][R];
};

// The numbers 0 to 15 at bit 4 j of each word.
inline V numbers(U words, int j) {
#if defined(__AVX512F__)
    const __m512 all = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (V)_mm512_permutexvar_ps((__m512i)(words >> (4 * j)), all);
#else
    return __builtin_convertvector((I)((words >> (4 * j)) & 15u), V);
#endif
}

inline I wide(const int8_t* codes) {
#if defined(__AVX512F__)
    return (I)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)codes));
#elif defined(__AVX2__)
    return (I)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)codes));
#else
    I n;
    for (int l = 0; l < WIDTH; ++l) n[l] = codes[l];
    return n;
#endif
}

inline V numbers(const int8_t* codes) { return __builtin_convertvector(wide(codes), V); }

// float8 (e4m3), which here has no NaN: the sign and 7 bits lie where a float has its own; their exponent counts from
// 7, a float's from 127.
inline V numbers_e4m3(const int8_t* codes) { return (V)((U)wide(codes) << 20 & 0x87f00000u) * 0x1p120f; }

#if defined(__AVX512VBMI__)
// Where the bytes of 16 floats come from: of 64 numbers those from 16 i on, and, from 64 on, what makes floats of them.
struct Places {
    alignas(64) uint8_t bytes[4][64] = {};

    constexpr Places() {
        for (int i = 0; i < 4; ++i)
            for (int b = 0; b < 64; ++b) bytes[i][b] = b % 4 == 2 ? 16 * i + b / 4 : 64 + b % 4;
    }
};
constexpr Places PLACES;
constexpr int ABOVE = 128;

// Bytes below 128, those from 16 i on, and 128 more: they are the first digits of floats that begin there.
inline V above(U bytes, int i) {
    const __m512i places = _mm512_load_si512(PLACES.bytes[i]);
    return (V)_mm512_permutex2var_epi8((__m512i)bytes, places, _mm512_castps_si512(_mm512_set1_ps(ABOVE)));
}
#else
constexpr int ABOVE = 0;
#endif

// 32 rows' numbers, each for the two columns of a step.
// outer: the rows' half-precision numbers that nested ones are multiples of.
template <int BYTES>
inline void each_twice(const char* from, const char* outer, V (&to)[2][R]) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
        V v;
        if constexpr (BYTES == 4)
            v = load(from + i * WIDTH * 4);
        else if constexpr (BYTES == 2)
            v = load_fp16(from + i * WIDTH * 2);
        else
            v = numbers((const int8_t*)from + i * WIDTH) * load_fp16(outer + i * WIDTH * 2);
        to[2 * i / R][2 * i % R] = twice(v, 0);
        to[(2 * i + 1) / R][(2 * i + 1) % R] = twice(v, WIDTH / 2);
    }
}

template <Format F>
struct Quantised {
    static constexpr Layout FORM = layout(F);
    static constexpr int WORDS = 16 / WIDTH;  // vectors of 16 words
    // By how much widened codes of 6 bits are more than what they stand for.
    static constexpr float MORE = FORM.bias() == 0 ? 0 : FORM.bias() + ABOVE;

    // f(s, step) for each step of a pair.
    template <class Each>
    static inline void widen(const char* at, int64_t steps, Each f) {
        constexpr int64_t IN_GROUP = FORM.group / 2;
        const char* outer = nullptr;
        for (int64_t s = 0; s < steps; s += IN_GROUP, at += FORM.group_bytes()) {
            if (FORM.nested() && s % (OUTER / 2) == 0) outer = at, at += FORM.outer_bytes();
            for (int i = 0; i < FORM.group_bytes(); i += 64) __builtin_prefetch(at + AHEAD + i);
            group(at, outer, s, std::min(steps, s + IN_GROUP), f);
        }
    }

    // Codes of 5 or 6 bits in a byte each, as they are stored.
    static inline void parted_bytes(const char* codes, int64_t s, U (&to)[WORDS]) {
        constexpr int UPPER = FORM.upper_bits(), STEPS = 8 / UPPER;
        constexpr uint32_t LOWER_BITS = 0x0f0f0f0f, UPPER_BITS = ((1 << UPPER) - 1) * 0x10101010;
        U upper[WORDS];
        memcpy(to, codes + s / 2 * 64, sizeof to);
        memcpy(upper, codes + FORM.group * PANEL + s / STEPS * 64, sizeof upper);
        const int right = 4 * (s % 2), left = 4 - UPPER * (int)(s % STEPS);
#pragma GCC unroll 4
        for (int i = 0; i < WORDS; ++i) {
            const U moved = left > 0 ? upper[i] << left : upper[i] >> -left;
            to[i] = (to[i] >> right & LOWER_BITS) | (moved & UPPER_BITS);
        }
    }

private:
    static inline Widened bytes(const char* codes) {
        Widened w;
#pragma GCC unroll 8
        for (int i = 0; i < 2 * R; ++i) {
            const int8_t* from = (const int8_t*)codes + i * WIDTH;
            w.v[i / R][i % R] = FORM.e4m3 ? numbers_e4m3(from) : numbers(from);
        }
        return w;
    }

    // Of the two steps of 16 words, step t.
    static inline Widened nibbles(const char* codes, int64_t t) {
        U words[WORDS];
        memcpy(words, codes, sizeof words);
        Widened w;
#pragma GCC unroll 8
        for (int i = 0; i < 2 * R; ++i) w.v[i / R][i % R] = numbers(words[i % WORDS], 4 * t + i * WIDTH / 16);
        return w;
    }

    // Step `s` of a group whose codes have 5 or 6 bits.
    static inline Widened parted(const char* codes, int64_t s) {
        U found[WORDS];
        parted_bytes(codes, s, found);
#if defined(__AVX512VBMI__)
        Widened w;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) w.v[i / R][i % R] = above(found[0], i) - (MORE > 0 ? 0.0f : ABOVE);
        return w;
#else
        return bytes((const char*)found);
#endif
    }

    // Step `s` of a group whose codes begin there.
    static inline Widened codes(const char* at, int64_t s) {
        if constexpr (FORM.bits == 8) return bytes(at + s * 2 * PAIR);
        else if constexpr (FORM.bits == 4) return nibbles(at + s / 2 * 64, s % 2);
        else return parted(at, s);
    }

    template <class Each>
    static inline void group(const char* at, const char* outer, int64_t first, int64_t end, Each f) {
        V scale[2][R], least[2][R];
        each_twice<FORM.scale_bytes>(at, outer, scale);
        at += PAIR * FORM.scale_bytes;
        if constexpr (FORM.least) {
            each_twice<FORM.scale_bytes>(at, outer + PAIR * 2, least);
            at += PAIR * FORM.scale_bytes;
        } else if constexpr (MORE > 0) {
#pragma GCC unroll 8
            for (int i = 0; i < 2 * R; ++i) least[i / R][i % R] = scale[i / R][i % R] * -MORE;
        }
        auto step = [&](int64_t s) {
            Widened w = codes(at, s);
#pragma GCC unroll 8
            for (int i = 0; i < 2 * R; ++i) {
                V& v = w.v[i / R][i % R];
                v *= scale[i / R][i % R];
                // the product is exact, as scales have few digits; where codes are 128 more, it is added unrounded
                if constexpr (FORM.least || MORE > 0) v += least[i / R][i % R];
            }
            f(first + s, w);
        };
        if (end - first == FORM.group / 2) {
#pragma GCC unroll 16
            for (int64_t s = 0; s < FORM.group / 2; ++s) step(s);
        } else {
            for (int64_t s = 0; s < end - first; ++s) step(s);
        }
    }
};

// A pair of panels in bfloat16, as if it had not been quantised.
template <class Q>
void widen_pair(const char* pair, int64_t steps, uint16_t* out) {
    Q::widen(pair, steps, [out](int64_t s, const Widened& w) {
#pragma GCC unroll 16
        for (int i = 0; i < 2 * R; i += 2)
            store_bf16(out + s * 2 * PAIR + i * WIDTH, w.v[i / R][i % R], w.v[i / R][i % R + 1]);
    });
}

#if defined(__AVX512BF16__)
constexpr int FEW = 4;

// As `tile` of gemm.h, over weights that are widened in registers.
template <class Q, int ROWS>
void quantised_tile(const uint32_t* x, const char* pair, int64_t steps, float* out) {
    V acc[ROWS][2] = {};
    Q::widen(pair, steps, [&](uint64_t s, const Widened& w) {
        V b[2];
        for (int j = 0; j < 2; ++j) b[j] = (V)_mm512_cvtne2ps_pbh((__m512)w.v[j][1], (__m512)w.v[j][0]);
        const uint32_t* at = x + s / BLOCK * ROWS * BLOCK + s % BLOCK;
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) Bf16Weight::step<2>(acc[i], b, at + i * BLOCK);
    });
    memcpy(out, acc, sizeof acc);
}

template <class Q>
void few_rows(int rows, const uint32_t* x, const char* pair, int64_t steps, float* out) {
    switch (rows) {
        case 1:
            return quantised_tile<Q, 1>(x, pair, steps, out);
        case 2:
            return quantised_tile<Q, 2>(x, pair, steps, out);
        case 3:
            return quantised_tile<Q, 3>(x, pair, steps, out);
        default:
            return quantised_tile<Q, 4>(x, pair, steps, out);
    }
}
#else
constexpr int FEW = 0;

template <class Q>
void few_rows(int, const float*, const char*, int64_t, float*) {}
#endif

// A source of weights for `part`.
template <Format F>
class Codes {
public:
    using W = Bf16Weight;

    Codes(const Linear& g, int64_t steps)
        : pairs_((const char*)g.weight), pair_bytes_(layout(F).pair_bytes(g.k)), steps_(steps) {}

    void open(int64_t pair, int64_t rows) {
        pair_ = pairs_ + pair * pair_bytes_;
        few_ = rows <= FEW;
        if (few_) return;
        static thread_local Scratch scratch;
        wide_ = (const char*)scratch.get(steps_ * STEP_BYTES);
        widen_pair<Quantised<F>>(pair_, steps_, (uint16_t*)wide_);
    }

    void sums(int rows, const W::Element* x, int64_t tile, int64_t tiles, float* out) const {
        if (few_) {
            few_rows<Quantised<F>>(rows, x, pair_, steps_, out);
        } else {
            const char* next = pair_ + pair_bytes_ + tile * pair_bytes_ / tiles;
            two_panels<W>(rows, x, wide_, steps_, next, divide_up(pair_bytes_, tiles * steps_), out);
        }
    }

private:
    const char* pairs_;
    int64_t pair_bytes_, steps_;
    const char *pair_ = nullptr, *wide_ = nullptr;
    bool few_ = false;
};

}  // namespace
