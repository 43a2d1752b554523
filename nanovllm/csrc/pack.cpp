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

// Up to N codes at a time, as they lie in a word's bytes.
template <int N, class Word, class Put>
void each_word(const int8_t* codes, int64_t count, Put put) {
    Word word;
    int64_t c = 0;
    for (; c + N <= count; c += N) {
        std::memcpy(&word, codes + c, N);
        put(c, word);
    }
    if (c == count) return;
    word = 0;
    std::memcpy(&word, codes + c, count - c);
    put(c, word);
}

// A group's codes of row `row` of a pair, to where `code_at` finds them. A step's two columns are neighbours.
void put_bytes(const int8_t* codes, int64_t count, char* to, int64_t row) {
    to += row / PANEL * PAIR + row % PANEL * 2;
    each_word<2, uint16_t>(codes, count, [=](int64_t c, uint16_t two) { std::memcpy(to + c * PAIR, &two, 2); });
}

// Two steps are two neighbouring words, one for each column of a step, in whose halves the steps are.
void put_nibbles(const int8_t* codes, int64_t count, char* to, int64_t row) {
    const int64_t panel = row / PANEL, r = row % PANEL;
    uint32_t* words = (uint32_t*)to + r % 8 * 2;
    each_word<4, uint32_t>(codes, count, [=](int64_t c, uint32_t four) {
        four = (four & 0x0f0f0f0f) << r / 8 * 4;
        words[c * 4] |= (four & 0x00ff00ff) << 8 * panel;
        words[c * 4 + 1] |= (four >> 8 & 0x00ff00ff) << 8 * panel;
    });
}

// Codes of 5 or 6 bits: a step's two columns are neighbours, and steps share bytes.
void put_parted(const Layout& form, const int8_t* codes, int64_t count, char* to, int64_t row) {
    const int upper = form.upper_bits(), steps = 8 / upper;
    const uint16_t bias = form.bias() * 0x0101, upper_bits = ((1 << upper) - 1) * 0x0101;
    uint16_t *words = (uint16_t*)to + row, *uppers = words + form.group * PANEL / 2;
    each_word<2, uint16_t>(codes, count, [=](int64_t c, uint16_t two) {
        const int64_t s = c / 2;
        two = ((two & 0x7f7f) + bias) & 0x3f3f;  // no carry from one to the other
        words[s / 2 * PAIR] |= (two & 0x0f0f) << s % 2 * 4;
        uppers[s / steps * PAIR] |= (two >> 4 & upper_bits) << s % steps * upper;
    });
}

// Row `row` of a pair.
void pack_row(const Layout& form, const int8_t* codes, const Values& values, int64_t k, char* pair, int64_t row) {
    const int64_t group = form.group, bytes = form.scale_bytes;
    for (int64_t g = 0; g * group < k; ++g) {
        if (const int64_t o = g * group / OUTER; form.nested() && g * group % OUTER == 0)
            pair = put_values(pair, row, 2, values.outer + 2 * o, form.least ? values.outer_least + 2 * o : nullptr);
        char* behind = put_values(pair, row, bytes, values.scales + g * bytes,
                                  form.least ? values.least + g * bytes : nullptr);
        const int64_t count = std::min(group, k - g * group);
        const int8_t* mine = codes + g * group;
        form.bits == 8 ? put_bytes(mine, count, behind, row)
        : form.bits == 4 ? put_nibbles(mine, count, behind, row)
                         : put_parted(form, mine, count, behind, row);
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
    const int64_t together = half < 0 ? PAIR : PANEL;  // rows of a pair share words
#pragma omp parallel for num_threads(threads)
    for (int64_t t = first / together; t <= (first + n - 1) / together; ++t)
        for (int64_t r = std::max<int64_t>(0, t * together - first); r < std::min(n, (t + 1) * together - first); ++r) {
            const int64_t p = (first + r) / PANEL, panel = half < 0 ? p : 2 * p + half;
            char* pair = (char*)packed + panel / 2 * form.pair_bytes(k);
            pack_row(form, codes + r * k, all.row(form, r, k), k, pair, panel % 2 * PANEL + (first + r) % PANEL);
        }
}
}
