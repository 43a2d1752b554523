// What the kernels of one instruction set offer, and how a call describes its work.
//
// The same source is compiled once for each instruction set (level_*.cpp) and gives one table each;
// library.cpp picks a table when the library is loaded. All kernels keep one promise: the bits of an
// output row depend on its input row and on the weights alone, not on the other rows, not on their
// number, and not on the number of threads. Bits may differ from one instruction set to another.
#pragma once

#include <cstdint>

namespace nanovllm {

constexpr int PANEL = 16;  // output columns that lie side by side in a packed weight

enum class Activation : int { NONE, SILU, GELU, GELU_TANH, RELU };

// y = x w^T + bias. A packed weight is pairs of panels, [pairs][k / 2][2][16][2] bfloat16 or
// [pairs][k][2][16] float, with zeros beyond n and beyond an odd k: one stream for a tile of two panels.
// With a gate, even panels hold the gate's rows and odd ones the other half's:
// y = gate(x w_even^T + bias[:n]) * (x w_odd^T + bias[n:]).
struct Linear {
    const void* x;  // [m] rows of k, ldx elements apart; float, or bfloat16 if x_bf16
    int64_t ldx;
    bool x_bf16;
    const void* weight;
    const float* bias;  // may be null
    void* y;            // [m] rows of n, ldy elements apart; float, or bfloat16 if y_bf16
    int64_t ldy;
    bool y_bf16;
    int64_t m, n, k;
    Activation gate;
};

// Rows [outer][inner] of `size` floats at strides of so many elements; results are contiguous.
struct Rows {
    const float* x;
    int64_t outer, inner, outer_stride, inner_stride, size;
    float* y;
};

// Attention of a step's queries over pages; layout of the cache: attention.h.
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
};

// A step's keys and values, [tokens][kv_heads][head_dim], into their slots.
struct StoreCall {
    const float *k, *v;
    int64_t k_stride, v_stride, tokens;
    const int64_t* slots;
    void *keys, *values;
    int64_t page_size, kv_heads, head_dim;
};

struct Kernels {
    const char* name;
    void (*linear_bf16)(const Linear&, int threads);
    void (*linear_f32)(const Linear&, int threads);
    void (*rms_norm)(const Rows&, const float* weight, float eps, int threads);
    // bias may be null
    void (*layer_norm)(const Rows&, const float* weight, const float* bias, float eps, int threads);
    void (*attention_bf16)(const AttentionCall&, int threads);
    void (*attention_f32)(const AttentionCall&, int threads);
    void (*store_bf16)(const StoreCall&, int threads);
    void (*store_f32)(const StoreCall&, int threads);
    // cos and sin: [outer][half]; pairs are (i, i + half); what lies behind them is copied
    void (*rope)(const Rows&, const float* cos, const float* sin, int64_t half, int threads);
};

// null where this build has no such level
extern const Kernels *const generic_kernels, *const avx2_kernels, *const avx512_kernels, *const avx512bf16_kernels;

}  // namespace nanovllm
