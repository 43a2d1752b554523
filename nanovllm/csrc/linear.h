// Linear layers over weights of any form, by a team.
#pragma once

#include "eight_bit.h"
#include "formats.h"
#include "gemm.h"
#include "quant.h"

namespace {

using namespace nanovllm;

// The `part` of each form, in the order of Format.
constexpr void (*PARTS[FORMATS])(const Linear&, int64_t, int64_t, int64_t, int64_t) = {
    part<Plain<F32Weight>>,       part<Plain<Bf16Weight>>,       part<Codes<Format::Q4>>,
    part<Codes<Format::Q8>>,      part<Codes<Format::Q5>>,       part<Codes<Format::Q4_NESTED>>,
    part<Codes<Format::Q5_NESTED>>, part<Codes<Format::Q8_FINE>>,   part<Codes<Format::Q6_FINE>>,
    part<Codes<Format::Q4_32>>,     part<Codes<Format::Q4_64>>,     part<Codes<Format::Q4_128>>,
    part<Codes<Format::Q8_128>>,    part<Codes<Format::Q8_LEAST_32>>, part<Codes<Format::Q8_LEAST_128>>,
    part<Codes<Format::E4M3_128>>,
};

// Whether there are products of rows in 8 bits.
#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
constexpr bool EIGHT_BIT = true;

// The same for rows that are rounded to 8 bits, where codes are integers.
constexpr void (*EIGHT_BIT_PARTS[FORMATS])(const Linear&, int64_t, int64_t, int64_t, int64_t) = {
    part<Plain<F32Weight>>,           part<Plain<Bf16Weight>>,          eight_bit_part<Format::Q4>,
    eight_bit_part<Format::Q8>,       eight_bit_part<Format::Q5>,       eight_bit_part<Format::Q4_NESTED>,
    eight_bit_part<Format::Q5_NESTED>, eight_bit_part<Format::Q8_FINE>,  eight_bit_part<Format::Q6_FINE>,
    eight_bit_part<Format::Q4_32>,    eight_bit_part<Format::Q4_64>,    eight_bit_part<Format::Q4_128>,
    eight_bit_part<Format::Q8_128>,   eight_bit_part<Format::Q8_LEAST_32>, eight_bit_part<Format::Q8_LEAST_128>,
    part<Codes<Format::E4M3_128>>,
};
#else
constexpr bool EIGHT_BIT = false;
constexpr auto& EIGHT_BIT_PARTS = PARTS;
#endif

// Rows [m0, m1) times pairs of panels [pair0, pair1).
inline void part(const Linear& g, int64_t m0, int64_t m1, int64_t pair0, int64_t pair1) {
    (g.x_int8 ? EIGHT_BIT_PARTS : PARTS)[(int)g.format](g, m0, m1, pair0, pair1);
}

inline int64_t panel_pairs(const Linear& g) {
    const int64_t columns = !g.gated ? g.n : 2 * divide_up(g.n, PANEL) * PANEL;
    return divide_up(columns, PAIR);
}

// Few rows: threads share the panels. Many: they share the rows, so that each is copied once.
void linear(const Linear& g, Team& team) {
    const int64_t pairs = panel_pairs(g);
    const int64_t by_rows = std::clamp<int64_t>(g.m / 64, 1, team.threads);
    const int64_t by_panels = std::min<int64_t>(team.threads / by_rows, pairs);
    if (team.thread >= by_rows * by_panels) return;
    const int64_t r = team.thread / by_panels, p = team.thread % by_panels;
    part(g, r * g.m / by_rows, (r + 1) * g.m / by_rows, p * pairs / by_panels, (p + 1) * pairs / by_panels);
}

}  // namespace
