// The best id of a range of one row of logits: the largest logit, or the largest logit / temperature + Gumbel noise.
//
// Thread t of the block handles groups of four consecutive ids, t, t + THREADS, ...: a group is one 16-byte access
// where the row is aligned, and shares one Philox call. Accurate noise costs two logarithms (about 60 instructions a
// logit), but most logits cannot win: a cheap upper bound on their noise leaves them below the best value that the
// warp has seen, and then the logarithms are skipped. Taking a maximum is exact, so neither this nor the grid changes
// the result.
#pragma once
#include "common/types.cuh"
#include "common/philox.cuh"
#include "common/vocab.cuh"

constexpr int GROUP = 4;

// Logits i..i+3 of the row, -inf beyond `end`.
__device__ __forceinline__ void load_group(const float* __restrict__ row, int i, int end, bool aligned,
                                           float (&x)[GROUP]) {
    if (aligned && i + GROUP <= end) {
        load_floats<float, GROUP>(row + i, x);
    } else {
#pragma unroll
        for (int j = 0; j < GROUP; ++j) x[j] = i + j < end ? row[i + j] : value_of(LOWEST_KEY);
    }
}

__device__ __forceinline__ bool is_aligned(const float* row) { return ((u64)row & 15) == 0; }

// The best of ids [begin, end) among this thread's groups, packed; 0 where it has none. `begin` is a multiple of 4.
template <int THREADS> __device__ __forceinline__ u64 best_greedy(const float* row, int begin, int end) {
    const bool aligned = is_aligned(row);
    u64 best = 0;
    for (int i = begin + threadIdx.x * GROUP; i < end; i += THREADS * GROUP) {
        float x[GROUP];
        load_group(row, i, end, aligned, x);
#pragma unroll
        for (int j = 0; j < GROUP; ++j) {
            if (i + j < end) best = max(best, pack(key_of(x[j]), i + j));
        }
    }
    return best;
}

// As best_greedy, with noise. Whole warps iterate together.
template <int THREADS>
__device__ __forceinline__ u64 best_random(const float* row, int begin, int end, float temperature, u64 seed,
                                           u32 step) {
    const bool aligned = is_aligned(row);
    const float inverse = 1.0f / temperature;
    u64 best = 0;
    float to_beat = value_of(LOWEST_KEY);  // the best value any lane of this warp has seen
    for (int base = begin; base < end; base += THREADS * GROUP) {
        const int i = base + threadIdx.x * GROUP;
        float x[GROUP];
        u32 words[GROUP], found = 0;
        load_group(row, i, end, aligned, x);
        random_words(seed, step, (u32)i / GROUP, words);
#pragma unroll
        for (int j = 0; j < GROUP; ++j) {
            const float about = x[j] * inverse;
            // Written so that a NaN (from infinities) does not lose. 1e-6 covers the rounding of `inverse`.
            const bool loses = about + fabsf(about) * 1e-6f + gumbel_bound(words[j]) < to_beat;
            if (!loses && i + j < end) {
                const u32 key = key_of(scaled(x[j], temperature) + gumbel(words[j]));
                best = max(best, pack(key, i + j));
                found = max(found, key);
            }
        }
        if (__any_sync(FULL_WARP, found != 0)) to_beat = fmaxf(to_beat, value_of(__reduce_max_sync(FULL_WARP, found)));
    }
    return best;
}
