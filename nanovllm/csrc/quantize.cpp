// Codes and scales of a weight that is quantised while it is loaded, searched for as ops/torch_quantize.py does it, with
// the same bits: products and sums are rounded one by one, in one order. So setup.py compiles this file apart from a
// level's other kernels, without contraction.
//
// WIDTH rows of the weight are searched together, each in a lane.
#include "kernels.h"
#include "vec.h"

namespace {

using namespace nanovllm;

// f(0) + ... + f(N - 1) as a tree: the first half's terms and their partners in the second are added, and so on.
template <int N, int STEP = 1, class F>
inline V sum_of(F f, int i = 0) {
    if constexpr (STEP == N) {
        return f(i);
    } else {
        const V first = sum_of<N, 2 * STEP>(f, i);
        return first + sum_of<N, 2 * STEP>(f, i + STEP);
    }
}

inline V rounded(V x) {  // to integers, of less than 2^22
    const V magic = splat(12582912.0f);
    return (x + magic) - magic;
}

inline V ceiling(V x) {
    const V nearest = rounded(x);
    return nearest < x ? nearest + 1.0f : nearest;
}

// The nearest half-precision number, as a float.
inline V round_to_fp16(V x) {
    const V size = (V)((U)x & 0x7fffffffu);
    const V subnormal = (size + 0.75f) - 0.75f;  // a multiple of 2^-24
    const V normal = (V)(((U)size + 0xfffu + ((U)size >> 13 & 1u)) & 0xffffe000u);
    V found = size < 0x1p-14f ? subnormal : normal;
    found = found > 65504.0f ? splat(__builtin_inff()) : found;
    return (V)((U)(x == x ? found : size) | ((U)x & 0x80000000u));
}

inline U fp16_bits(V x) {  // of what is rounded
    return ((U)(x * 0x1p-112f) >> 13 & 0x7fffu) | ((U)x >> 16 & 0x8000u);
}

// Rows of a call that are searched together.
template <int GROUP>
class Lanes {
public:
    const int64_t first, count;

    Lanes(const QuantizeCall& call, int64_t block)
        : first(block * WIDTH), count(std::min<int64_t>(WIDTH, call.rows - first)), call_(call) {}

    // x[i]: column i of a group. A last group that is not whole is filled up with its last number, lanes without a
    // row are the last one's.
    void read(int64_t group, V* x) const {
        const int64_t from = group * GROUP, most = call_.cols - 1 - from;
        if (most < GROUP - 1) {
            gather<GROUP>(x, [=](int64_t row, int i) { return widened(row + from + std::min<int64_t>(i, most)); });
        } else if (!call_.bf16) {
            gather<GROUP>(x, [=](int64_t row, int i) { return word(4 * (row + from + i)); });
        } else {
            V pairs[GROUP / 2];
            gather<GROUP / 2>(pairs, [=](int64_t row, int i) { return word(2 * (row + from + 2 * i)); });
            for (int i = 0; i < GROUP; i += 2) {
                x[i] = (V)((U)pairs[i / 2] << 16);
                x[i + 1] = (V)((U)pairs[i / 2] & 0xffff0000u);
            }
        }
    }

    // code(i): those of column i, in floats.
    template <class Code>
    void write_codes(int64_t group, Code code) const {
        const int64_t from = group * GROUP;
        for (int64_t i = 0; i < std::min<int64_t>(GROUP, call_.cols - from); i += 4) {
            U four = {};
            for (int j = 0; j < 4; ++j) four |= ((U)__builtin_convertvector(code(i + j), I) & 255u) << 8 * j;
            for (int64_t l = 0; l < count; ++l) {
                const uint32_t word = four[l];
                memcpy(call_.codes + (first + l) * call_.cols + from + i, &word, std::min<int64_t>(4, call_.cols - from - i));
            }
        }
    }

    // A number a group, or of the whole row.
    template <class T>
    void write(void* to, int64_t groups, int64_t group, U bits) const {
        for (int64_t l = 0; l < count; ++l) ((T*)to)[(first + l) * groups + group] = bits[l];
    }

private:
    uint32_t word(int64_t byte) const {
        uint32_t bits;
        memcpy(&bits, (const char*)call_.weight + byte, sizeof bits);
        return bits;
    }

    uint32_t widened(int64_t i) const {
        return call_.bf16 ? (uint32_t)((const uint16_t*)call_.weight)[i] << 16 : word(4 * i);
    }

    // bits(row's first element, i) of each lane's row into x[i].
    template <int N, class Bits>
    void gather(V* x, Bits bits) const {
        uint32_t to[N][WIDTH];
        for (int l = 0; l < WIDTH; ++l) {
            const int64_t row = (first + std::min<int64_t>(l, count - 1)) * call_.cols;
            for (int i = 0; i < N; ++i) to[i][l] = bits(row, i);
        }
        memcpy(x, to, sizeof to);
    }

    const QuantizeCall& call_;
};

// --- 4 bits: see search_int4 ---------------------------------------------------------------------------------

constexpr int GROUP_4 = layout(Format::Q4).group;
constexpr double CUTS[][2] = {{0, 0}, {0.03, 0}, {0, 0.03}, {0.03, 0.03}};

inline V inverse(V scale) { return scale > 1e-30f ? 1.0f / scale : V{}; }

inline V code_4(V x, V inverse, V least) { return rounded(limited((x - least) * inverse, 0.0f, 15.0f)); }

__attribute__((noinline)) V error_4(const V* x, V scale, V least) {
    const V times = inverse(scale);
    return sum_of<GROUP_4>([=](int i) {
        const V error = (code_4(x[i], times, least) * scale + least) - x[i];
        return error * error;
    });
}

// Of the codes that are chosen for these two numbers: their sum, that of their squares, and that of products with x.
struct Moments {
    V codes, squares, products;
};

__attribute__((noinline)) Moments moments(const V* x, V scale, V least) {
    const V times = inverse(scale);
    Moments m = {};  // of integers in any order
    m.products = sum_of<GROUP_4>([=, &m](int i) {
        const V code = code_4(x[i], times, least);
        m.codes += code;
        m.squares += code * code;
        return code * x[i];
    });
    return m;
}

struct Line {
    V scale, least, error;
};

// sum: that of x.
inline Line fitted(const V* x, V sum, V scale, V least) {
    const Moments m = moments(x, scale, least);
    const V variance = m.squares * GROUP_4 - m.codes * m.codes, covariance = m.products * GROUP_4 - m.codes * sum;
    V slope = variance > 0.0f ? covariance / variance : V{};
    slope = slope < 0.0f ? V{} : slope;
    Line found = {round_to_fp16(slope), round_to_fp16((sum - slope * m.codes) * (1.0f / GROUP_4)), {}};
    found.error = error_4(x, found.scale, found.least);
    return found;
}

Line search_4(const V* x) {
    V low = x[0], high = x[0], none = {};
    for (int i = 0; i < GROUP_4; ++i) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        none += x[i] - x[i];  // NaN if one is none, or infinite
    }
    low += none, high += none;  // not -0 either
    const V span = high - low, sum = sum_of<GROUP_4>([=](int i) { return x[i]; });
    Line best = {round_to_fp16(span * (float)(1 / 15.0)), round_to_fp16(low), {}};
    best.error = error_4(x, best.scale, best.least);
    for (auto [below, above] : CUTS) {
        const V width = span * (float)(1 - below - above);
        const Line found = fitted(x, sum, width * (float)(1 / 15.0), low + span * (float)below);
        const I better = found.error < best.error;
        best.scale = better ? found.scale : best.scale;
        best.least = better ? found.least : best.least;
        best.error = better ? found.error : best.error;
    }
    return best;
}

void quantize_4(const QuantizeCall& call, int64_t block) {
    const Lanes<GROUP_4> lanes(call, block);
    const int64_t groups = (call.cols + GROUP_4 - 1) / GROUP_4;
    V x[GROUP_4];
    for (int64_t g = 0; g < groups; ++g) {
        lanes.read(g, x);
        const Line found = search_4(x);
        const V times = inverse(found.scale);
        lanes.write_codes(g, [&](int64_t i) { return code_4(x[i], times, found.least); });
        lanes.write<uint16_t>(call.scales, groups, g, fp16_bits(found.scale));
        lanes.write<uint16_t>(call.halves, groups, g, fp16_bits(found.least));
    }
}

// --- 8 bits: see search_int8 ---------------------------------------------------------------------------------

constexpr int GROUP_8 = layout(Format::Q8_FINE).group;
constexpr float TRIED[] = {-1, 1, 2, 3, 4, 5, 6, 7, 8};

inline V code_8(V x, V inverse) { return rounded(limited(x * inverse, -128.0f, 127.0f)); }

__attribute__((noinline)) V error_8(const V* x, V scale) {
    const V inverse = 1.0f / scale;
    return sum_of<GROUP_8>([=](int i) {
        const V error = round_to_bf16(code_8(x[i], inverse) * scale) - x[i];
        return error * error;
    });
}

// The largest size. As integers floats are in the same order, and NaN is the largest.
inline V largest(const V* x) {
    I most = {};
    for (int i = 0; i < GROUP_8; ++i) {
        const I size = (I)x[i] & 0x7fffffff;
        most = size > most ? size : most;
    }
    return (V)most;
}

// What a group's multiple of the row's unit is.
V search_8(const V* x, V unit) {
    const V wanted = largest(x) * (float)(1 / 127.0), least = limited(ceiling(wanted / unit), 1.0f, 127.0f);
    V best = least, error = error_8(x, least * unit);
    for (float more : TRIED) {
        const V scale = limited(least + more, 1.0f, 127.0f), found = error_8(x, scale * unit);
        const I stays = error <= found;
        best = stays ? best : scale;
        error = stays ? error : found;
    }
    return best;
}

void quantize_8(const QuantizeCall& call, int64_t block) {
    const Lanes<GROUP_8> lanes(call, block);
    const int64_t groups = (call.cols + GROUP_8 - 1) / GROUP_8;
    V x[GROUP_8];
    I most = {};
    for (int64_t g = 0; g < groups; ++g) {
        lanes.read(g, x);
        const I here = (I)largest(x);
        most = here > most ? here : most;
    }
    const V finest = ((V)most * (float)(1 / 127.0)) * (float)(1 / 127.0);
    const V unit = round_to_fp16(finest * (1 + 0x1p-10f) + 0x1p-24f);
    lanes.write<uint16_t>(call.halves, 1, 0, fp16_bits(unit));
    for (int64_t g = 0; g < groups; ++g) {
        lanes.read(g, x);
        const V scale = search_8(x, unit), inverse = 1.0f / (scale * unit);
        lanes.write_codes(g, [&](int64_t i) { return code_8(x[i], inverse); });
        lanes.write<int8_t>(call.scales, groups, g, (U)__builtin_convertvector(scale, I));
    }
}

}  // namespace

void nanovllm::LEVEL::quantize(const QuantizeCall& call, Team& team) {
    const auto block = call.format == Format::Q4 ? quantize_4 : quantize_8;
    team.each((call.rows + WIDTH - 1) / WIDTH, [&](int64_t i) { block(call, i); });
}
