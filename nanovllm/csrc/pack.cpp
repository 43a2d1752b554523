// Weights into the forms of formats.h: once, when a model is loaded.
#include <algorithm>
#include <cstring>

#include "formats.h"

using namespace nanovllm;

namespace {

// A row's scales and least values of all groups, and where they are nested, what they are multiples of.
struct Values {
    const char *scales, *least, *outer, *outer_least;

    Values row(const Layout& form, int64_t r, int64_t k) const {
        const int64_t groups = (k + form.group - 1) / form.group;
        const int64_t inner = r * groups * form.scale_bytes, outside = r * ((k + OUTER - 1) / OUTER) * 2;
        return {scales + inner, least + inner, outer + outside, outer_least + outside};
    }
};

// Of 32 rows' numbers, and of as many least values behind them where there are such, those of one row.
char* put_values(char* to, int64_t row, int64_t bytes, const char* scale, const char* least) {
    std::memcpy(to + row * bytes, scale, bytes);
    if (least != nullptr) std::memcpy(to + (PAIR + row) * bytes, least, bytes);
    return to + (least == nullptr ? PAIR : 2 * PAIR) * bytes;
}

// Row `row` of a pair.
void pack_row(const Layout& form, const int8_t* codes, const Values& values, int64_t k, char* pair, int64_t row) {
    const int64_t group = form.group, bytes = form.scale_bytes;
    Place places[4];  // of a column and of each fourth one after it
    for (int c = 0; c < 4; ++c) places[c] = place(form.bits, row, c);
    const int64_t four = 4 * form.bits * PAIR / 8;
    for (int64_t g = 0; g * group < k; ++g) {
        if (const int64_t o = g * group / OUTER; form.nested() && g * group % OUTER == 0)
            pair = put_values(pair, row, 2, values.outer + 2 * o, form.least ? values.outer_least + 2 * o : nullptr);
        char* behind = put_values(pair, row, bytes, values.scales + g * bytes,
                                  form.least ? values.least + g * bytes : nullptr);
        const int8_t* mine = codes + g * group;
        for (int64_t c = 0; c < std::min(group, k - g * group); ++c) {
            const Place at = places[c % 4];
            behind[c / 4 * four + at.byte] |= (char)((form.bits == 8 ? mine[c] : mine[c] & 15) << at.shift);
        }
        pair += form.group_bytes();
    }
}

}  // namespace

extern "C" {

// A weight [n][k] of `size`-byte elements (2 or 4) into panels first, first + step, ... of `packed`:
// pairs of panels, each of ceil(k * size / 4) steps of 2 x 16 words; zeros wherever the weight has none.
void nv_pack(const void* weight, void* packed, int64_t n, int64_t k, int size, int64_t first, int64_t step,
             int threads) {
    const int64_t row = k * size, words = (row + 3) / 4;
#pragma omp parallel for num_threads(threads)
    for (int64_t p = 0; p < (n + PANEL - 1) / PANEL; ++p) {
        const int64_t panel = first + p * step, rows = std::min<int64_t>(PANEL, n - p * PANEL);
        uint32_t* to = (uint32_t*)packed + (panel / 2 * words * 2 + panel % 2) * PANEL;
        const char* from = (const char*)weight + p * PANEL * row;
        for (int64_t w = 0; w < words; ++w)
            for (int64_t r = 0; r < rows; ++r) {
                uint32_t word = 0;
                std::memcpy(&word, from + r * row + w * 4, std::min<int64_t>(4, row - w * 4));
                to[w * 2 * PANEL + r] = word;
            }
    }
}

// The same for codes [n][k] of a quantised form, with scales and least values [n][groups] and, where these are
// nested, half-precision ones [n][ceil(k / 256)] as it has them, into rows `first` and those that follow of
// `packed`, which holds zeros; or, if `half` is not negative, into this half of a gated weight.
void nv_pack_quantized(int format, const int8_t* codes, const void* scales, const void* least, const void* outer,
                       const void* outer_least, int64_t n, int64_t k, int64_t first, int half, void* packed,
                       int threads) {
    const Layout form = layout((Format)format);
    const Values all = {(const char*)scales, (const char*)least, (const char*)outer, (const char*)outer_least};
#pragma omp parallel for num_threads(threads)  // rows of different panels share no byte
    for (int64_t p = first / PANEL; p <= (first + n - 1) / PANEL; ++p) {
        const int64_t panel = half < 0 ? p : 2 * p + half;
        char* pair = (char*)packed + panel / 2 * form.pair_bytes(k);
        for (int64_t r = std::max<int64_t>(0, p * PANEL - first); r < std::min(n, (p + 1) * PANEL - first); ++r)
            pack_row(form, codes + r * k, all.row(form, r, k), k, pair, panel % 2 * PANEL + (first + r) % PANEL);
    }
}
}
