// Combines the partial results of paged decode: the units that a block boundary cut, see common/paged_work.cuh.
//
// Idea: partial i is (O_i, L_i) with L_i the base-2 log-sum-exp of its scores; the whole is
// sum_i 2^(L_i - max L) O_i / sum_i 2^(L_i - max L). The partials of a unit were written by consecutive blocks, whose
// numbers follow from the tile counts (`plan`, left by the decode kernel).
// Block (h, b) merges query head h of sequence b; thread d owns dim d, so the loads of a partial are coalesced and the
// weights, the same for all threads, are broadcast. Units that one block computed whole are already in `out`; sequences
// without context get zeros here.
// Bound: latency of two dependent rounds of loads; the partials (a few MB at most) are still in L2.
//
// Macros: DTYPE (float, fp16, bf16).
#include "common/types.cuh"
#include "common/overlap.cuh"
#include "common/paged_work.cuh"

typedef DTYPE T;

extern "C" __global__ void
paged_decode_merge(const float* partial_out, const float* partial_lse, const int* plan, T* out, int B, int H, int K, int D, int workers) {
    const int h = blockIdx.x, b = blockIdx.y, d = threadIdx.x;
    const Grouping grouping(H, K);
    const int group = grouping.group_of(h), row = grouping.row_of(h);
    T* target = out + ((i64)b * H + h) * D + d;
    allow_next();
    await_previous();
    const int tiles = plan[b + 1] - plan[b], share = ceil_div(plan[B] * grouping.groups, workers);
    if (tiles == 0) {
        if (d < D) *target = from_float<T>(0.0f);
        return;
    }
    const int first_tile = plan[b] * grouping.groups + group * tiles;
    const int first = first_tile / share, last = (first_tile + tiles - 1) / share;
    if (first == last || d >= D) return;

    // The first block began the unit (slot 1), the others went on with it (slot 0).
    const auto partial = [&](int i) { return (2 * i + (i == first ? 1 : 0)) * MAX_ROWS + row; };
    float top = partial_lse[partial(first)];
#pragma unroll 4
    for (int i = first + 1; i <= last; ++i) top = fmaxf(top, partial_lse[partial(i)]);
    float sum = 0.0f, total = 0.0f;
#pragma unroll 4
    for (int i = first; i <= last; ++i) {
        const float weight = exp2f(partial_lse[partial(i)] - top);
        sum += weight * partial_out[(i64)partial(i) * D + d];
        total += weight;
    }
    *target = from_float<T>(sum / total);
}
