// From logits to tokens: each row by itself, by one thread.
//
// A cut keeps tokens by value: all that are no smaller than some `floor`, which is sought by partition and
// never by a sort. Sums are double and in a fixed order.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "vec.h"

namespace {

using namespace nanovllm;

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int SAMPLES = 32;      // of values, from which a pivot is guessed
constexpr int64_t LIKELIEST = 512;  // tokens, which are most of the mass as a rule
constexpr int64_t STRETCH = 1024;  // tokens whose weights are summed up before the draw

// A vector of a row of n; minus infinity behind the end.
inline V at(const float* x, int64_t i, int64_t n) {
    if (i + WIDTH <= n) return load(x + i);
    V v = splat(-INF);
    memcpy(&v, x + i, (n - i) * sizeof(float));
    return v;
}

// NaN if there is one.
float largest(const float* x, int64_t n) {
    V most = splat(-INF), sum = {};
    for (int64_t i = 0; i < n; i += WIDTH) {
        const V v = at(x, i, n);
        most = v > most ? v : most;
        sum = v == v ? sum : v;
    }
    float result = most[0];
    for (int l = 0; l < WIDTH; ++l) {
        if (sum[l] != sum[l]) return sum[l];
        result = std::max(result, most[l]);
    }
    return result;
}

// The first one of the largest; NaN counts as larger than all, as in torch.
int64_t argmax(const float* x, int64_t n) {
    const float most = largest(x, n);
    for (int64_t first = 0; first < n; first += STRETCH) {
        const int64_t end = std::min(n, first + STRETCH);
        I found = {};
        for (int64_t i = first; i < end; i += WIDTH) {
            const V v = at(x, i, end);
            found |= (v == most) | (v != v);
        }
        if (!any(found)) continue;
        for (int64_t i = first; i < end; ++i)
            if (x[i] == most || x[i] != x[i]) return i;
    }
    return n - 1;
}

class Mass {  // a sum of floats in double
public:
    void add(V v) {
        Half low, high;
        memcpy(&low, &v, sizeof low);
        memcpy(&high, (const char*)&v + sizeof low, sizeof high);
        low_ += __builtin_convertvector(low, D);
        high_ += __builtin_convertvector(high, D);
    }
    double total() const {
        double sum = 0;
        for (int l = 0; l < WIDTH / 2; ++l) sum += low_[l];
        for (int l = 0; l < WIDTH / 2; ++l) sum += high_[l];
        return sum;
    }

private:
    typedef float Half __attribute__((vector_size(2 * WIDTH)));
    typedef double D __attribute__((vector_size(4 * WIDTH)));
    D low_ = {}, high_ = {};
};

// Probability up to a factor; none for what is forbidden or too small for fp32.
inline V weight(V x, float top) {
    const V shifted = x - top;
    return shifted < -87.0f ? splat(0.0f) : exp(shifted);
}

// --- cuts ------------------------------------------------------------------------------------------

// In descending order; without branches, as nobody could predict them.
void sort_samples(float* samples, int64_t count) {
    float unsorted[SAMPLES + WIDTH];
    memcpy(unsorted, samples, count * sizeof(float));
    for (int64_t first = 0; first < count; first += WIDTH) {
        const V mine = at(unsorted, first, count);
        I rank = {}, place;
        for (int l = 0; l < WIDTH; ++l) place[l] = first + l;
        for (int32_t other = 0; other < count; ++other)
            rank -= (unsorted[other] > mine) | ((unsorted[other] == mine) & (other < place));
        for (int64_t l = 0; l < std::min<int64_t>(WIDTH, count - first); ++l) samples[rank[l]] = mine[l];
    }
}

// Values that are no smaller than the wanted floor are worth `goal` by a measure, and those above it less.
// candidates, n: the values in no order; destroyed. total: what they are worth.
template <class Measure>
float find_floor(float* candidates, int64_t n, double goal, double total, Measure measure) {
    float samples[SAMPLES + WIDTH], worth[SAMPLES + WIDTH];
    for (bool halve = false;;) {
        const int64_t count = std::min<int64_t>(n, SAMPLES);
        for (int64_t s = 0; s < count; ++s) samples[s] = candidates[s * n / count];
        sort_samples(samples, count);
        double sampled = 0;
        for (int64_t s = 0; s < count; s += WIDTH) store(worth + s, measure(at(samples, s, count)));
        for (int64_t s = 0; s < count; ++s) sampled += worth[s];
        // the sample that falls where the goal would be if all were like the samples
        const double wanted = count == n ? goal : goal / total * sampled;
        int64_t s = 0;
        for (double sum = worth[0]; sum < wanted && s + 1 < count; sum += worth[s]) ++s;
        if (count == n) return samples[s];
        const float pivot = samples[halve ? count / 2 : s];

        Mass above;
        I equal = {};
        for (int64_t i = 0; i < n; i += WIDTH) {
            const V v = at(candidates, i, n);
            above.add(v > pivot ? measure(v) : splat(0.0f));
            equal -= v == pivot;
        }
        const double more = above.total(), same = (double)sum(equal) * measure(splat(pivot))[0];
        const bool up = more >= goal;
        if (!up && more + same >= goal) return pivot;
        int64_t kept = 0;
        for (int64_t i = 0; i < n; i += WIDTH) {
            const V v = at(candidates, i, n);
            kept += store_lanes(candidates + kept, v, up ? v > pivot : (v < pivot) & (v > -INF));
        }
        if (kept == 0) return pivot;  // only rounding keeps the goal out of reach
        total = up ? more : total - more - same;
        if (!up) goal -= more + same;
        halve = !halve && kept > n / 2;  // a guess that misled must not do so again and again
        n = kept;
    }
}

struct Scaled {  // a row of logits over its temperature; minus infinity up to a whole vector behind the end
    const float* values;
    int64_t size;
    float top;

    V operator[](int64_t i) const { return load(values + i); }

    V kept_weight(int64_t i, float floor) const {
        const V v = (*this)[i];
        return v >= floor ? weight(v, top) : splat(0.0f);
    }

    double mass(int64_t first, int64_t last, float floor) const {
        Mass mass;
        for (int64_t i = first; i < std::min(size, last); i += WIDTH)
            if (any((*this)[i] >= floor)) mass.add(kept_weight(i, floor));  // few are behind a cut
        return mass.total();
    }

    // The smallest value that is at least min_p times as likely as the likeliest.
    float min_p_floor(double min_p) const {
        float share = min_p;
        if (share < min_p) share = std::nextafter(share, INF);
        V least = splat(INF);
        for (int64_t i = 0; i < size; i += WIDTH) {
            const V v = (*this)[i];
            least = (weight(v, top) >= share) & (v < least) ? v : least;
        }
        float floor = top;
        for (int l = 0; l < WIDTH; ++l) floor = std::min(floor, least[l]);
        return floor;
    }

    // Values no smaller than floor, in the vocabulary's order; `to` has room for a vector more than the row.
    int64_t gather(float floor, float* to) const {
        int64_t count = 0;
        for (int64_t i = 0; i < size; i += WIDTH) {
            const V v = (*this)[i];
            count += store_lanes(to + count, v, v >= floor);
        }
        return count;
    }

    // A value that twice as many as `count` should exceed, guessed from samples.
    float guess(int64_t count) const {
        float samples[SAMPLES + WIDTH];
        for (int64_t s = 0; s < SAMPLES; ++s) samples[s] = values[s * size / SAMPLES];
        sort_samples(samples, SAMPLES);
        return samples[std::min<int64_t>(2 * count * SAMPLES / size, SAMPLES - 1)];
    }

    float top_k_floor(int64_t top_k, float floor, float* to) const {
        int64_t count = gather(std::max(floor, guess(top_k)), to);
        if (count < top_k && (count = gather(floor, to)) <= top_k) return floor;
        return find_floor(to, count, top_k, count, [](V) { return splat(1.0f); });
    }

    float cut(const DrawRow& how, float* values) const {
        float floor = how.min_p > 0 ? min_p_floor(how.min_p) : std::numeric_limits<float>::lowest();
        if (how.top_k > 0 && how.top_k < size) floor = top_k_floor(how.top_k, floor, values);
        return how.top_p < 1 ? top_p_floor(how.top_p, floor, values) : floor;
    }

    // Sought among the likeliest first, then among all but those so unlikely that all of them may be dropped.
    float top_p_floor(double top_p, float floor, float* to) const {
        const double total = mass(0, size, floor), goal = top_p * total;
        int64_t count = gather(std::max(floor, guess(LIKELIEST)), to);
        Mass found;
        for (int64_t i = 0; i < count; i += WIDTH) found.add(weight(at(to, i, count), top));
        double worth = found.total();
        if (worth < goal) {
            const float enough = top + std::log((total - goal) / size) - 1e-3f;
            count = gather(std::max(floor, enough), to), worth = total;
        }
        return find_floor(to, count, goal, worth, [this](V v) { return weight(v, top); });
    }

    // The token where the mass, summed in the vocabulary's order, first exceeds the uniform's share of it.
    int64_t draw(float floor, double uniform, double* sums) const {
        double total = 0;
        for (int64_t first = 0; first < size; first += STRETCH)
            total += sums[first / STRETCH] = mass(first, first + STRETCH, floor);
        // a share that is rounded up to all of it would be exceeded by no token
        const double target = std::min(uniform * total, std::nextafter(total, 0.0));
        double sum = 0;
        int64_t first = 0;
        while (sum + sums[first / STRETCH] <= target) sum += sums[first / STRETCH], first += STRETCH;
        int64_t last = first;
        for (int64_t i = first; i < std::min(size, first + STRETCH); i += WIDTH) {
            const V w = kept_weight(i, floor);
            for (int l = 0; l < WIDTH; ++l) {
                sum += w[l];
                if (sum > target) return i + l;
                if (w[l] > 0) last = i + l;
            }
        }
        return last;  // one by one the weights came to a little less than together
    }
};

int64_t draw_token(const float* logits, int64_t size, const DrawRow& how) {
    static thread_local Scratch scratch;
    const int64_t room = size + 2 * WIDTH;
    float* scaled = (float*)scratch.get(2 * room * sizeof(float) + (size / STRETCH + 1) * sizeof(double));
    const float top = largest(logits, size) / how.temperature;
    if (!std::isfinite(top)) return size - 1;  // no distribution: a broken model, but a valid id
    for (int64_t i = 0; i < size; i += WIDTH) store(scaled + i, at(logits, i, size) / how.temperature);
    const Scaled row = {scaled, size, top};
    return row.draw(row.cut(how, scaled + room), how.uniform, (double*)(scaled + 2 * room));
}

// --- kernels ---------------------------------------------------------------------------------------

void draw(const Draw& call, Team& team) {
    team.each(call.rows, [&](int64_t r) {
        const float* logits = call.logits + r * call.stride;
        const bool greedy = call.how == nullptr || call.how[r].temperature == 0;
        call.tokens[r] = greedy ? argmax(logits, call.vocab) : draw_token(logits, call.vocab, call.how[r]);
    });
}

void log_softmax(const Rows& rows, Team& team) {
    const int64_t size = rows.size;
    each_row(rows, team, [=](const float* x, float* y, int64_t) {
        const float top = largest(x, size);
        Mass mass;
        for (int64_t i = 0; i < size; i += WIDTH) mass.add(weight(at(x, i, size), top));
        const float shift = std::log(mass.total());
        for (int64_t i = 0; i < size; i += WIDTH)
            store_part(y + i, (at(x, i, size) - top) - shift, std::min<int64_t>(WIDTH, size - i));
    });
}

// Repetition over prompt and output, then frequency and presence over the output; each token once.
void penalise(const Penalties& call, Team& team) {
    constexpr int32_t DONE = -1;
    static thread_local Scratch scratch;
    int32_t* counts = (int32_t*)scratch.get(call.vocab * sizeof(int32_t));
    memset(counts, 0, call.vocab * sizeof(int32_t));
    team.each(call.count, [&](int64_t r) {
        const PenaltyRow& p = call.rows[r];
        float* logits = call.logits + p.row * call.stride;
        for (int64_t i = p.output; i < p.end; ++i) ++counts[call.tokens[i]];
        const int64_t first = p.repetition == 1 ? p.output : p.prompt;
        for (int64_t i = first; i < p.end; ++i) {
            int32_t& count = counts[call.tokens[i]];
            if (count == DONE) continue;
            float& x = logits[call.tokens[i]];
            if (p.repetition != 1) x = x > 0 ? x / p.repetition : x * p.repetition;
            if (count > 0) x -= (float)(p.frequency * count + p.presence);
            count = DONE;
        }
        for (int64_t i = first; i < p.end; ++i) counts[call.tokens[i]] = 0;
    });
}

}  // namespace
