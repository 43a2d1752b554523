// The forms of a packed weight.
//
// All are pairs of panels, a panel being 16 rows of the weight, one pair after the other: one stream for a tile
// of two panels. Unquantised: [k / 2][2][16][2] bfloat16 or [k][2][16] float, a step being what lies side by side.
// Quantised: for each group of columns the 32 rows' scales, then (in some forms) their least values, then their
// codes; weight = code * scale + least, rounded to bfloat16. Nested forms have integers for scales and least
// values: multiples of the two numbers that each 256 columns of a row begin with.
//
// Codes of 8 bits are signed, or float8 (e4m3), and lie as the bfloat16 do. Codes of 4 bits: two steps are 16 words of 8 codes, of which the
// one at bit 4 j of word l is that of step j / 4, panel j / 2 % 2, and number l + j % 2 * 16 of the panel's [16][2]:
// shifting a vector by 4 j brings neighbours into its lanes. Codes of 5 and 6 bits: byte n of 64 has the lower four bits
// of two steps' nth number; behind those of the group, that of 64 others has the upper bits of 8 steps' or of 4. Codes of
// 6 bits are 32 more than what they stand for.
// There are zeros wherever the weight has nothing.
#pragma once

#include <cstdint>

namespace nanovllm {

constexpr int PANEL = 16;
constexpr int PAIR = 2 * PANEL;
constexpr int OUTER = 256;  // columns that share the numbers whose multiples nested scales are

// ops/formats.py has the same numbers.
enum class Format : int {
    F32,
    BF16,
    Q4,
    Q8,
    Q5,
    Q4_NESTED,
    Q5_NESTED,
    Q8_FINE,
    Q6_FINE,
    Q4_32,
    Q4_64,
    Q4_128,
    Q8_128,
    Q8_LEAST_32,
    Q8_LEAST_128,
    E4M3_128
};
constexpr int FORMATS = 16;

struct Layout {
    int bits, group;  // group: columns that share a scale
    int scale_bytes;  // 4: single precision, 2: half, 1: nested
    bool least;
    bool e4m3 = false;

    constexpr bool nested() const { return scale_bytes == 1; }
    constexpr int upper_bits() const { return bits == 8 ? 0 : bits - 4; }
    constexpr int bias() const { return bits == 6 ? 32 : 0; }
    constexpr int64_t group_bytes() const { return PAIR * (scale_bytes * (1 + least) + group * bits / 8); }
    constexpr int64_t outer_bytes() const { return nested() ? PAIR * 2 * (1 + least) : 0; }
    constexpr int64_t pair_bytes(int64_t k) const {
        return (k + group - 1) / group * group_bytes() + (k + OUTER - 1) / OUTER * outer_bytes();
    }
};

constexpr Layout layout(Format format) {
    switch (format) {
        case Format::Q4:
            return {4, 32, 2, true};
        case Format::Q8:
            return {8, 32, 2, false};
        case Format::Q5:
            return {5, 32, 2, true};
        case Format::Q4_NESTED:
            return {4, 32, 1, true};
        case Format::Q5_NESTED:
            return {5, 32, 1, true};
        case Format::Q8_FINE:
            return {8, 8, 1, false};
        case Format::Q6_FINE:
            return {6, 16, 1, false};
        case Format::Q4_32:
            return {4, 32, 4, true};
        case Format::Q4_64:
            return {4, 64, 4, true};
        case Format::Q4_128:
            return {4, 128, 4, true};
        case Format::Q8_128:
            return {8, 128, 4, false};
        case Format::Q8_LEAST_32:
            return {8, 32, 4, true};
        case Format::Q8_LEAST_128:
            return {8, 128, 4, true};
        case Format::E4M3_128:
            return {8, 128, 4, false, true};
        default:
            return {};  // not quantised
    }
}

// Some bits of the number of a step, of 64, where several steps share bytes.
inline int bits_at(const char* bytes, int bits, int64_t step, int64_t number) {
    const int64_t steps = 8 / bits;
    return (uint8_t)bytes[step / steps * 64 + number] >> step % steps * bits & ((1 << bits) - 1);
}

// The code of a column of a group, for row `row` of a pair. group: what is behind its scales.
inline int code_at(const Layout& form, const char* group, int64_t row, int64_t column) {
    const int64_t step = column / 2, number = row / PANEL * PAIR + row % PANEL * 2 + column % 2;
    if (form.bits == 8) return (int8_t)group[step * 2 * PAIR + number];
    if (form.bits == 4) {
        const int64_t j = step % 2 * 4 + number / 16;
        return (uint8_t)group[step / 2 * 64 + number % 16 * 4 + j / 2] >> j % 2 * 4 & 15;
    }
    const int upper = bits_at(group + form.group * PANEL, form.upper_bits(), step, number);
    return bits_at(group, 4, step, number) + upper * 16 - form.bias();
}

}  // namespace nanovllm
