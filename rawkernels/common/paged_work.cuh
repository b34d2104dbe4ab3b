// How paged decode divides its work over a fixed grid, whatever the context lengths are.
//
// The visible positions of a sequence are cut into tiles of TILE positions. A unit is one sequence and one group of
// query heads that share a key/value head; all its tiles belong to one output. The tiles of all units are numbered
// in one row, unit after unit, sequence after sequence; with `total` tiles, block i computes tiles [i * share,
// (i + 1) * share), share = ceil(total / blocks). Every block gets the same amount of work, long and short contexts
// mixed; a unit that is cut by a block boundary leaves one partial result per block, which the merge kernel
// combines. Everything is derived from the context lengths on the device, so the launch can be replayed from a graph
// with other lengths.
//
// A block has at most two partial units: one that an earlier block began (slot 0) and one that it begins and does not
// finish (slot 1). Partial results have a fixed stride of MAX_ROWS rows.
// The merge kernel runs on the same grid and divides the work once more: that costs less than reading it from memory.
#pragma once
#include "common/types.cuh"
#include "common/reduce.cuh"

constexpr int MAX_ROWS = 16;  // query heads of a unit at most

__device__ __forceinline__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The positions [first, end) that the query at the end of a context sees.
template <int TILE> struct Visible {
    int first, end;
    __device__ Visible(int context, int window) : first(window > 0 ? max(0, context - window) : 0), end(context) {}
    __device__ int first_tile() const { return first / TILE; }
    __device__ int tiles() const { return ceil_div(end, TILE) - first_tile(); }
    __device__ bool contains(int position) const { return position >= first && position < end; }
};

// Sum of x over all threads before this one. The block is 1-D with a multiple of 32 threads; `scratch` holds 32 ints.
__device__ __forceinline__ int block_sum_before(int x, int* scratch) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int inclusive = x;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        const int other = __shfl_up_sync(FULL_WARP, inclusive, offset);
        if (lane >= offset) inclusive += other;
    }
    if (lane == 31) scratch[warp] = inclusive;
    __syncthreads();
    int before = inclusive - x;
    for (int w = 0; w < warp; ++w) before += scratch[w];
    return before;
}

// prefix[b] = tiles of the sequences before b, prefix[B] = tiles of all; per head group. All threads call; ends with a
// barrier.
template <int TILE>
__device__ __forceinline__ void count_tiles(const int* context_lens, int B, int window, int* prefix, int* scratch) {
    const int strip = ceil_div(B, blockDim.x);
    const int begin = min(B, (int)threadIdx.x * strip), end = min(B, begin + strip);
    int sum = 0;
    for (int b = begin; b < end; ++b) sum += Visible<TILE>(context_lens[b], window).tiles();
    int before = block_sum_before(sum, scratch);
    for (int b = begin; b < end; ++b) {
        prefix[b] = before;
        before += Visible<TILE>(context_lens[b], window).tiles();
    }
    if (threadIdx.x == blockDim.x - 1) prefix[B] = before;
    __syncthreads();
}

// The tiles [begin, end) of `total` that this block computes.
struct Share {
    int size, begin, end;
    __device__ explicit Share(int total)
        : size(ceil_div(total, gridDim.x)), begin(min(total, (int)blockIdx.x * size)), end(min(total, begin + size)) {}
    __device__ int count() const { return end - begin; }
};

// First row, in the arrays of partial results, of the unit that a block began itself or went on with.
__device__ __forceinline__ i64 partial_row(int block, bool began) {
    return (2 * (i64)block + (began ? 1 : 0)) * MAX_ROWS;
}

// Tile `tile` of the `tiles` tiles of head group `group` of sequence b.
struct Cursor {
    int b, group, tile, tiles;
    __device__ __forceinline__ bool ends_unit() const { return tile == tiles - 1; }
};

// The cursor of tile number `index` < prefix[B] * groups.
__device__ __forceinline__ Cursor locate(int index, const int* prefix, int B, int groups) {
    int low = 0, high = B;  // prefix[low] * groups <= index < prefix[high] * groups
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (prefix[middle] * groups <= index) low = middle;
        else high = middle;
    }
    const int tiles = prefix[low + 1] - prefix[low], rest = index - prefix[low] * groups;
    return {low, rest / tiles, rest % tiles, tiles};
}

// The next tile in the row; beyond the last one, b == B.
__device__ __forceinline__ void advance(Cursor& c, const int* prefix, int B, int groups) {
    if (++c.tile < c.tiles) return;
    c.tile = 0;
    if (++c.group < groups) return;
    c.group = 0;
    do ++c.b;
    while (c.b < B && prefix[c.b + 1] == prefix[c.b]);
    c.tiles = c.b < B ? prefix[c.b + 1] - prefix[c.b] : 0;
}

// How H query heads over K key/value heads form head groups: at most MAX_ROWS heads that share a key/value head.
struct Grouping {
    int G, parts, groups;  // query heads per key/value head, groups they make, groups in all
    __device__ Grouping(int H, int K) : G(H / K), parts(ceil_div(G, MAX_ROWS)), groups(K * parts) {}
    __device__ int kv_head(int group) const { return parts == 1 ? group : group / parts; }
    __device__ int first_head(int group) const { return kv_head(group) * G + part(group) * MAX_ROWS; }
    __device__ int rows(int group) const { return min(MAX_ROWS, G - part(group) * MAX_ROWS); }
    __device__ int group_of(int head) const { return head / G * parts + head % G / MAX_ROWS; }
    __device__ int row_of(int head) const { return head % G % MAX_ROWS; }

  private:
    __device__ int part(int group) const { return parts == 1 ? 0 : group % parts; }
};
