// Order the (token, choice) pairs by expert, and cut each expert's pairs into tiles of rows for the grouped products.
//
// Idea: a counting sort without communication between blocks. Block e counts the pairs of every expert in shared
// memory (integer sums: their order does not matter), so it knows where expert e's pairs begin; then it writes them,
// lowest pair first, by ballots and prefix sums. A pair is numbered token * top_k + choice; one whose expert is not in
// 0..X-1 is left out.
// Bound: latency for a decode step (two passes over a few hundred numbers); X reads of all numbers from L2 for a prefill.
//
// tiles[i] = (expert, first position in `sorted`, rows, 0); expert = -1 in the unused ones up to max_tiles. With pairs
// known but not how they spread, max_tiles = (pairs + min(pairs, X) * (rows_per_tile - 1)) / rows_per_tile suffices.
#include "common/types.cuh"
#include "common/reduce.cuh"

constexpr int MAX_EXPERTS = 256;

// counts[e] = number of pairs of expert e. Lanes with the same expert add once together.
__device__ __forceinline__ void count_pairs(const int* experts, int pairs, int X, int* counts) {
    for (int e = threadIdx.x; e < MAX_EXPERTS; e += blockDim.x) counts[e] = 0;
    __syncthreads();
    const int lane = threadIdx.x & 31;
    for (int base = 0; base < pairs; base += blockDim.x) {
        const int pair = base + threadIdx.x;
        const int expert = pair < pairs ? experts[pair] : -1;
        const bool valid = expert >= 0 && expert < X;
        const u32 same = __match_any_sync(FULL_WARP, valid ? expert : -1);
        if (valid && lane == __ffs(same) - 1) atomicAdd(&counts[expert], __popc(same));
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(1024)
    sort_by_expert(const int* __restrict__ experts, int* __restrict__ sorted, int4* __restrict__ tiles, int pairs, int X,
                   int rows_per_tile, int max_tiles) {
    __shared__ int counts[MAX_EXPERTS];
    __shared__ int begin[3];  // pairs before this expert, tiles before it, tiles in all
    __shared__ int warp_counts[32];
    const int mine = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    count_pairs(experts, pairs, X, counts);
    if (warp == 0) {
        int before = 0, tiles_before = 0, all_tiles = 0;
        for (int e = lane; e < X; e += 32) {
            const int n = (counts[e] + rows_per_tile - 1) / rows_per_tile;
            all_tiles += n;
            before += e < mine ? counts[e] : 0;
            tiles_before += e < mine ? n : 0;
        }
#pragma unroll
        for (int offset = 16; offset > 0; offset >>= 1) {
            before += __shfl_xor_sync(FULL_WARP, before, offset);
            tiles_before += __shfl_xor_sync(FULL_WARP, tiles_before, offset);
            all_tiles += __shfl_xor_sync(FULL_WARP, all_tiles, offset);
        }
        if (lane == 0) begin[0] = before, begin[1] = tiles_before, begin[2] = all_tiles;
    }
    __syncthreads();

    const int count = counts[mine], first = begin[0];
    for (int r = threadIdx.x * rows_per_tile, i = threadIdx.x; r < count;
         r += blockDim.x * rows_per_tile, i += blockDim.x)
        tiles[begin[1] + i] = make_int4(mine, first + r, min(rows_per_tile, count - r), 0);
    if (mine == 0)
        for (int i = begin[2] + threadIdx.x; i < max_tiles; i += blockDim.x) tiles[i] = make_int4(-1, 0, 0, 0);
    if (count == 0) return;  // the whole block

    int next = first;
    for (int base = 0; base < pairs; base += blockDim.x) {
        const int pair = base + threadIdx.x;
        const bool hit = pair < pairs && experts[pair] == mine;
        const u32 hits = __ballot_sync(FULL_WARP, hit);
        if (lane == 0) warp_counts[warp] = __popc(hits);
        __syncthreads();
        int before = 0, total = 0;
        for (int w = 0; w < warps; ++w) {
            before += w < warp ? warp_counts[w] : 0;
            total += warp_counts[w];
        }
        if (hit) sorted[next + before + __popc(hits & ((1u << lane) - 1))] = pair;
        next += total;
        __syncthreads();
    }
}
