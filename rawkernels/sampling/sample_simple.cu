// The draw without filters: argmax of logits / temperature + Gumbel noise, or of the logits alone.
//
// Idea: one row may be all there is, so several blocks share it (grid: splits x rows); each leaves its best (value, id)
// packed into one u64, and a warp per row takes the best of those. What a thread does is in common/gumbel_max.cuh.
// Bound: with few rows, latency; with many, instructions (about 40 a logit: Philox, the noise bound, the comparison).
#include "common/types.cuh"
#include "common/overlap.cuh"
#include "common/reduce.cuh"
#include "common/gumbel_max.cuh"

constexpr int THREADS = 256;

__device__ __forceinline__ u64 warp_max(u64 x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x = max(x, __shfl_xor_sync(FULL_WARP, x, offset));
    return x;
}

// Block (s, n): the best of ids [s * chunk, (s + 1) * chunk) of row n -> partial[n, s]. `chunk` is a multiple of 4.
extern "C" __global__ void __launch_bounds__(THREADS)
    sample_partial(const float* logits, const float* temperature, const u64* seeds, const int* steps, u64* partial,
                   int V, int chunk) {
    __shared__ u64 scratch[THREADS / 32];
    const int n = blockIdx.y;
    const float* row = logits + (i64)n * V;
    const float t = temperature[n];
    allow_next();
    await_previous();
    const int begin = blockIdx.x * chunk, end = min(V, begin + chunk);
    u64 best = t < GREEDY_BELOW ? best_greedy<THREADS>(row, begin, end)
                                : best_random<THREADS>(row, begin, end, t, seeds[n], (u32)steps[n]);
    best = warp_max(best);
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll
        for (int w = 1; w < THREADS / 32; ++w) best = max(best, scratch[w]);
        partial[(i64)n * gridDim.x + blockIdx.x] = best;
    }
}

// One warp per row.
extern "C" __global__ void sample_final(const u64* partial, int* tokens, int splits) {
    const int n = blockIdx.x;
    allow_next();
    await_previous();
    u64 best = 0;
    for (int s = threadIdx.x; s < splits; s += 32) best = max(best, partial[(i64)n * splits + s]);
    best = warp_max(best);
    if (threadIdx.x == 0) tokens[n] = index_of(best);
}
