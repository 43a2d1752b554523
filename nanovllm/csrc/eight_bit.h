// Linear layers whose inputs are rounded to 8 bits too: their integers meet the codes of quantised weights (VNNI).
//
// 32 columns of a row share a scale, as in ggml's Q8_1. Products of columns that share their scales are summed as
// integers, which is exact; these sums follow each other in one chain of floats, whatever else a call computes: a row's
// bits are its own, as in gemm.h.
#pragma once

#include "formats.h"
#include "gemm.h"
#include "quant.h"
#include "vec.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
namespace {

using namespace nanovllm;

constexpr int COLUMNS = 4 * BLOCK;  // of a block; an instruction sums four products a lane
constexpr int SHARE = 32;           // columns of a row that share a scale
constexpr int SHARES = COLUMNS / SHARE;

// A block of a row of x. Codes are 128 more than what they stand for: one factor of each product is unsigned.
struct Rounded {
    uint8_t codes[COLUMNS];
    float scale[SHARES];
    float sums[SHARES];  // of what the codes stand for, times the scale
};

// As the weights of gemm.h: how a block of a row is copied.
struct Int8Rows {
    using Element = uint32_t;
    static constexpr int K_PER_STEP = 4;

    static void copy(const float* x, Element* to, int64_t count) {
        Rounded& row = *(Rounded*)to;
        __m512 v[SHARES][2];
#pragma GCC unroll 8
        for (int i = 0; i < 2 * SHARES; ++i) {
            const int64_t lanes = std::clamp<int64_t>(count - i * WIDTH, 0, WIDTH);
            v[i / 2][i % 2] = _mm512_maskz_loadu_ps((1 << lanes) - 1, x + i * WIDTH);
        }
        const __m128 largest = (__m128)largest_of_each(v);
        const __m128 most = _mm_set1_ps(127);
        _mm_storeu_ps(row.scale, _mm_div_ps(largest, most));
        // is finite; what is not stays in the scale
        const __m128 factors = _mm_maskz_div_ps(_mm_cmp_ps_mask(largest, _mm_set1_ps(1e-30f), _CMP_GT_OQ), most, largest);
#pragma GCC unroll 8
        for (int i = 0; i < SHARES; ++i) {
            const __m512 factor = _mm512_set1_ps(factors[i]);
            for (int j = 0; j < 2; ++j) {
                const __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(v[i][j], factor));
                const __m128i bytes = _mm_xor_si128(_mm512_cvtsepi32_epi8(codes), _mm_set1_epi8(-128));
                _mm_storeu_si128((__m128i*)(row.codes + i * SHARE + j * WIDTH), bytes);
            }
        }
        for (int i = 0; i < SHARES; ++i) {
            const __m256i codes = _mm256_loadu_si256((const __m256i*)(row.codes + i * SHARE));
            const __m256i four = _mm256_sad_epu8(codes, _mm256_setzero_si256());
            const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
            row.sums[i] = row.scale[i] * (_mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 2) - 128 * SHARE);
        }
    }

    static void copy(const uint16_t* x, Element* to, int64_t count) {
        float wide[COLUMNS];
        uint16_t part[WIDTH] = {};
        int64_t i = 0;
        for (; i + WIDTH <= count; i += WIDTH) store(wide + i, load_bf16(x + i));
        memcpy(part, x + i, (count - i) * sizeof(uint16_t));
        if (i < count) store(wide + i, load_bf16(part));
        copy(wide, to, count);
    }

private:
    // Of four pairs of vectors, the largest magnitude of each; as bits, so that what is not finite is larger than all else.
    static inline __m128i largest_of_each(const __m512 (&v)[SHARES][2]) {
        __m512i size[SHARES];
        for (int i = 0; i < SHARES; ++i) {
            const __m512i digits = _mm512_set1_epi32(0x7fffffff);
            size[i] = _mm512_max_epi32(_mm512_and_si512((__m512i)v[i][0], digits), _mm512_and_si512((__m512i)v[i][1], digits));
        }
        const auto halves = [](__m512i a, __m512i b) {
            return _mm512_max_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        };
        const __m512i first = halves(size[0], size[1]), second = halves(size[2], size[3]);
        const __m512i all = _mm512_max_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
        const __m256i four = _mm256_max_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
        return _mm_max_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
    }
};

// Which bytes of two vectors the four columns of each row of panel p are.
struct Places4 {
    alignas(64) uint16_t steps[2][32] = {};   // of two steps [2][16][2]: two bytes each
    alignas(64) uint8_t nibbles[2][64] = {};  // of the lower and upper halves of 16 words

    constexpr Places4() {
        for (int p = 0; p < 2; ++p)
            for (int r = 0; r < PANEL; ++r) {
                for (int s = 0; s < 2; ++s) steps[p][2 * r + s] = 32 * s + p * PANEL + r;
                for (int c = 0; c < 4; ++c)
                    nibbles[p][4 * r + c] = r / 8 * 64 + (r % 8 * 2 + c % 2) * 4 + c / 2 * 2 + p;
            }
    }
};
constexpr Places4 PLACES4;

template <Format F>
struct IntegerBlock {
    static constexpr Layout FORM = layout(F);
    static constexpr int GROUPS = COLUMNS / FORM.group;
    // columns whose products are one sum of integers
    static constexpr int SPAN = std::min(FORM.group, SHARE), SPANS = COLUMNS / SPAN, SPAN_STEPS = SPAN / 4;

    __m512i codes[BLOCK][2];
    __m512i start[SPANS][2];  // what takes away that the inputs' codes are 128 more
    V scale[GROUPS][2], least[FORM.least ? GROUPS : 1][2];
    int64_t shares;  // of the inputs' scales; what lies behind is not there

    // The columns that begin at `at`, up to a whole block; to where those behind begin. outer: see each_twice in quant.h.
    const char* unpack(const char* at, const char* outer, int64_t columns) {
        shares = divide_up(std::min<int64_t>(columns, COLUMNS), SHARE);
        const int64_t groups = std::min<int64_t>(divide_up(columns, FORM.group), GROUPS);
        for (int64_t g = 0; g < groups; ++g) {
            for (int i = 0; i < FORM.group_bytes(); i += 64) __builtin_prefetch(at + AHEAD + i);
            at = values(at, outer, scale[g]);
            if constexpr (FORM.least) at = values(at, outer + PAIR * 2, least[g]);
            for (int64_t i = 0; i < FORM.group / SPAN; ++i) {
                __m512i sums[2] = {};
#pragma GCC unroll 8
                for (int t = 0; t < SPAN_STEPS; ++t) {
                    __m512i* to = codes[(g * FORM.group + i * SPAN) / 4 + t];
                    step(at, i * SPAN_STEPS + t, to);
                    for (int p = 0; p < 2; ++p) sums[p] = _mm512_dpbusd_epi32(sums[p], _mm512_set1_epi8(-128), to[p]);
                }
                for (int p = 0; p < 2; ++p)
                    start[g * FORM.group / SPAN + i][p] = _mm512_sub_epi32(_mm512_setzero_si512(), sums[p]);
            }
            at += PAIR * FORM.group * FORM.bits / 8;
        }
        if constexpr (FORM.group < SHARE)  // of the last columns' share, what the weight has not
            for (int64_t g = groups; g * FORM.group < shares * SHARE; ++g) {
                memset(codes[g * SPAN_STEPS], 0, SPAN_STEPS * sizeof codes[0]);
                memset(start[g], 0, sizeof start[g]);
                scale[g][0] = scale[g][1] = V{};
            }
        return at;
    }

    // acc [ROWS][2][16] += x's block times this one.
    template <int ROWS>
    static void multiply(const Rounded* x, const IntegerBlock& w, float* acc) {
        V sums[ROWS][2];
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i)
            for (int p = 0; p < 2; ++p) sums[i][p] = load(acc + (2 * i + p) * PANEL);
#pragma GCC unroll 1
        for (int64_t h = 0; h < w.shares; ++h) {
            V parts[ROWS][2];
#pragma GCC unroll 4
            for (int q = 0; q < SHARE / SPAN; ++q) {
                const int64_t span = h * (SHARE / SPAN) + q;
                __m512i dots[ROWS][2];
#pragma GCC unroll 8
                for (int i = 0; i < ROWS; ++i)
                    for (int p = 0; p < 2; ++p) dots[i][p] = w.start[span][p];
#pragma GCC unroll 8
                for (int t = 0; t < SPAN_STEPS; ++t) {
                    const int64_t s = span * SPAN_STEPS + t;
#pragma GCC unroll 8
                    for (int i = 0; i < ROWS; ++i) {
                        const __m512i four = _mm512_set1_epi32(((const int*)x[i].codes)[s]);
                        for (int p = 0; p < 2; ++p) dots[i][p] = _mm512_dpbusd_epi32(dots[i][p], four, w.codes[s][p]);
                    }
                }
                const int64_t group = span * SPAN / FORM.group;
#pragma GCC unroll 8
                for (int i = 0; i < ROWS; ++i)
                    for (int p = 0; p < 2; ++p) {
                        const V sum = (V)_mm512_cvtepi32_ps(dots[i][p]), scale = w.scale[group][p];
                        parts[i][p] = q == 0 ? sum * scale : add_product(parts[i][p], sum, scale);
                    }
            }
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; ++i)
                for (int p = 0; p < 2; ++p) {
                    sums[i][p] = add_product(sums[i][p], parts[i][p], splat(x[i].scale[h]));
                    if constexpr (FORM.least)
                        sums[i][p] = add_product(sums[i][p], w.least[h * SHARE / FORM.group][p], splat(x[i].sums[h]));
                }
        }
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i)
            for (int p = 0; p < 2; ++p) store(acc + (2 * i + p) * PANEL, sums[i][p]);
    }

private:
    static inline V add_product(V sum, V a, V b) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum); }

    static inline const char* values(const char* from, const char* outer, V (&to)[2]) {
        for (int p = 0; p < 2; ++p, from += PANEL * FORM.scale_bytes)
            if constexpr (FORM.scale_bytes == 4) to[p] = load(from);
            else if constexpr (FORM.scale_bytes == 2) to[p] = load_fp16(from);
            else to[p] = ::numbers((const int8_t*)from) * load_fp16(outer + p * PANEL * 2);
        return from;
    }

    // Columns 4 t and the three behind of a group whose codes begin there, as signed bytes.
    static inline void step(const char* group, int t, __m512i* to) {
        if constexpr (FORM.bits == 4) {
            const __m512i words = _mm512_loadu_si512(group + t * 64), lower = _mm512_set1_epi8(15);
            const __m512i upper = _mm512_and_si512(_mm512_srli_epi32(words, 4), lower);
            for (int p = 0; p < 2; ++p)
                to[p] = _mm512_permutex2var_epi8(_mm512_and_si512(words, lower), _mm512_load_si512(PLACES4.nibbles[p]), upper);
        } else {
            const __m512i first = two_columns(group, 2 * t), second = two_columns(group, 2 * t + 1);
            for (int p = 0; p < 2; ++p)
                to[p] = _mm512_permutex2var_epi16(first, _mm512_load_si512(PLACES4.steps[p]), second);
        }
    }

    static inline __m512i two_columns(const char* group, int s) {
        if constexpr (FORM.bits == 8) {
            return _mm512_loadu_si512(group + s * 2 * PAIR);
        } else {
            U bytes[1];
            Quantised<F>::parted_bytes(group, s, bytes);
            return _mm512_sub_epi8((__m512i)bytes[0], _mm512_set1_epi8(FORM.bias()));
        }
    }
};

// The blocks of a pair of panels, one after the other.
template <Format F>
class Reader {
public:
    using Block = IntegerBlock<F>;

    Reader(const char* pair, int64_t k) : at_(pair), k_(k) {}

    void next(Block& to) {
        constexpr Layout form = Block::FORM;
        if (form.nested() && column_ % OUTER == 0) outer_ = at_, at_ += form.outer_bytes();
        at_ = to.unpack(at_, outer_, k_ - column_);
        column_ += COLUMNS;
    }

private:
    const char *at_, *outer_ = nullptr;
    int64_t k_, column_ = 0;
};

template <class Block, int... I>
auto pick_multiply(int64_t rows, std::integer_sequence<int, I...>) {
    constexpr void (*all[])(const Rounded*, const Block&, float*) = {Block::template multiply<I + 1>...};
    return all[rows - 1];
}

// As `part` of gemm.h. A block of the weight is unpacked once, and stays in the first-level cache for all rows.
template <Format F>
void eight_bit_part(const Linear& g, int64_t m0, int64_t m1, int64_t pair0, int64_t pair1) {
    constexpr int64_t MAX_ROWS = 6;  // of a tile, by the registers
    constexpr auto heights = std::make_integer_sequence<int, MAX_ROWS>();
    using Block = IntegerBlock<F>;
    const int64_t blocks = divide_up(g.k, COLUMNS), pair_bytes = layout(F).pair_bytes(g.k);
    const int64_t most = std::max<int64_t>(1, SCRATCH_BYTES / (blocks * sizeof(Rounded)) / MAX_ROWS) * MAX_ROWS;
    static thread_local Scratch x_scratch, sums_scratch;
    Rounded* x = (Rounded*)x_scratch.get(std::min(most, m1 - m0) * blocks * sizeof(Rounded));  // [blocks][rows]
    float* sums = (float*)sums_scratch.get(std::min(most, m1 - m0) * PAIR * sizeof(float));    // [rows][2][16]
    for (int64_t m = m0; m < m1; m += most) {
        const int64_t rows = std::min(most, m1 - m), tiles = divide_up(rows, MAX_ROWS);
        for (int64_t r = 0; r < rows; ++r)
            copy_row<Int8Rows>(g, m + r, (Int8Rows::Element*)(x + r), rows * sizeof(Rounded) / sizeof(Int8Rows::Element));
        for (int64_t pair = pair0; pair < pair1; ++pair) {
            if (g.residual != nullptr) fetch_residual(g, m, rows, pair);
            memset(sums, 0, rows * PAIR * sizeof(float));
            Reader<F> reader((const char*)g.weight + pair * pair_bytes, g.k);
            for (int64_t b = 0; b < blocks; ++b) {
                Block block;
                reader.next(block);
                for (int64_t t = 0; t < tiles; ++t) {
                    const int64_t first = t * rows / tiles, height = (t + 1) * rows / tiles - first;
                    pick_multiply<Block>(height, heights)(x + b * rows + first, block, sums + first * PAIR);
                }
            }
            finish(g, sums, m, rows, pair);
        }
    }
}

}  // namespace
#endif
