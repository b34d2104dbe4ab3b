// Paged decode attention for 16-bit caches: one query token a sequence, on tensor cores.
//
// Idea: decode reads every key and value once and does little with it, so the kernel is a copy pipeline with
// arithmetic hung onto it. The query heads that share a key/value head are the rows of one 16-row tile, so K and V
// are read once for all of them; unused rows are zero (tensor throughput is plentiful here). A fixed grid divides
// all tiles of all sequences evenly, see common/paged_work.cuh.
// A block's tile is 16 positions for each of its warps. A warp is on its own: it copies its 16 keys and values into
// its own ring of `stages` buffers (cp.async, stages - 1 tiles ahead, page ids one further tile ahead), computes S =
// Q K^T, the online softmax and O += P V in registers, and meets the other warps only at the end of a unit, where
// the (O, max, sum) of all warps are combined and written: to `out` when the block saw the whole unit, else as a
// partial result for paged_decode_merge. No load is waited for where it is issued: the page ids of a tile arrive while
// the tile before it is computed, Q of the next unit while the end of a unit is.
// Bound: memory. 2 blocks per SM with 16*D*4 bytes * (stages - 1) * WARPS each in flight: 128 KB per SM at D = 128.
//
// Macros: DTYPE (fp16, bf16), HEAD_DIM (a multiple of 16 up to 256).
#include "common/types.cuh"
#include "common/overlap.cuh"
#include "common/math.cuh"
#include "common/async.cuh"
#include "common/mma.cuh"
#include "common/paged_work.cuh"

typedef DTYPE T;
constexpr int D = HEAD_DIM;
constexpr int WARPS = D > 160 ? 2 : 4;         // as in attention_plan.py
constexpr int KEYS = 16;                       // positions of a warp's tile
constexpr int TILE = KEYS * WARPS;             // positions of a block's tile
constexpr int CHUNKS = D / 8;                  // 16-byte chunks of a row
constexpr int HALF_BYTES = KEYS * D * 2;       // K or V of a warp's tile
constexpr int STAGE_BYTES = 2 * HALF_BYTES;    // K, then V
constexpr int STRIDE = D + 8;                  // floats of a row of the combine buffer: 4 rows hit different banks
constexpr bool EARLY_Q = D <= 128;             // registers can hold O of a unit beside Q of the next one
constexpr int COMBINE_ROWS = 5;                // rows that are combined at once, as in attention_plan.py

struct Cache {
    const T* kv;
    const int* tables;
    int B, K, M, log2_S;
};

// Where a block is, with the visible positions of that sequence.
struct Place {
    Cursor cursor;
    Visible<TILE> seen;
    // First of the 16 positions of this warp.
    __device__ __forceinline__ int position() const {
        return (seen.first_tile() + cursor.tile) * TILE + (threadIdx.x >> 5) * KEYS;
    }
};

// What a warp knows of the unit it works on: per lane rows lane/4 and lane/4 + 8, columns 2*(lane%4).. of every 8.
struct State {
    u32 q[D / 16][4];
    float o[D / 8][4];
    float max[2], sum[2];  // of the scores in base 2; `sum` of this lane's columns only
};

// Starts loading the page ids of the warp's two times 8 positions (a page has at least 8).
__device__ __forceinline__ void find_pages(const Cache& cache, const Place& place, int (&pages)[2]) {
    const int* table = cache.tables + (i64)place.cursor.b * cache.M;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int position = place.position() + 8 * half;
        pages[half] = 0;
        if (place.cursor.b < cache.B && position < place.seen.end && position + 8 > place.seen.first) {
            pages[half] = table[position >> cache.log2_S];
        }
    }
}

// The warp starts copying its 16 keys and values into the stage at shared address `stage`; what is not visible becomes
// zeros.
__device__ __forceinline__ void start_tile(const Cache& cache, const Place& place, int kv_head, const int (&pages)[2],
                                           u32 stage) {
    const int lane = threadIdx.x & 31, position = place.position();
    const T *keys[2], *values[2];  // of this lane in the first copy, were all 16 on the page of positions 0-7 or 8-15
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int offset = (position + 8 * half) & ((1 << cache.log2_S) - 1);
        const int row = ((pages[half] * 2 * cache.K + kv_head) << cache.log2_S) + offset - 8 * half;
        keys[half] = cache.kv + (i64)row * D + lane * 8;
        values[half] = keys[half] + (i64)(cache.K << cache.log2_S) * D;
    }
#pragma unroll
    for (int i = 0; i < KEYS * CHUNKS / 32; ++i) {
        const int item = i * 32 + lane, r = item / CHUNKS, chunk = item % CHUNKS, half = item < 8 * CHUNKS ? 0 : 1;
        const u32 target = stage + swizzled<CHUNKS>(r, chunk) * 16;
        const bool visible = place.seen.contains(position + r);
        start_copy(target, (half ? keys[1] : keys[0]) + i * 256, visible);
        start_copy(target + HALF_BYTES, (half ? values[1] : values[0]) + i * 256, visible);
    }
}

// Starts loading Q of a unit, `rows` rows from global memory, in the A-operand layout; rows beyond the group are zero.
__device__ __forceinline__ void load_q(State& state, const T* q, int rows) {
    const int lane = threadIdx.x & 31, row = lane / 4, column = 2 * (lane % 4);
    const u32* low = reinterpret_cast<const u32*>(q + row * D + column);
    const u32* high = reinterpret_cast<const u32*>(q + (row + 8) * D + column);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        state.q[k][0] = row < rows ? low[k * 8] : 0;
        state.q[k][1] = row + 8 < rows ? high[k * 8] : 0;
        state.q[k][2] = row < rows ? low[k * 8 + 4] : 0;
        state.q[k][3] = row + 8 < rows ? high[k * 8 + 4] : 0;
    }
}

__device__ __forceinline__ void clear(State& state) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) state.o[n][0] = state.o[n][1] = state.o[n][2] = state.o[n][3] = 0.0f;
    state.max[0] = state.max[1] = MINUS_INFINITY;
    state.sum[0] = state.sum[1] = 0.0f;
}

// s = Q K^T for the 16 keys of the stage: s[n] holds keys 8n..8n+7.
__device__ __forceinline__ void score(const State& state, u32 stage, float (&s)[2][4]) {
    const int lane = threadIdx.x & 31, key = (lane & 7) + (lane >> 4) * 8, odd = (lane >> 3) & 1;
#pragma unroll
    for (int n = 0; n < 2; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        u32 keys[4];
        load_matrices(keys, stage + swizzled<CHUNKS>(key, 2 * k + odd) * 16);
        mma<T>(s[0], state.q[k], keys[0], keys[1]);
        mma<T>(s[1], state.q[k], keys[2], keys[3]);
    }
}

// Scores to base-2 logits: scale, soft-cap, and -inf where key 0 + column of the tile is outside [first, end).
__device__ __forceinline__ void mask_and_scale(float (&s)[2][4], int position, const Visible<TILE>& seen, float scale,
                                               float softcap) {
    const int column = position + 2 * (threadIdx.x & 3);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int key = column + n * 8 + (e & 1);
            float x = s[n][e] * scale;
            x = softcap > 0.0f ? softcap * fast_tanh(x / softcap) : x;
            s[n][e] = seen.contains(key) ? x * LOG2_E : MINUS_INFINITY;
        }
    }
}

// Folds 16 scored keys into the state: online softmax, then O += P V. At least one key is visible.
__device__ __forceinline__ void accumulate(State& state, float (&s)[2][4], u32 stage) {
    const int lane = threadIdx.x & 31;
    float shrink[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float top = fmaxf(fmaxf(s[0][2 * half], s[0][2 * half + 1]), fmaxf(s[1][2 * half], s[1][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
        top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
        top = fmaxf(top, state.max[half]);
        shrink[half] = fast_exp2(state.max[half] - top);
        state.max[half] = top;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) sum += s[n][e] = fast_exp2(s[n][e] - top);
        }
        state.sum[half] = state.sum[half] * shrink[half] + sum;
    }
    if (__any_sync(FULL_WARP, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) state.o[n][e] *= shrink[e / 2];
        }
    }
    const u32 p[4] = {pack<T>(s[0][0], s[0][1]), pack<T>(s[0][2], s[0][3]), pack<T>(s[1][0], s[1][1]),
                      pack<T>(s[1][2], s[1][3])};
    const int key = lane & 15, odd = lane >> 4;
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
        u32 values[4];
        load_matrices_transposed(values, stage + HALF_BYTES + swizzled<CHUNKS>(key, 2 * n + odd) * 16);
        mma<T>(state.o[2 * n], p, values[0], values[1]);
        mma<T>(state.o[2 * n + 1], p, values[2], values[3]);
    }
}

// Shared memory in which the warps of a block combine a unit.
struct Combine {
    float max[WARPS][MAX_ROWS], sum[WARPS][MAX_ROWS];
};

// The warp leaves the maxima and sums of its rows.
__device__ __forceinline__ void publish_sums(const State& state, Combine& combine) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = state.sum[half];
        sum += __shfl_xor_sync(FULL_WARP, sum, 1);
        sum += __shfl_xor_sync(FULL_WARP, sum, 2);
        if (lane % 4 == 0) {
            combine.max[warp][lane / 4 + 8 * half] = state.max[half];
            combine.sum[warp][lane / 4 + 8 * half] = sum;
        }
    }
}

// The warp leaves its rows [begin, end) of O in its part of the buffer [WARPS, COMBINE_ROWS, STRIDE].
__device__ __forceinline__ void publish_rows(const State& state, float* buffer, int stride, int begin, int end) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = lane / 4 + 8 * half;
        if (row < begin || row >= end) continue;
        float* target = buffer + warp * stride + (row - begin) * STRIDE + 2 * (lane % 4);
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            *reinterpret_cast<float2*>(target + n * 8) = make_float2(state.o[n][2 * half], state.o[n][2 * half + 1]);
        }
    }
}

// Columns column..column+3 of a row over all warps, added in their order so that results repeat exactly, normalised.
// Returns the base-2 log-sum-exp of the row.
__device__ __forceinline__ float combine_row(const Combine& combine, const float* o, int stride, int row,
                                             float (&x)[4]) {
    float top = combine.max[0][row], sum = 0.0f;
#pragma unroll
    for (int w = 1; w < WARPS; ++w) top = fmaxf(top, combine.max[w][row]);
    x[0] = x[1] = x[2] = x[3] = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        float part[4];
        load_floats<float, 4>(o + w * stride, part);
        const float weight = fast_exp2(combine.max[w][row] - top);
        sum += weight * combine.sum[w][row];
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] += weight * part[e];
    }
    const float scale = 1.0f / sum;
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] *= scale;
    return top + log2f(sum);
}

// Combines the warps' states of a unit and writes it: to out [rows, D], or as a partial result with its base-2
// log-sum-exp. Two barriers for every COMBINE_ROWS rows. All threads call.
__device__ __forceinline__ void write_unit(const State& state, Combine& combine, float* buffer, int rows, bool whole,
                                           T* out, float* partial_out, float* partial_lse) {
    const int stride = min(rows, COMBINE_ROWS) * STRIDE;  // floats of a warp's part of the buffer
    publish_sums(state, combine);
    for (int begin = 0; begin < rows; begin += COMBINE_ROWS) {
        const int end = min(rows, begin + COMBINE_ROWS);
        publish_rows(state, buffer, stride, begin, end);
        __syncthreads();
        for (int i = threadIdx.x; i < (end - begin) * (D / 4); i += WARPS * 32) {
            const int row = begin + i / (D / 4), column = i % (D / 4) * 4;
            float x[4];
            const float lse = combine_row(combine, buffer + (row - begin) * STRIDE + column, stride, row, x);
            if (whole) {
                store_floats<T, 4>(out + row * D + column, x);
            } else {
                store_floats<float, 4>(partial_out + row * D + column, x);
                if (column == 0) partial_lse[row] = lse;
            }
        }
        __syncthreads();  // the buffer is free again
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
    paged_decode(const T* q, const T* kv_cache, const int* __restrict__ tables, const int* __restrict__ context_lens,
                 T* out, float* partial_out, float* partial_lse, int B, int H, int K, int M, int log2_S, int window,
                 int stages, float scale, float softcap) {
    extern __shared__ __align__(16) u8 shared[];  // ring of every warp, combine buffer, prefix
    __shared__ Combine combine;
    const int warp = threadIdx.x >> 5;
    const Grouping grouping(H, K);
    const Cache cache = {kv_cache, tables, B, K, M, log2_S};
    const u32 ring = shared_address(shared) + warp * stages * STAGE_BYTES;
    float* buffer = reinterpret_cast<float*>(shared + WARPS * stages * STAGE_BYTES);
    int* prefix = reinterpret_cast<int*>(buffer + WARPS * min(grouping.G, COMBINE_ROWS) * STRIDE);

    allow_next();  // lengths and tables are inputs of the step: the work is divided while the kernel before ends
    count_tiles<TILE>(context_lens, B, window, prefix, reinterpret_cast<int*>(combine.max));
    const Share share(prefix[B] * grouping.groups);
    const int count = share.count();
    const Cursor start = count > 0 ? locate(share.begin, prefix, B, grouping.groups) : Cursor{};
    Place here = {start, {count > 0 ? context_lens[start.b] : 0, window}}, ahead = here;
    int pages[2];
    find_pages(cache, ahead, pages);
    await_previous();
    if (count == 0) return;

    const auto step = [&](Place& place) {
        const int b = place.cursor.b;
        advance(place.cursor, prefix, B, grouping.groups);
        const int next = place.cursor.b;
        if (next != b && next < B) place.seen = Visible<TILE>(context_lens[next], window);
    };
    int free_stage = 0;
    const auto fetch = [&](int i) {  // start copying tile i of this block; look up the pages of the one after it
        if (i < count) {
            start_tile(cache, ahead, grouping.kv_head(ahead.cursor.group), pages, ring + free_stage * STAGE_BYTES);
            step(ahead);
            find_pages(cache, ahead, pages);
        }
        commit_copies();  // an empty group keeps the count of groups
        if (++free_stage == stages) free_stage = 0;
    };
    const auto first_row = [&](const Cursor& c) { return ((i64)c.b * H + grouping.first_head(c.group)) * D; };
    for (int i = 0; i < stages - 1; ++i) fetch(i);

    State state;
    const auto load_unit = [&](const Cursor& c) { load_q(state, q + first_row(c), grouping.rows(c.group)); };
    clear(state);
    load_unit(here.cursor);
    bool from_start = here.cursor.tile == 0;
    for (int i = 0, stage = 0; i < count; ++i) {
        fetch(i + stages - 1);
        wait_copies(stages - 1);
        __syncwarp();

        const u32 keys = ring + stage * STAGE_BYTES;
        const int position = here.position();
        const bool visible = position < here.seen.end && position + KEYS > here.seen.first;
        if (visible) {
            float s[2][4];
            score(state, keys, s);
            mask_and_scale(s, position, here.seen, scale, softcap);
            accumulate(state, s, keys);
        }
        if (++stage == stages) stage = 0;
        __syncwarp();  // all lanes are done with the stage before the next copy into it starts

        Place next = here;
        step(next);
        const bool last = i == count - 1;
        if (here.cursor.ends_unit() || last) {
            if (EARLY_Q && !last) load_unit(next.cursor);
            const bool whole = from_start && here.cursor.ends_unit();
            const i64 partial = partial_row(blockIdx.x, from_start);
            write_unit(state, combine, buffer, grouping.rows(here.cursor.group), whole, out + first_row(here.cursor),
                       partial_out + partial * D, partial_lse + partial);
            clear(state);
            if (!EARLY_Q && !last) load_unit(next.cursor);
            from_start = true;
        }
        here = next;
    }
}
