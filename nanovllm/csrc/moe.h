// A sparse mixture of experts: which experts a token goes to, and what they make of it.
//
// The (token, choice) pairs are put in the order of their experts, and each expert's pairs are rows of
// two linear layers as any others (gemm.h), so a row's bits are those of a plain linear layer. A token's
// results are summed in the order of its choices. Weights of experts that nobody chose are not read.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "linear.h"
#include "vec.h"

namespace {

using namespace nanovllm;

// --- routing -----------------------------------------------------------------------------------------

// The k largest scores, best first; of equal ones the lower expert first. Scores that are not numbers give
// some experts, but never one twice.
inline void choose(const float* scores, int64_t experts, int64_t k, int32_t* chosen) {
    for (int64_t e = 0, count = 0; e < experts; ++e) {
        int64_t at = count;
        while (at > 0 && scores[e] > scores[chosen[at - 1]]) --at;
        if (at == k) continue;
        count = std::min(count + 1, k);
        for (int64_t i = count - 1; i > at; --i) chosen[i] = chosen[i - 1];
        chosen[at] = e;
    }
}

// Sum of e^(score - largest).
inline float sum_of_exponentials(const float* scores, int64_t count, float largest) {
    V total = {};
    for (int64_t i = 0; i < count; i += WIDTH) {
        const int64_t lanes = std::min<int64_t>(WIDTH, count - i);
        V e = exp(load_part(scores + i, lanes) - largest);
        for (int64_t l = lanes; l < WIDTH; ++l) e[l] = 0;
        total += e;
    }
    return sum(total);
}

void route(const RouteCall& call, Team& team) {
    team.share(call.tokens, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t) {
            const float* scores = call.scores + t * call.experts;
            int32_t* chosen = call.chosen + t * call.k;
            float* weights = call.weights + t * call.k;
            choose(scores, call.experts, call.k, chosen);
            for (int64_t i = 0; i < call.k; ++i) weights[i] = scores[chosen[i]];
            const float largest = weights[0];
            const float total = call.normalise ? sum_of_exponentials(weights, call.k, largest)
                                               : sum_of_exponentials(scores, call.experts, largest);
            for (int64_t i = 0; i < call.k; i += WIDTH) {
                const int64_t lanes = std::min<int64_t>(WIDTH, call.k - i);
                store_part(weights + i, exp(load_part(weights + i, lanes) - largest) / total, lanes);
            }
        }
    });
}

// --- pairs in the order of their experts ----------------------------------------------------------------

// Where things lie in MixtureCall::index.
struct Grouped {
    int32_t* begin;   // [experts + 1]: an expert's pairs
    int32_t* tokens;  // [pairs]: whose they are
    int32_t* places;  // [tokens][k]: where a token's pairs have come to lie; -1 for an expert that is not here
    int32_t* tasks;   // [2][experts + 1]: an expert's tasks of the first and of the second linear layer

    explicit Grouped(const MixtureCall& c)
        : begin(c.index),
          tokens(begin + c.experts + 1),
          places(tokens + c.tokens * c.k),
          tasks(places + c.tokens * c.k) {}
};

inline void group(const MixtureCall& c, const Grouped& to) {
    const int64_t pairs = c.tokens * c.k;
    auto expert = [&](int64_t pair) -> int64_t {
        const int64_t e = c.chosen[pair] - c.first;
        return e < c.experts ? e : -1;
    };
    std::fill(to.begin, to.begin + c.experts + 1, 0);
    for (int64_t i = 0; i < pairs; ++i)
        if (const int64_t e = expert(i); e >= 0) ++to.begin[e + 1];
    for (int64_t e = 0; e < c.experts; ++e) to.begin[e + 1] += to.begin[e];
    std::copy(to.begin, to.begin + c.experts, to.tasks);  // for a moment: where the next one goes
    for (int64_t i = 0; i < pairs; ++i) {
        const int64_t e = expert(i);
        to.places[i] = e < 0 ? -1 : to.tasks[e]++;
        if (e >= 0) to.tokens[to.places[i]] = i / c.k;
    }
}

// Cut the experts' panels into tasks of about the same work, eight a thread: enough for threads to end at
// about the same time, and few, as each copies its rows of x.
inline void plan(const MixtureCall& c, const Grouped& g, int64_t panel_pairs, int threads, int32_t* tasks) {
    constexpr int64_t WEIGHT = 8;  // rows that take as long as fetching the weight
    auto work = [&](int64_t e) {
        const int64_t rows = g.begin[e + 1] - g.begin[e];
        return rows == 0 ? 0 : (rows + WEIGHT) * panel_pairs;
    };
    int64_t total = 0;
    for (int64_t e = 0; e < c.experts; ++e) total += work(e);
    const int64_t piece = threads == 1 ? total : divide_up(total, 8 * threads);
    const int64_t most = std::max<int64_t>(1, panel_pairs / 4);
    tasks[0] = 0;
    for (int64_t e = 0; e < c.experts; ++e)
        tasks[e + 1] = tasks[e] + (work(e) == 0 ? 0 : std::min(divide_up(work(e), piece), most));
}

// --- the experts ----------------------------------------------------------------------------------------

// One of the two linear layers over all pairs. all: expert 0's, with the pairs of all experts as its rows.
inline void grouped_linear(const Linear& all, int64_t expert_bytes, const Grouped& g, int64_t experts,
                           const int32_t* tasks, Team& team) {
    const int64_t pairs = panel_pairs(all);
    team.each(tasks[experts], [&](int64_t task) {
        const int64_t e = std::upper_bound(tasks, tasks + experts + 1, task) - tasks - 1;
        const int64_t i = task - tasks[e], count = tasks[e + 1] - tasks[e];
        Linear mine = all;
        mine.weight = (const char*)all.weight + e * expert_bytes;
        if (all.columns != nullptr) mine.columns = all.columns + e * all.k;
        part(mine, g.begin[e], g.begin[e + 1], i * pairs / count, (i + 1) * pairs / count);
    });
}

inline void sum_choices(const MixtureCall& c, const Grouped& g, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
        const float* weights = c.weights + t * c.k;
        const int32_t* places = g.places + t * c.k;
        float* out = c.out + t * c.hidden;
        int64_t h = 0;
        for (; h + WIDTH <= c.hidden; h += WIDTH) {
            V total = {};
            for (int64_t i = 0; i < c.k; ++i)
                if (places[i] >= 0) total += weights[i] * load(c.results + places[i] * c.hidden + h);
            store(out + h, total);
        }
        for (; h < c.hidden; ++h) {
            out[h] = 0;
            for (int64_t i = 0; i < c.k; ++i)
                if (places[i] >= 0) out[h] += weights[i] * c.results[places[i] * c.hidden + h];
        }
    }
}

void mixture(const MixtureCall& c, Team& team) {
    const bool bf16 = c.gate_up_format != Format::F32;
    const Grouped g(c);
    const int64_t pairs = c.tokens * c.k;
    Linear first = {c.x,   c.ldx,   false,    c.gate_up, nullptr, nullptr, 0, c.fed, c.inner, bf16,
                    pairs, c.inner, c.hidden, c.act,     true,    c.gate_up_format, c.gate_up_columns, c.x_int8};
    first.rows = g.tokens;
    const Linear second = {c.fed, c.inner,  bf16,    c.down,           nullptr, nullptr,      0, c.results, c.hidden, false,
                           pairs, c.hidden, c.inner, Activation::NONE, false,   c.down_format, c.down_columns, c.x_int8};
    int32_t *first_tasks = g.tasks, *second_tasks = g.tasks + c.experts + 1;
    if (team.thread == 0) {
        group(c, g);
        plan(c, g, panel_pairs(first), team.threads, first_tasks);
        plan(c, g, panel_pairs(second), team.threads, second_tasks);
    }
    team.barrier();
    grouped_linear(first, c.gate_up_bytes, g, c.experts, first_tasks, team);
    team.barrier();
    grouped_linear(second, c.down_bytes, g, c.experts, second_tasks, team);
    team.barrier();
    team.share(c.tokens, [&](int64_t from, int64_t until) { sum_choices(c, g, from, until); });
}

}  // namespace
