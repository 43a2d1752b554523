// A step's keys and values into their slots.
#pragma once

#include "kv_formats.h"

namespace {

// Where a token's value shares a word with the next position and that one is not written here, it is cleared: it may
// be read, with weight zero, before it is written.
template <class W>
void store_kv(const StoreCall& c, Team& team) {
    const int64_t tile_bytes = TILE * (c.head_dim * W::BYTES + W::SCALE_BYTES), head_bytes = c.page_size / TILE * tile_bytes;
    // f(where the tiles of its keys and of its values lie from, head) for the heads of a token
    auto tiles = [&](int64_t t, auto f) {
        const int64_t page = c.slots[t] / c.page_size, at = c.slots[t] % c.page_size;
        for (int64_t h = 0; h < c.kv_heads; ++h) {
            const int64_t from = (page * c.kv_heads + h) * head_bytes + at / TILE * tile_bytes;
            f((char*)c.keys + from, (char*)c.values + from, h);
        }
    };
    auto one = [&](int64_t t) {
        const int64_t at = c.slots[t] % c.page_size % TILE;
        const bool clear = at % 2 == 0 && (t + 1 == c.tokens || c.slots[t + 1] != c.slots[t] + 1);
        tiles(t, [&](char* keys, char* values, int64_t h) {
            const float *k = c.k + t * c.k_stride + h * c.head_dim, *v = c.v + t * c.v_stride + h * c.head_dim;
            W::put_token(k, v, c.head_dim, at, clear, keys, values);
        });
    };
    // slots of decoding sequences are far from each other, and a key's dimensions from one another
    auto fetch = [&](int64_t t) {
        const int64_t at = c.slots[t] % c.page_size % TILE, pair = W::K_PER_STEP, words = c.head_dim * pair * W::BYTES;
        tiles(t, [&](const char* keys, const char* values, int64_t) {
            for (int64_t i = 0; i < TILE * words / pair; i += 64) __builtin_prefetch(keys + i, 1);
            for (int64_t i = 0; i < words; i += 64) __builtin_prefetch(values + at / pair * words + i, 1);
            if (W::SCALED) __builtin_prefetch(keys + TILE * c.head_dim, 1), __builtin_prefetch(values + TILE * c.head_dim, 1);
        });
    };
    team.share(c.tokens, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t) {
            if (t + 1 < last && c.slots[t + 1] != c.slots[t] + 1) fetch(t + 1);
            one(t);
        }
    });
}

}  // namespace
