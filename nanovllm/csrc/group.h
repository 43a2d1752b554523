// What the ranks of a tensor-parallel group do together when they run on one host: sums and gathers through a
// region of memory that each of them has mapped.
//
// A rank writes its part into a slot of its own, says so, waits for the others, and reads all slots in the
// order of the ranks: every rank adds the same terms in the same order. A rank has two slots and uses them in
// turns, so one meeting an exchange is enough: nobody says that the next part lies there before it has read
// the one before, and a slot is written again only after that.
#pragma once

#include <algorithm>
#include <chrono>
#include <thread>

#include "kernels.h"
#include "vec.h"

namespace {

using namespace nanovllm;

constexpr double A_WHILE = 0.01;  // seconds, after which a rank that waits rather sleeps

// All ranks have written as many parts as this one, or false: one is gone, or does not come in time.
inline bool meet(const GroupCall& c) {
    using Clock = std::chrono::steady_clock;
    Region& region = *c.region;
    if (region.broken.load(std::memory_order_relaxed)) return false;  // who has left does not come again
    const uint64_t mine = region.written(c.rank).fetch_add(1, std::memory_order_acq_rel) + 1;
    const Clock::time_point start = Clock::now();
    for (int64_t rank = 0; rank < c.size; ++rank) {
        for (int spins = 0; region.written(rank).load(std::memory_order_acquire) < mine; ++spins) {
            if (region.broken.load(std::memory_order_relaxed)) return false;
            if (spins < Team::SPINS) {
                Team::pause();
                continue;
            }
            const double waited = std::chrono::duration<double>(Clock::now() - start).count();
            if (waited > c.timeout) {
                region.broken.store(1, std::memory_order_relaxed);  // the others need not wait for this one
                return false;
            }
            if (waited < A_WHILE)
                std::this_thread::yield();
            else
                std::this_thread::sleep_for(std::chrono::microseconds(100));
        }
    }
    return true;  // even if one has left since: it has read what it needs, and its part lies here
}

// take(at, count, slot): bytes [at, at + count) of all ranks' parts lie at slot(rank), those of this rank only if it
// gives them to others.
template <class F>
void exchange(const GroupCall& c, const void* part, int64_t bytes, bool gives, Team& team, F take) {
    for (int64_t at = 0; at < bytes && !team.failed(); at += c.region->slot_bytes) {
        const int64_t count = std::min(bytes - at, c.region->slot_bytes);
        const uint64_t turn = c.region->written(c.rank).load(std::memory_order_relaxed) % 2;
        const auto slot = [&](int64_t rank) { return c.region->slot(c.size, rank, turn); };
        if (gives) team.share((count + 63) / 64, [&](int64_t first, int64_t last) {
            const int64_t from = first * 64, until = std::min(last * 64, count);
            memcpy(slot(c.rank) + from, (const char*)part + at + from, until - from);
        });
        team.barrier();
        if (team.thread == 0 && !meet(c)) team.fail();
        team.barrier();
        if (!team.failed()) take(at, count, slot);
    }
}

void all_reduce(const AllReduce& c, Team& team) {
    exchange(c, c.x, c.rows * c.width * sizeof(float), true, team, [&](int64_t at, int64_t count, auto slot) {
        float* y = c.y + at / sizeof(float);
        const int64_t n = count / sizeof(float);
        team.share((n + WIDTH - 1) / WIDTH, [&](int64_t first, int64_t last) {
            for (int64_t i = first * WIDTH; i < std::min(last * WIDTH, n); i += WIDTH) {
                const int64_t lanes = std::min<int64_t>(WIDTH, n - i);
                V sum = load_part((const float*)slot(0) + i, lanes);
                for (int64_t rank = 1; rank < c.size; ++rank) sum += load_part((const float*)slot(rank) + i, lanes);
                store_part(y + i, sum, lanes);
            }
        });
    });
}

void gather_ranks(const GatherRanks& c, Team& team) {
    const bool gives = c.root != c.rank, takes = c.root < 0 || c.root == c.rank;
    exchange(c, c.x, c.rows * c.row_bytes, gives, team, [&](int64_t at, int64_t count, auto slot) {
        if (!takes) return;
        const int64_t begin = at / c.row_bytes, end = (at + count + c.row_bytes - 1) / c.row_bytes;
        team.share((end - begin) * c.size, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) {
                const int64_t row = begin + i / c.size, rank = i % c.size;
                const int64_t from = std::max(at, row * c.row_bytes), until = std::min(at + count, (row + 1) * c.row_bytes);
                const int64_t column = rank * c.row_bytes + from - row * c.row_bytes;
                const int64_t kept = std::min(until - from, c.out_bytes - column);
                const char* part = rank == c.rank ? (const char*)c.x + at : slot(rank);
                if (kept > 0) memcpy((char*)c.y + row * c.out_bytes + column, part + from - at, kept);
            }
        });
    });
}

}  // namespace
