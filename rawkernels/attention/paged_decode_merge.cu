// Combines the partial results of paged decode: the units that a block boundary cut, see common/paged_work.cuh.
//
// Idea: partial i is (O_i, L_i) with L_i the base-2 log-sum-exp of its scores; the whole is
// sum_i 2^(L_i - max L) O_i / sum_i 2^(L_i - max L). The grid is that of the decode kernel. Block i looks at the place
// where the work of decode block i begins, and merges the unit that is cut there when no earlier block does: few
// blocks, however many sequences and heads there are. Which unit that is follows from the context lengths, so it is
// known before the decode kernel ends (common/overlap.cuh), and what remains is one round of loads.
// A thread owns 4 columns of a row; loads of a partial are coalesced. Units that one block computed whole are already
// in `out`; sequences without context get zeros here.
// Bound: latency of the loads, BATCH partials a round; the partials (a few MB at most) are still in L2.
//
// Macros: DTYPE (float, fp16, bf16), TILE_SIZE (positions of a tile of the decode kernel).
#include "common/types.cuh"
#include "common/overlap.cuh"
#include "common/math.cuh"
#include "common/paged_work.cuh"

typedef DTYPE T;
constexpr int BATCH = 8;  // partials loaded at once

// A running sum of partials, relative to the largest log-sum-exp so far.
struct Merged {
    float x[4], total, top;
};

// Adds partials begin..end-1 (at most BATCH) of one row and 4 columns; partial i lies at row `row_of(i)`.
template <typename RowOf>
__device__ __forceinline__ void add_partials(Merged& sum, const float* partial_out, const float* partial_lse, int D,
                                             int column, int begin, int end, const RowOf& row_of) {
    float lse[BATCH], x[BATCH][4];
#pragma unroll
    for (int u = 0; u < BATCH; ++u) {
        lse[u] = MINUS_INFINITY;
        x[u][0] = x[u][1] = x[u][2] = x[u][3] = 0.0f;
        if (begin + u < end) {
            lse[u] = partial_lse[row_of(begin + u)];
            load_floats<float, 4>(partial_out + row_of(begin + u) * D + column, x[u]);
        }
    }
    float top = sum.top;
#pragma unroll
    for (int u = 0; u < BATCH; ++u) top = fmaxf(top, lse[u]);
    const float shrink = fast_exp2(sum.top - top);
    sum.top = top;
    sum.total *= shrink;
#pragma unroll
    for (int e = 0; e < 4; ++e) sum.x[e] *= shrink;
#pragma unroll
    for (int u = 0; u < BATCH; ++u) {
        const float weight = fast_exp2(lse[u] - top);
        sum.total += weight;
#pragma unroll
        for (int e = 0; e < 4; ++e) sum.x[e] += weight * x[u][e];
    }
}

extern "C" __global__ void
paged_decode_merge(const float* partial_out, const float* partial_lse, const int* __restrict__ context_lens, T* out,
                   int B, int H, int K, int D, int window) {
    extern __shared__ __align__(16) int prefix[];
    __shared__ int scratch[32];
    const Grouping grouping(H, K);
    allow_next();
    count_tiles<TILE_SIZE>(context_lens, B, window, prefix, scratch);
    const Share share(prefix[B] * grouping.groups);
    Cursor unit = {};
    int first = 0, last = -1, rows = 0;  // decode blocks that worked on the unit; rows to merge here
    if (share.count() > 0) {
        unit = locate(share.begin, prefix, B, grouping.groups);
        const int first_tile = share.begin - unit.tile;
        first = first_tile / share.size;
        last = (first_tile + unit.tiles - 1) / share.size;
        if (unit.tile > 0 && first == (int)blockIdx.x - 1) rows = grouping.rows(unit.group);
    }
    await_previous();
    for (int b = blockIdx.x; b < B; b += gridDim.x) {
        if (prefix[b + 1] > prefix[b]) continue;
        for (int i = threadIdx.x; i < H * D; i += blockDim.x) out[(i64)b * H * D + i] = from_float<T>(0.0f);
    }
    T* target = out + ((i64)unit.b * H + grouping.first_head(unit.group)) * D;
    for (int i = threadIdx.x; i < rows * (D / 4); i += blockDim.x) {
        const int row = i / (D / 4), column = i % (D / 4) * 4;
        const auto row_of = [&](int block) { return partial_row(block, block == first) + row; };
        Merged sum = {{0.0f, 0.0f, 0.0f, 0.0f}, 0.0f, MINUS_INFINITY};
        for (int begin = first; begin <= last; begin += BATCH) {
            add_partials(sum, partial_out, partial_lse, D, column, begin, min(last + 1, begin + BATCH), row_of);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) sum.x[e] /= sum.total;
        store_floats<T, 4>(target + row * D + column, sum.x);
    }
}
