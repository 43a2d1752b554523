// Vectors of the compiler's own (GCC and Clang), as wide as the level's registers.
//
// Everything here lies in an unnamed namespace: each level has its own copy, and the linker must
// not replace one level's by another's.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define NV_WIDTH 16
#elif defined(__AVX2__)
#define NV_WIDTH 8
#else
#define NV_WIDTH 4
#endif

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int WIDTH = NV_WIDTH;
typedef float V __attribute__((vector_size(4 * NV_WIDTH)));
typedef uint32_t U __attribute__((vector_size(4 * NV_WIDTH)));
typedef int32_t I __attribute__((vector_size(4 * NV_WIDTH)));
typedef uint16_t H __attribute__((vector_size(2 * NV_WIDTH)));

inline V load(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline void store(void* p, V v) { memcpy(p, &v, sizeof v); }

inline V load_part(const float* p, int64_t count) {  // zeros behind
    V v = {};
    memcpy(&v, p, count * sizeof(float));
    return v;
}

inline void store_part(float* p, V v, int64_t count) { memcpy(p, &v, count * sizeof(float)); }

// The lanes where `keep` is set, side by side; returns their number. Writes a whole vector.
inline int64_t store_lanes(float* p, V v, I keep) {
#if defined(__AVX512F__)
    const __mmask16 lanes = _mm512_movepi32_mask((__m512i)keep);
    _mm512_storeu_ps(p, _mm512_maskz_compress_ps(lanes, (__m512)v));
    return __builtin_popcount(lanes);
#else
    int64_t count = 0;
    float kept[WIDTH];
    for (int l = 0; l < WIDTH; ++l) {
        kept[count] = v[l];
        count -= keep[l];
    }
    memcpy(p, kept, sizeof kept);
    return count;
#endif
}

inline bool any(I lanes) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)lanes) != 0;
#else
    int32_t found = 0;
    for (int l = 0; l < WIDTH; ++l) found |= lanes[l];
    return found != 0;
#endif
}

inline V splat(float x) { return x - V{}; }  // not x + 0: that would lose the sign of -0

inline V limited(V x, float least, float most) {  // NaN stays
#if defined(__AVX512F__)
    return (V)_mm512_min_ps((__m512)splat(most), _mm512_max_ps((__m512)splat(least), (__m512)x));
#else
    x = least > x ? splat(least) : x;
    return most < x ? splat(most) : x;
#endif
}

// The upper half of each float, rounded to nearest, ties to even; NaN stays NaN.
inline U bf16_bits(V v) {
    const U bits = (U)v;
    const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return v == v ? rounded : (bits >> 16) | 0x40u;
}

inline V round_to_bf16(V v) { return (V)(bf16_bits(v) << 16); }

inline void store_bf16(uint16_t* p, V v) {
#if defined(__AVX512BF16__)
    const __m256bh h = _mm512_cvtneps_pbh((__m512)v);  // the same, but for subnormal numbers, which become zero
#else
    const H h = __builtin_convertvector(bf16_bits(v), H);
#endif
    memcpy(p, &h, sizeof h);
}

// Two vectors, one behind the other.
inline void store_bf16(uint16_t* p, V first, V second) {
#if defined(__AVX512BF16__)
    const __m512bh h = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    memcpy(p, &h, sizeof h);
#else
    store_bf16(p, first);
    store_bf16(p + WIDTH, second);
#endif
}

inline V load_bf16(const uint16_t* p) {
    H h;
    memcpy(&h, p, sizeof h);
    return (V)(__builtin_convertvector(h, U) << 16);
}

inline V load_fp16(const void* p) {  // finite numbers
#if defined(__AVX512F__)
    __m256i h;
    memcpy(&h, p, sizeof h);
    return (V)_mm512_cvtph_ps(h);
#else
    H h;
    memcpy(&h, p, sizeof h);
    const U bits = __builtin_convertvector(h, U);
    const V size = (V)((bits & 0x7fffu) << 13) * 0x1p112f;  // its exponent counts from 15, not from 127
    return (V)((U)size | (bits & 0x8000u) << 16);
#endif
}

// WIDTH / 2 lanes from `first` on, each in two neighbouring ones.
inline V twice(V v, int first) {
    I from;
    for (int l = 0; l < WIDTH; ++l) from[l] = first + l / 2;
#if defined(__AVX512F__)
    return (V)_mm512_permutexvar_ps((__m512i)from, (__m512)v);
#elif defined(__AVX2__)
    return (V)_mm256_permutevar8x32_ps((__m256)v, (__m256i)from);
#else
    V twice;
    for (int l = 0; l < WIDTH; ++l) twice[l] = v[from[l]];
    return twice;
#endif
}

// f of all lanes, always in the same order: each of the first half with its partner in the second, and so on.
template <int HALF = WIDTH / 2, class F>
inline float reduce(V v, F f) {
    for (int i = 0; i < HALF; ++i) v[i] = f(v[i], v[i + HALF]);
    if constexpr (HALF > 1) return reduce<HALF / 2>(v, f);
    return v[0];
}

inline int64_t sum(I v) {
    int64_t total = 0;
    for (int l = 0; l < WIDTH; ++l) total += v[l];
    return total;
}

inline float sum(V v) {
    return reduce(v, [](float a, float b) { return a + b; });
}

// e^x to 2 ulp: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (coefficients of Cephes' expf).
inline V exp_below(V x) {  // of numbers up to 88
    x = x < -87.0f ? splat(-87.0f) : x;
    const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const V n = (x * 1.44269504f + magic) - magic;
    const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    V p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const I exponent = (__builtin_convertvector(n, I) + 127) << 23;
    return p * (V)exponent;
}

// 2^x to 2 ulp, by a polynomial with the least largest error on [-1/2, 1/2]; not less than 2^-126.
inline V exp2_below(V x) {  // of numbers up to 127
    x = x < -126.0f ? splat(-126.0f) : x;
    const V magic = splat(12582912.0f);  // as above; the integer is then in the lowest bits
    const V n = x + magic, r = x - (n - magic);
    V p = splat(1.326472684e-3f);
    p = p * r + 9.671512665e-3f;
    p = p * r + 5.550733744e-2f;
    p = p * r + 2.402224208e-1f;
    p = p * r + 6.931469776e-1f;
    p = p * r + 1.0f;
    return (V)((I)p + ((I)n << 23));
}

inline V exp(V x) { return exp_below(x > 88.0f ? splat(88.0f) : x); }

// To 2e-7 (Abramowitz and Stegun, 7.1.26).
inline V erf(V x) {
    const V size = x < 0.0f ? -x : x;
    const V t = 1.0f / (1.0f + 0.3275911f * size);
    const V p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    const V y = 1.0f - p * exp(-x * x);
    return x < 0.0f ? -y : y;
}

inline V tanh(V x) { return 1.0f - 2.0f / (exp(2.0f * x) + 1.0f); }

}  // namespace
