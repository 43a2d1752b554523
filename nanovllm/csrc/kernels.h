// What the kernels of one instruction set offer, and how a call describes its work.
//
// The same source is compiled once for each instruction set (level_*.cpp) and gives one table each;
// library.cpp picks a table when the library is loaded. All kernels keep one promise: the bits of an
// output row depend on its input row and on the weights alone, not on the other rows, not on their
// number, and not on the number of threads. Bits may differ from one instruction set to another.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "formats.h"
#include "team.h"

namespace nanovllm {

// Every call says how much work it is, in multiplications or so: little work is done by one thread alone,
// as to wake a second one would cost more than it saves.
constexpr int64_t WORTH_A_THREAD = 1 << 14;

enum class Activation : int { NONE, SILU, GELU, GELU_TANH, RELU };

// y = x w^T + bias, by a packed weight (formats.h). act is applied to the result. Where gated, even panels hold
// the gate's rows and odd ones the other half's:
// y = act(x w_even^T + bias[:n]) * (x w_odd^T + bias[n:]).
struct Linear {
    const void* x;  // [m] rows of k, ldx elements apart; float, or bfloat16 if x_bf16
    int64_t ldx;
    bool x_bf16;
    const void* weight;
    const float* bias;      // may be null
    const float* residual;  // [m] rows of n, ldr elements apart, added to the results; may be null
    int64_t ldr;
    void* y;  // [m] rows of n, ldy elements apart; float, or bfloat16 if y_bf16
    int64_t ldy;
    bool y_bf16;
    int64_t m, n, k;
    Activation act;
    bool gated;
    Format format;
    const int32_t* columns;         // [k], where not null: what meets the weight's column i is x's columns[i]
    bool x_int8;                    // whether rows are rounded to 8 bits where codes are integers (eight_bit.h)
    const int32_t* rows = nullptr;  // [m], where given: row i is x's row rows[i]

    int64_t work() const { return m * n * k; }
};

// Each token's k experts and their weights, best first, from the scores [tokens][experts]. The weights are
// the softmax over the chosen scores if `normalise`, else over all.
struct RouteCall {
    const float* scores;
    int64_t tokens, experts, k;
    bool normalise;
    float* weights;   // [tokens][k]
    int32_t* chosen;  // [tokens][k]

    int64_t work() const { return tokens * experts * 8; }
};

// out = sum over a token's choices of weight * down(act(gate(x)) * up(x)) by the expert that was chosen. Experts'
// packed weights lie one after the other, gate_up's [2 inner][hidden] gated and down's [hidden][inner].
struct MixtureCall {
    const float* x;  // [tokens] rows of `hidden`, ldx elements apart
    int64_t ldx;
    const float* weights;
    const int32_t* chosen;
    int64_t first;  // the experts here are first, ..., first + experts - 1; others give nothing
    int64_t tokens, experts, k, hidden, inner;
    const void *gate_up, *down;
    int64_t gate_up_bytes, down_bytes;  // of one expert
    Format gate_up_format, down_format;
    const int32_t *gate_up_columns, *down_columns;  // [experts][hidden] and [experts][inner]; see Linear; may be null
    Activation act;
    bool x_int8;     // see Linear
    float* out;      // [tokens][hidden]
    int32_t* index;  // to work in, as are the next two: [3 (experts + 1) + 2 tokens k]
    void* fed;       // [tokens * k][inner] in float, or bfloat16 if the weights are not float
    float* results;  // [tokens * k][hidden]

    int64_t work() const { return tokens * k * hidden * inner * 3; }
};

// Rows [outer][inner] of `size` floats at strides of so many elements; results are contiguous.
struct Rows {
    const float* x;
    int64_t outer, inner, outer_stride, inner_stride, size;
    float* y;

    int64_t work() const { return outer * inner * size; }
};

struct Norm : Rows {
    const float *weight, *bias;  // bias may be null
    float eps;
};

// cos and sin: [outer][half]; pairs are (i, i + half); what lies behind them is copied.
struct Rope : Rows {
    const float *cos, *sin;
    int64_t half;
};

// y[i] = row ids[i] of the table, widened to float; zeros for a row that the table has not.
struct Gather {
    const void* table;  // rows of `width`, float or bfloat16; or, if packed, a linear layer's weight of any form
    Format format;
    bool packed;
    int64_t first, rows;  // the table's rows are numbers first, ..., first + rows - 1
    const int64_t* ids;
    int64_t count, width;
    float* y;

    int64_t work() const { return count * width; }
};

enum class Map : int { ADD, SCALE, DIVIDE, CLAMP };

// x + y, x a, x / a, or x clamped to [a, b], of rows of so many floats.
struct Elementwise {
    Map map;
    const float *x, *y;
    float a, b;
    float* out;
    int64_t rows, width;

    int64_t work() const { return rows * width; }
};

// What pages hold: kv_formats.h. attention/native.py has the same numbers.
enum class KVFormat : int { F32, BF16, INT8 };
constexpr int KV_FORMATS = 3;

// Attention of a step's queries over pages.
struct AttentionCall {
    const float* q;  // [tokens][heads][head_dim], tokens q_stride elements apart
    int64_t q_stride;
    float* out;  // [tokens][heads][head_dim]
    const void *keys, *values;
    int64_t page_size, heads, kv_heads, head_dim, batch;
    const int32_t *query_start, *seq_lens, *tables;  // [batch + 1], [batch], [batch][table_stride]
    int64_t table_stride;
    float scale;
    int64_t window;       // keys that a query sees, itself among them; 0 for all
    const float* slopes;  // ALiBi, [heads] or null
    bool rounded;
    float factor;

    int64_t seen(int64_t b, int64_t more = 0) const {  // keys of a sequence that its last queries see
        return window > 0 ? std::min<int64_t>(window + more, seq_lens[b]) : seq_lens[b];
    }
    int64_t work() const {
        int64_t total = 0;
        for (int64_t b = 0; b < batch; ++b) total += (query_start[b + 1] - query_start[b]) * heads * seen(b) * head_dim;
        return total;
    }
};

// A step's keys and values, [tokens][kv_heads][head_dim], into their slots.
struct StoreCall {
    const float *k, *v;
    int64_t k_stride, v_stride, tokens;
    const int64_t* slots;
    void *keys, *values;
    int64_t page_size, kv_heads, head_dim;

    int64_t work() const { return tokens * kv_heads * head_dim * 16; }  // scattered
};

constexpr int STRIP = 32;  // channels of a Mamba2 layer's state that lie side by side

// Mamba2 of a step's tokens between its projections; layer and sizes: layers/mamba2.py, states: mamba.h.
struct Mamba2Call {
    const float* projected;  // [tokens], rows of gate | x | B | C | dt, stride elements apart
    int64_t stride;
    float* out;  // [tokens][inner]
    int64_t heads, head_dim, groups, state_size, kernel;
    float shortest, longest, eps;      // the first two: limits of dt
    const float *filters, *conv_bias;  // [kernel][conv_size], [conv_size]
    const float *A, *D, *dt_bias;      // [heads]
    const float* norm;                 // [inner]
    float* squares;                    // [tokens], or null: see gated_norm
    float* conv_states;                // [slots][kernel - 1][conv_size]
    float* states;                     // [slots][groups * strips][state_size][STRIP]
    int64_t tokens, batch;
    const int32_t *query_start, *seq_lens, *slots;  // [batch + 1], [batch], [batch]

    int64_t inner() const { return heads * head_dim; }
    int64_t conv_size() const { return inner() + 2 * groups * state_size; }
    int64_t work_width() const { return conv_size() + 2 * heads; }             // of x | B | C | dt | exp(dt A)
    int64_t strips() const { return (inner() / groups + STRIP - 1) / STRIP; }  // of a group
    int64_t work() const { return tokens * inner() * state_size; }
};

// y = x / sqrt(squares / over + eps) * weight, [rows][size]: a norm whose squares were summed elsewhere.
struct RmsScale {
    const float *x, *squares, *weight;  // squares: [rows]
    int64_t rows, size, over;
    float eps;
    float* y;

    int64_t work() const { return rows * size; }
};

// How one token is drawn; greedily where the temperature is 0. The limits are SamplingParams'.
struct DrawRow {
    double min_p, top_p, uniform;
    int64_t top_k;  // 0 for all
    float temperature;
};

// tokens[i] from logits [rows][vocab].
struct Draw {
    const float* logits;
    int64_t stride, rows, vocab;
    const DrawRow* how;  // [rows], or null: greedily
    int64_t* tokens;

    int64_t work() const { return rows * vocab; }
};

// tokens[prompt], ..., tokens[output], ..., tokens[end - 1] have been seen before `row` of the logits.
struct PenaltyRow {
    int64_t row, prompt, output, end;
    double frequency, presence;
    float repetition;
};

struct Penalties {
    float* logits;
    int64_t stride, vocab;
    const int32_t* tokens;
    const PenaltyRow* rows;
    int64_t count;

    int64_t work() const { return count == 0 ? 0 : rows[count - 1].end - rows[0].prompt; }
};

// Memory that all ranks of a group have mapped, zeroed when it was new. Slots follow: [size][2][slot_bytes].
struct Region {
    struct Line {
        alignas(64) std::atomic<uint64_t> written;  // parts, by this rank
    };
    static constexpr int64_t MOST_RANKS = 63;

    alignas(64) std::atomic<int32_t> broken;  // a rank has closed, or was waited for in vain
    int64_t slot_bytes;
    Line lines[MOST_RANKS];

    std::atomic<uint64_t>& written(int64_t rank) { return lines[rank].written; }
    char* slot(int64_t size, int64_t rank, int64_t turn) { return (char*)(this + 1) + (rank * 2 + turn) * slot_bytes; }
};

// What one rank says of itself. timeout: seconds that it waits for another one.
struct GroupCall {
    Region* region;
    int64_t rank, size;
    double timeout;
};

// y = x of rank 0 + x of rank 1 + ..., rows of so many floats.
struct AllReduce : GroupCall {
    const float* x;
    int64_t rows, width;
    float* y;

    int64_t work() const { return rows * width * size; }
};

// y's rows: those of all ranks side by side, of which the first out_bytes are kept. For the rank `root` alone, if
// that is not negative.
struct GatherRanks : GroupCall {
    int64_t root;
    const void* x;  // [rows] of row_bytes
    int64_t rows, row_bytes, out_bytes;
    void* y;

    int64_t work() const { return rows * out_bytes / 4; }
};

// Codes of a float weight, and scales that are searched for (quantize.cpp).
struct QuantizeCall {
    Format format;       // Q4 or Q8_FINE
    const void* weight;  // [rows][cols], float, or bfloat16 if bf16
    bool bf16;
    int64_t rows, cols;
    int8_t* codes;     // [rows][cols]
    void* scales;      // [rows][groups]
    uint16_t* halves;  // in half precision: Q4's least values [rows][groups], or what Q8_FINE's scales of a row are
                       // multiples of, [rows]

    int64_t work() const { return rows * cols * 64; }
};

template <class Call>
using Kernel = void (*)(const Call&, Team&);

struct Kernels {
    const char* name;
    Kernel<Linear> linear;
    Kernel<RouteCall> route;
    Kernel<MixtureCall> mixture;
    Kernel<Norm> rms_norm, layer_norm;
    Kernel<AttentionCall> attention[KV_FORMATS];
    Kernel<StoreCall> store_kv[KV_FORMATS];
    Kernel<Rope> rope;
    Kernel<Gather> gather;
    Kernel<Elementwise> elementwise;
    Kernel<Rows> log_softmax;
    Kernel<Draw> draw;
    Kernel<Penalties> penalise;
    Kernel<Mamba2Call> mamba2;
    Kernel<RmsScale> rms_scale;
    Kernel<AllReduce> all_reduce;
    Kernel<GatherRanks> gather_ranks;
    Kernel<QuantizeCall> quantize;
    bool eight_bit;  // whether Linear::x_int8 can be had
};

// quantize.cpp, compiled for each level; here results are the same at all of them
namespace generic { void quantize(const QuantizeCall&, Team&); }
namespace avx2 { void quantize(const QuantizeCall&, Team&); }
namespace avx512 { void quantize(const QuantizeCall&, Team&); }
namespace avx512bf16 { void quantize(const QuantizeCall&, Team&); }

// null where this build has no such level
extern const Kernels *const generic_kernels, *const avx2_kernels, *const avx512_kernels, *const avx512bf16_kernels;

}  // namespace nanovllm
