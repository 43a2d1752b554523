// The library's C interface, and the choice of a level. Nobody here owns memory: callers pass pointers.
#include <omp.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "kernels.h"

using namespace nanovllm;

namespace {

const Kernels* supported(int level) {
#if defined(__x86_64__)
    switch (level) {
        case 3:
            return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
                           __builtin_cpu_supports("avx512vbmi")
                       ? avx512bf16_kernels
                       : nullptr;
        case 2:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
                       ? avx512_kernels
                       : nullptr;
        case 1:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? avx2_kernels : nullptr;
    }
#endif
    return level == 0 ? generic_kernels : nullptr;
}

const Kernels* best() {
    for (int level = 3; level > 0; --level)
        if (const Kernels* found = supported(level)) return found;
    return generic_kernels;
}

const Kernels* active = best();

// What of a call follows the sizes of the step that it is part of.
using Counts = std::vector<int64_t*>;
Counts counts(Linear& c) { return {&c.m}; }
Counts counts(RouteCall& c) { return {&c.tokens}; }
Counts counts(MixtureCall& c) { return {&c.tokens}; }
Counts counts(Rows& c) { return {&c.outer}; }
Counts counts(Gather& c) { return {&c.count}; }
Counts counts(Elementwise& c) { return {&c.rows}; }
Counts counts(AttentionCall& c) { return {&c.batch}; }
Counts counts(StoreCall& c) { return {&c.tokens}; }
Counts counts(Mamba2Call& c) { return {&c.tokens, &c.batch}; }
Counts counts(RmsScale& c) { return {&c.rows}; }
Counts counts(Draw& c) { return {&c.rows}; }
Counts counts(Penalties& c) { return {&c.count}; }
Counts counts(AllReduce& c) { return {&c.rows}; }
Counts counts(GatherRanks& c) { return {&c.rows}; }
Counts counts(QuantizeCall& c) { return {&c.rows}; }

// A call that was recorded, to be run again: at the same addresses, on what lies there by then.
struct Step {
    virtual ~Step() = default;
    virtual int64_t work() const = 0;
    virtual void run(Team&) const = 0;
    virtual Counts counted() = 0;
};

template <class Call>
struct Recorded : Step {
    Kernel<Call> kernel;
    Call call;

    Recorded(Kernel<Call> kernel, const Call& call) : kernel(kernel), call(call) {}
    int64_t work() const override { return call.work(); }
    void run(Team& team) const override { kernel(call, team); }
    Counts counted() override { return counts(call); }
};

// A step's tokens, sequences, and rows that are sampled.
using Sizes = std::array<int64_t, 3>;

struct Tape {
    std::vector<std::unique_ptr<Step>> steps;
    std::vector<std::pair<int64_t*, int>> sized;  // counts of its calls, and which of a step's sizes they follow
};

thread_local Commons commons;
thread_local Tape* recording = nullptr;

template <class F>
void as_team(int threads, F f) {
    if (threads == 1) {
        Team alone(commons, 0, 1);
        return f(alone);
    }
    Commons& shared = commons;  // the calling thread's
#pragma omp parallel num_threads(threads)
    {
        Team team(shared, omp_get_thread_num(), omp_get_num_threads());
        f(team);
        team.barrier();  // no number is left for the next call to begin with
    }
}

// Of this thread's calls since it was last asked: 0, or -1 if one could not be completed.
int status() { return std::exchange(commons.failed, false) ? -1 : 0; }

template <class Call>
void submit(Kernel<Call> kernel, const Call& call, int threads) {
    if (recording != nullptr) return recording->steps.push_back(std::make_unique<Recorded<Call>>(kernel, call));
    as_team(call.work() < WORTH_A_THREAD ? 1 : threads, [&](Team& team) { kernel(call, team); });
}

}  // namespace

extern "C" {

// Raised whenever a function below changes; ops/library.py must agree.
int nv_abi() { return 13; }

const char* nv_level() { return active->name; }

// Whether linear layers can round their rows to 8 bits at this level.
int nv_eight_bit() { return active->eight_bit; }

// 0, or -1 if this processor or this build has no such level. Not while kernels run.
int nv_set_level(const char* name) {
    for (int level = 0; level < 4; ++level) {
        const Kernels* found = supported(level);
        if (found != nullptr && std::strcmp(found->name, name) == 0) {
            active = found;
            return 0;
        }
    }
    return -1;
}

// --- recording: as a CUDA graph does on a GPU ---------------------------------------------------------

// From now on this thread's calls of the functions below are written down instead; pack is not one of them.
void nv_record() { recording = new Tape; }

Tape* nv_recorded() {
    Tape* tape = recording;
    recording = nullptr;
    return tape;
}

void nv_free(Tape* tape) { delete tape; }

// That the tape was recorded at these sizes, which differ from one another: from now on it can be resized. -1 if one of
// its calls follows none of them.
int nv_fit(Tape* tape, int64_t tokens, int64_t sequences, int64_t sampled) {
    const Sizes sizes = {tokens, sequences, sampled};
    for (const auto& step : tape->steps)
        for (int64_t* count : step->counted()) {
            const auto which = std::find(sizes.begin(), sizes.end(), *count);
            if (which == sizes.end()) return -1;
            tape->sized.push_back({count, (int)(which - sizes.begin())});
        }
    return 0;
}

// To be replayed for a step of such sizes, none larger than the recorded one's.
void nv_resize(Tape* tape, int64_t tokens, int64_t sequences, int64_t sampled) {
    const Sizes sizes = {tokens, sequences, sampled};
    for (const auto& [count, which] : tape->sized) *count = sizes[which];
}

// All calls of a tape in their order, by threads that are started once. Neighbouring calls of little work
// are left to one thread, which needs to wait for nobody. -1 if another rank was waited for in vain: what was
// computed is worth nothing then.
int nv_replay(const Tape* tape, int threads) {
    as_team(threads, [&](Team& team) {
        Team alone(commons, 0, 1);
        bool apart = false;
        for (const auto& step : tape->steps) {
            if (team.threads == 1 || step->work() < WORTH_A_THREAD) {
                if (team.thread == 0) step->run(alone);
                apart = true;
                continue;
            }
            if (apart) team.barrier();
            step->run(team);
            team.barrier();
            apart = false;
        }
    });
    return status();
}

// --- kernels --------------------------------------------------------------------------------------------

// format: the weight's, of formats.h. A float weight takes float rows only.
void nv_linear(const void* x, int64_t ldx, int x_bf16, const void* weight, int format, const int32_t* columns, const float* bias,
               const float* residual, int64_t ldr, void* y, int64_t ldy, int y_bf16, int64_t m, int64_t n, int64_t k,
               int act, int gated, int x_int8, int threads) {
    const Linear call = {x,   ldx,         x_bf16 != 0, weight, bias, residual,        ldr,
                         y,   ldy,         y_bf16 != 0, m,      n,    k,               (Activation)act,
                         gated != 0, (Format)format, columns, x_int8 != 0};
    submit(active->linear, call, threads);
}

void nv_route(const float* scores, int64_t tokens, int64_t experts, int64_t k, int normalise, float* weights,
              int32_t* chosen, int threads) {
    const RouteCall call = {scores, tokens, experts, k, normalise != 0, weights, chosen};
    submit(active->route, call, threads);
}

void nv_mixture(const float* x, int64_t ldx, const float* weights, const int32_t* chosen, int64_t first,
                int64_t tokens, int64_t experts, int64_t k, int64_t hidden, int64_t inner, const void* gate_up, const void* down,
                int64_t gate_up_bytes, int64_t down_bytes, int gate_up_format, int down_format,
                const int32_t* gate_up_columns, const int32_t* down_columns, int act, int x_int8, float* out,
                int32_t* index, void* fed, float* results, int threads) {
    const MixtureCall call = {x,       ldx,           weights,    chosen, first, tokens, experts, k, hidden, inner,
                              gate_up, down,          gate_up_bytes, down_bytes, (Format)gate_up_format,
                              (Format)down_format,    gate_up_columns, down_columns, (Activation)act, x_int8 != 0, out, index, fed,
                              results};
    submit(active->mixture, call, threads);
}

void nv_rms_norm(const float* x, int64_t outer, int64_t inner, int64_t outer_stride, int64_t inner_stride, int64_t size,
                 const float* weight, float eps, float* y, int threads) {
    const Norm call = {{x, outer, inner, outer_stride, inner_stride, size, y}, weight, nullptr, eps};
    submit(active->rms_norm, call, threads);
}

void nv_layer_norm(const float* x, int64_t outer, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                   int64_t size, const float* weight, const float* bias, float eps, float* y, int threads) {
    const Norm call = {{x, outer, inner, outer_stride, inner_stride, size, y}, weight, bias, eps};
    submit(active->layer_norm, call, threads);
}

void nv_rope(const float* x, int64_t outer, int64_t inner, int64_t outer_stride, int64_t inner_stride, int64_t size,
             const float* cos, const float* sin, int64_t half, float* y, int threads) {
    const Rope call = {{x, outer, inner, outer_stride, inner_stride, size, y}, cos, sin, half};
    submit(active->rope, call, threads);
}

void nv_gather(const void* table, int format, int packed, int64_t first, int64_t rows, const int64_t* ids, int64_t count,
               int64_t width, float* y, int threads) {
    const Gather call = {table, (Format)format, packed != 0, first, rows, ids, count, width, y};
    submit(active->gather, call, threads);
}

void nv_elementwise(int map, const float* x, const float* y, float a, float b, float* out, int64_t rows, int64_t width,
                    int threads) {
    const Elementwise call = {(Map)map, x, y, a, b, out, rows, width};
    submit(active->elementwise, call, threads);
}

// format: a KVFormat.
void nv_attention(const float* q, int64_t q_stride, float* out, const void* keys, const void* values, int format,
                  int64_t page_size, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t batch,
                  const int32_t* query_start, const int32_t* seq_lens, const int32_t* tables, int64_t table_stride,
                  float scale, int64_t window, const float* slopes, int rounded, float factor, int threads) {
    const AttentionCall call = {q,     q_stride,    out,      keys,   values,       page_size, heads,
                                kv_heads, head_dim, batch,    query_start, seq_lens, tables, table_stride,
                                scale, window,      slopes,   rounded != 0, factor};
    submit(active->attention[format], call, threads);
}

void nv_store_kv(const float* k, const float* v, int64_t k_stride, int64_t v_stride, int64_t tokens,
                 const int64_t* slots, void* keys, void* values, int format, int64_t page_size, int64_t kv_heads,
                 int64_t head_dim, int threads) {
    const StoreCall call = {k, v, k_stride, v_stride, tokens, slots, keys, values, page_size, kv_heads, head_dim};
    submit(active->store_kv[format], call, threads);
}

void nv_log_softmax(const float* x, int64_t stride, int64_t rows, int64_t size, float* y, int threads) {
    const Rows call = {x, rows, 1, stride, 0, size, y};
    submit(active->log_softmax, call, threads);
}

// how: null for the largest of each row.
void nv_draw(const float* logits, int64_t stride, int64_t rows, int64_t vocab, const DrawRow* how, int64_t* tokens,
             int threads) {
    const Draw call = {logits, stride, rows, vocab, how, tokens};
    submit(active->draw, call, threads);
}

void nv_penalise(float* logits, int64_t stride, int64_t vocab, const int32_t* tokens, const PenaltyRow* rows,
                 int64_t count, int threads) {
    const Penalties call = {logits, stride, vocab, tokens, rows, count};
    submit(active->penalise, call, threads);
}

void nv_mamba2(const float* projected, int64_t stride, float* out, int64_t heads, int64_t head_dim, int64_t groups,
               int64_t state_size, int64_t kernel, float shortest, float longest, float eps, const float* filters,
               const float* conv_bias, const float* A, const float* D, const float* dt_bias, const float* norm,
               float* squares, float* conv_states, float* states, int64_t tokens, int64_t batch, const int32_t* query_start,
               const int32_t* seq_lens, const int32_t* slots, int threads) {
    const Mamba2Call call = {projected, stride,  out,       heads,    head_dim, groups,      state_size, kernel,
                             shortest,  longest, eps,       filters,  conv_bias, A,          D,          dt_bias,
                             norm,      squares, conv_states, states, tokens,   batch,       query_start, seq_lens,
                             slots};
    submit(active->mamba2, call, threads);
}

void nv_rms_scale(const float* x, const float* squares, const float* weight, int64_t rows, int64_t size, int64_t over,
                  float eps, float* y, int threads) {
    const RmsScale call = {x, squares, weight, rows, size, over, eps, y};
    submit(active->rms_scale, call, threads);
}

void nv_quantize(int format, const void* weight, int bf16, int64_t rows, int64_t cols, int8_t* codes, void* scales,
                 uint16_t* halves, int threads) {
    const QuantizeCall call = {(Format)format, weight, bf16 != 0, rows, cols, codes, scales, halves};
    submit(active->quantize, call, threads);
}

// --- between the ranks of a group ---------------------------------------------------------------------------

// Bytes of the memory that `size` ranks share, or -1 for too many of them.
int64_t nv_region_bytes(int64_t size, int64_t slot_bytes) {
    return size > Region::MOST_RANKS ? -1 : sizeof(Region) + size * 2 * slot_bytes;
}

// Before any rank uses it. The memory is zeroed.
void nv_region_init(Region* region, int64_t slot_bytes) { region->slot_bytes = slot_bytes; }

// From now on nobody waits for anybody.
void nv_region_break(Region* region) { region->broken.store(1); }

// 0, or -1 if another rank was waited for in vain; while recording always 0.
int nv_all_reduce(Region* region, int64_t rank, int64_t size, double timeout, const float* x, int64_t rows,
                  int64_t width, float* y, int threads) {
    const AllReduce call = {{region, rank, size, timeout}, x, rows, width, y};
    submit(active->all_reduce, call, threads);
    return status();
}

int nv_gather_ranks(Region* region, int64_t rank, int64_t size, double timeout, int64_t root, const void* x,
                    int64_t rows, int64_t row_bytes, int64_t out_bytes, void* y, int threads) {
    const GatherRanks call = {{region, rank, size, timeout}, root, x, rows, row_bytes, out_bytes, y};
    submit(active->gather_ranks, call, threads);
    return status();
}
}
