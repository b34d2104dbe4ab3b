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
// partial result for paged_decode_merge.
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
constexpr int WARPS = D > 160 ? 2 : 4;         // as in attention.py
constexpr int KEYS = 16;                       // positions of a warp's tile
constexpr int TILE = KEYS * WARPS;             // positions of a block's tile
constexpr int CHUNKS = D / 8;                  // 16-byte chunks of a row
constexpr int HALF_BYTES = KEYS * D * 2;       // K or V of a warp's tile
constexpr int STAGE_BYTES = 2 * HALF_BYTES;    // K, then V
constexpr int STRIDE = D + 8;                  // floats of a row of the combine buffer: 8 rows hit different banks

struct Cache {
    const T* kv;
    const int* tables;
    const int* context_lens;
    int B, K, M, log2_S, window;
};

// What a warp knows of the unit it works on: per lane rows lane/4 and lane/4 + 8, columns 2*(lane%4).. of every 8.
struct State {
    u32 q[D / 16][4];
    float o[D / 8][4];
    float max[2], sum[2];  // of the scores in base 2; `sum` of this lane's columns only
};

// Row number (of D values) in the cache of the key at lane % 16 of the warp's tile, -1 when it is not visible.
__device__ __forceinline__ int find_row(const Cache& cache, const Cursor& c, int kv_head) {
    if (c.b >= cache.B) return -1;
    const Visible<TILE> seen(cache.context_lens[c.b], cache.window);
    const int position = (seen.first_tile() + c.tile) * TILE + (threadIdx.x >> 5) * KEYS + (threadIdx.x & 15);
    if (position < seen.first || position >= seen.end) return -1;
    const int page = cache.tables[(i64)c.b * cache.M + (position >> cache.log2_S)];
    return ((page * 2 * cache.K + kv_head) << cache.log2_S) + (position & ((1 << cache.log2_S) - 1));
}

// The warp starts copying 16 keys and values into the stage at shared address `stage`; row -1 becomes zeros.
__device__ __forceinline__ void start_tile(const Cache& cache, int row, u32 stage) {
    const int lane = threadIdx.x & 31;
    const i64 values = (i64)(cache.K << cache.log2_S) * D;  // distance from a key to its value
#pragma unroll
    for (int i = 0; i < KEYS * CHUNKS / 32; ++i) {
        const int r = (i * 32 + lane) / CHUNKS, chunk = (i * 32 + lane) % CHUNKS;
        const int source = __shfl_sync(FULL_WARP, row, r);
        const T* key = cache.kv + (i64)max(source, 0) * D + chunk * 8;
        const u32 target = stage + swizzled<CHUNKS>(r, chunk) * 16;
        start_copy(target, key, source >= 0);
        start_copy(target + HALF_BYTES, key + values, source >= 0);
    }
}

// Q of a unit straight from global memory into the A-operand layout; rows beyond the group are zero.
__device__ __forceinline__ void begin_unit(State& state, const T* q, int rows) {
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
            s[n][e] = key >= seen.first && key < seen.end ? x * LOG2_E : MINUS_INFINITY;
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
    float* o;  // [rows, STRIDE]

    __device__ __forceinline__ float row_max(int row) const {
        float top = max[0][row];
#pragma unroll
        for (int w = 1; w < WARPS; ++w) top = fmaxf(top, max[w][row]);
        return top;
    }
    __device__ __forceinline__ float row_sum(int row, float top) const {
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) total += sum[w][row] * fast_exp2(max[w][row] - top);
        return total;
    }
};

// Adds up the warps' states, in the order of the warps so that results repeat exactly. combine.o ends up holding the
// sum of exp2(score - row_max) * V. All threads call; ends with a barrier.
__device__ __forceinline__ void combine_warps(State& state, Combine& combine, int rows) {
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
    __syncthreads();
    for (int w = 0; w < WARPS; ++w) {
        if (w == warp) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = lane / 4 + 8 * half;
                if (row >= rows) continue;
                const float scale = fast_exp2(state.max[half] - combine.row_max(row));
                float2* target = reinterpret_cast<float2*>(combine.o + row * STRIDE + 2 * (lane % 4));
#pragma unroll
                for (int n = 0; n < D / 8; ++n) {
                    const float2 old = w == 0 ? make_float2(0.0f, 0.0f) : target[n * 4];
                    target[n * 4] = make_float2(old.x + state.o[n][2 * half] * scale,
                                                old.y + state.o[n][2 * half + 1] * scale);
                }
            }
        }
        __syncthreads();
    }
}

// Writes the combined unit: normalised to out [rows, D], or normalised with its base-2 log-sum-exp as a partial result.
__device__ __forceinline__ void write_unit(const Combine& combine, int rows, bool whole, T* out, float* partial_out,
                                           float* partial_lse) {
    for (int i = threadIdx.x; i < rows * (D / 4); i += WARPS * 32) {
        const int row = i / (D / 4), column = i % (D / 4) * 4;
        const float top = combine.row_max(row), sum = combine.row_sum(row, top);
        float x[4];
        load_floats<float, 4>(combine.o + row * STRIDE + column, x);
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] /= sum;
        if (whole) {
            store_floats<T, 4>(out + row * D + column, x);
        } else {
            store_floats<float, 4>(partial_out + row * D + column, x);
            if (column == 0) partial_lse[row] = top + log2f(sum);
        }
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
    paged_decode(const T* q, const T* kv_cache, const int* __restrict__ tables, const int* __restrict__ context_lens,
                 T* out, float* partial_out, float* partial_lse, int* plan, int B, int H, int K, int M, int log2_S,
                 int window, int stages, float scale, float softcap) {
    extern __shared__ __align__(16) u8 shared[];  // ring of every warp, combine buffer, prefix
    __shared__ Combine combine;
    const int warp = threadIdx.x >> 5;
    const Grouping grouping(H, K);
    const Cache cache = {kv_cache, tables, context_lens, B, K, M, log2_S, window};
    const u32 ring = shared_address(shared) + warp * stages * STAGE_BYTES;
    float* buffer = reinterpret_cast<float*>(shared + WARPS * stages * STAGE_BYTES);
    int* prefix = reinterpret_cast<int*>(buffer + min(grouping.G, MAX_ROWS) * STRIDE);
    if (threadIdx.x == 0) combine.o = buffer;

    allow_next();  // lengths and tables are inputs of the step: the work is divided while the kernel before ends
    count_tiles<TILE>(context_lens, B, window, prefix, reinterpret_cast<int*>(combine.max));
    const int total = prefix[B] * grouping.groups, share = ceil_div(total, gridDim.x);
    const int begin = min(total, (int)blockIdx.x * share), count = min(total, begin + share) - begin;
    Cursor here = {}, ahead = {};
    int row = -1, free_stage = 0;
    if (count > 0) {
        here = ahead = locate(begin, prefix, B, grouping.groups);
        row = find_row(cache, ahead, grouping.kv_head(ahead.group));
    }
    await_previous();
    if (blockIdx.x == 0) {
        for (int b = threadIdx.x; b <= B; b += WARPS * 32) plan[b] = prefix[b];
    }
    if (count == 0) return;

    const auto fetch = [&](int i) {  // start copying tile i of this block; find the row of the one after it
        if (i < count) {
            start_tile(cache, row, ring + free_stage * STAGE_BYTES);
            advance(ahead, prefix, B, grouping.groups);
            row = find_row(cache, ahead, grouping.kv_head(ahead.group));
        }
        commit_copies();  // an empty group keeps the count of groups
        if (++free_stage == stages) free_stage = 0;
    };
    for (int i = 0; i < stages - 1; ++i) fetch(i);

    State state;
    bool from_start = true;
    for (int i = 0, stage = 0; i < count; ++i) {
        const int rows = grouping.rows(here.group);
        const i64 head = ((i64)here.b * H + grouping.first_head(here.group)) * D;
        if (i == 0 || here.tile == 0) {
            from_start = here.tile == 0;
            begin_unit(state, q + head, rows);
        }
        fetch(i + stages - 1);
        wait_copies(stages - 1);
        __syncwarp();

        const Visible<TILE> seen(context_lens[here.b], window);
        const int position = (seen.first_tile() + here.tile) * TILE + warp * KEYS;
        if (position < seen.end && position + KEYS > seen.first) {
            float s[2][4];
            score(state, ring + stage * STAGE_BYTES, s);
            mask_and_scale(s, position, seen, scale, softcap);
            accumulate(state, s, ring + stage * STAGE_BYTES);
        }
        if (++stage == stages) stage = 0;
        __syncwarp();  // all lanes are done with the stage before the next copy into it starts

        if (here.ends_unit() || i == count - 1) {
            const bool whole = from_start && here.ends_unit();
            const i64 partial = (2 * (i64)blockIdx.x + (from_start ? 1 : 0)) * MAX_ROWS;
            combine_warps(state, combine, rows);
            write_unit(combine, rows, whole, out + head, partial_out + partial * D, partial_lse + partial);
            __syncthreads();  // combine is free again
        }
        advance(here, prefix, B, grouping.groups);
    }
}
