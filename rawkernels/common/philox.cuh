// Philox4x32-10, a counter-based random generator, and Gumbel noise made of its words.
//
// A counter-based generator has no state: four random words are a function of (key, counter). With a request's seed as
// key and (token id / 4, step) as counter, a draw depends on nothing else: not on the row, the batch or the grid.
// cupyinfer/runtime/philox.py is the NumPy twin. Source: Salmon et al. 2011; constants as in Random123.
#pragma once
#include "common/types.cuh"

// Word `lane` of counter (group, step, 0, 0) is the word of token 4 * group + lane.
__device__ __forceinline__ void random_words(u64 seed, u32 step, u32 group, u32 (&words)[4]) {
    u32 k0 = (u32)seed, k1 = (u32)(seed >> 32);
    u32 c0 = group, c1 = step, c2 = 0, c3 = 0;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const u64 p0 = (u64)0xD2511F53u * c0, p1 = (u64)0xCD9E8D57u * c2;
        c0 = (u32)(p1 >> 32) ^ c1 ^ k0;
        c1 = (u32)p1;
        c2 = (u32)(p0 >> 32) ^ c3 ^ k1;
        c3 = (u32)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
}

// u = (word + 1/2) / 2^32, kept below 1 so that no logarithm sees 0. Its small end, where float32 is finest, decides
// the large noise values: -log(-log(1 - u)) is 22.9 at most, and its steps there are far finer than any gap that
// matters.
__device__ __forceinline__ float uniform(u32 word) {
    return fminf(((float)word + 0.5f) * 0x1p-32f, 0x1.fffffep-1f);
}

__device__ __forceinline__ float gumbel(u32 word) { return -logf(-log1pf(-uniform(word))); }

// A bound on gumbel(word) from above for a few instructions, since -log(1 - u) >= u. 1e-4 covers what the hardware's
// log2 and the roundings of both sides can amount to (2e-5).
__device__ __forceinline__ float gumbel_bound(u32 word) { return 1e-4f - 0.69314718f * __log2f(uniform(word)); }
