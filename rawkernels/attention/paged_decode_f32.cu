// Paged decode attention for float32 caches, on the ordinary cores. The plan and the partial results are those of
// paged_decode.cu; read that one for speed and this one for the algorithm.
//
// Idea: a block copies a tile of TILE keys and values to shared memory (cp.async, two buffers, so that the next tile
// arrives while this one is used) and serves all query heads of the group from it.
// Scores: thread t computes the dot product of query row i / TILE and key i % TILE for i = t, t + THREADS, ...;
// neighbours read neighbouring keys, whose rows are padded by 4 floats so that they fall into different banks.
// Softmax: warp w updates rows w, w + WARPS, ... (lane = key). Output: thread t owns the elements t, t + THREADS,
// ... of O [rows, D].
// Bound: memory for few query heads per group; shared-memory bandwidth for many.
//
// Macros: HEAD_DIM (a multiple of 16 up to 256).
#include "common/types.cuh"
#include "common/overlap.cuh"
#include "common/reduce.cuh"
#include "common/math.cuh"
#include "common/async.cuh"
#include "common/paged_work.cuh"

constexpr int D = HEAD_DIM;
constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int TILE = D > 128 ? 16 : 32;        // as in attention_plan.py
constexpr int STRIDE = D + 4;                  // floats of a key or value row in shared memory
constexpr int BUFFER = 2 * TILE * STRIDE;      // floats of one buffer: keys, then values
constexpr int OUTPUTS = ceil_div(MAX_ROWS * D, THREADS);  // elements of O a thread owns at most

struct Scores {
    float p[MAX_ROWS][TILE + 1];
    float max[MAX_ROWS], sum[MAX_ROWS], shrink[MAX_ROWS];
    int scratch[32];
};

struct Cache {
    const float* kv;
    const int* tables;
    const int* context_lens;
    int M, K, log2_S, window;
};

// Starts copying the keys and values of a tile; what is not visible becomes zero.
__device__ __forceinline__ void start_tile(const Cache& cache, const Cursor& c, int kv_head, float* buffer) {
    const Visible<TILE> seen(cache.context_lens[c.b], cache.window);
    const int base = (seen.first_tile() + c.tile) * TILE;
    const i64 values = (i64)(cache.K << cache.log2_S) * D;  // distance from a key to its value
    for (int i = threadIdx.x; i < TILE * (D / 4); i += THREADS) {
        const int r = i / (D / 4), column = i % (D / 4) * 4, position = base + r;
        const bool valid = position >= seen.first && position < seen.end;
        i64 row = 0;
        if (valid) {
            const i64 page = cache.tables[(i64)c.b * cache.M + (position >> cache.log2_S)];
            row = ((page * 2 * cache.K + kv_head) << cache.log2_S) + (position & ((1 << cache.log2_S) - 1));
        }
        const float* key = cache.kv + row * D + column;
        start_copy(shared_address(buffer + r * STRIDE + column), key, valid);
        start_copy(shared_address(buffer + (TILE + r) * STRIDE + column), key + values, valid);
    }
}

// scores.p = softcap(scale * Q K^T), -inf where the key is not visible.
__device__ __forceinline__ void score(Scores& scores, const float* q, const float* keys, int rows, int base,
                                      const Visible<TILE>& seen, float scale, float softcap) {
    for (int i = threadIdx.x; i < rows * TILE; i += THREADS) {
        const int row = i / TILE, key = i % TILE;
        float x = 0.0f;
#pragma unroll 8
        for (int d = 0; d < D; d += 4) {
            float a[4], b[4];
            load_floats<float, 4>(q + row * D + d, a);
            load_floats<float, 4>(keys + key * STRIDE + d, b);
#pragma unroll
            for (int e = 0; e < 4; ++e) x += a[e] * b[e];
        }
        x *= scale;
        if (softcap > 0.0f) x = softcap * tanhf(x / softcap);
        scores.p[row][key] = base + key >= seen.first && base + key < seen.end ? x : MINUS_INFINITY;
    }
}

// Scores to probabilities relative to the running maximum of each row. At least one key of the tile is visible.
__device__ __forceinline__ void soften(Scores& scores, int rows) {
    const int lane = threadIdx.x & 31;
    for (int row = threadIdx.x >> 5; row < rows; row += WARPS) {
        const float x = lane < TILE ? scores.p[row][lane] : MINUS_INFINITY;
        const float old = scores.max[row], top = fmaxf(old, warp_reduce<Max>(x));
        const float p = expf(x - top), sum = warp_reduce<Sum>(p), shrink = expf(old - top);
        if (lane < TILE) scores.p[row][lane] = p;
        __syncwarp();  // every lane has read the old maximum
        if (lane == 0) {
            scores.max[row] = top;
            scores.shrink[row] = shrink;
            scores.sum[row] = scores.sum[row] * shrink + sum;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    paged_decode_f32(const float* q, const float* kv_cache, const int* __restrict__ tables,
                     const int* __restrict__ context_lens, float* out, float* partial_out, float* partial_lse,
                     int B, int H, int K, int M, int log2_S, int window, float scale, float softcap) {
    extern __shared__ __align__(16) u8 shared[];  // two buffers, Q of the unit, prefix
    __shared__ Scores scores;
    float* buffers = reinterpret_cast<float*>(shared);
    float* unit_q = buffers + 2 * BUFFER;
    const Grouping grouping(H, K);
    int* prefix = reinterpret_cast<int*>(unit_q + min(grouping.G, MAX_ROWS) * D);
    const Cache cache = {kv_cache, tables, context_lens, M, K, log2_S, window};

    allow_next();
    count_tiles<TILE>(context_lens, B, window, prefix, scores.scratch);
    await_previous();
    const Share share(prefix[B] * grouping.groups);
    const int count = share.count();
    if (count == 0) return;

    Cursor here = locate(share.begin, prefix, B, grouping.groups), ahead = here;
    start_tile(cache, ahead, grouping.kv_head(ahead.group), buffers);
    commit_copies();
    float o[OUTPUTS];
    bool from_start = true;
    for (int i = 0; i < count; ++i) {
        const int rows = grouping.rows(here.group);
        const i64 head = ((i64)here.b * H + grouping.first_head(here.group)) * D;
        if (i == 0 || here.tile == 0) {
            from_start = here.tile == 0;
            for (int e = threadIdx.x; e < rows * D; e += THREADS) unit_q[e] = q[head + e];
            if (threadIdx.x < rows) {
                scores.max[threadIdx.x] = MINUS_INFINITY;
                scores.sum[threadIdx.x] = 0.0f;
            }
#pragma unroll
            for (int n = 0; n < OUTPUTS; ++n) o[n] = 0.0f;
        }
        advance(ahead, prefix, B, grouping.groups);
        if (i + 1 < count) start_tile(cache, ahead, grouping.kv_head(ahead.group), buffers + (i + 1) % 2 * BUFFER);
        commit_copies();
        wait_copies<1>();
        __syncthreads();  // the tile and Q are there

        const Visible<TILE> seen(context_lens[here.b], window);
        const float* keys = buffers + i % 2 * BUFFER;
        const float* values = keys + TILE * STRIDE;
        score(scores, unit_q, keys, rows, (seen.first_tile() + here.tile) * TILE, seen, scale, softcap);
        __syncthreads();
        soften(scores, rows);
        __syncthreads();
#pragma unroll
        for (int n = 0; n < OUTPUTS; ++n) {
            const int e = n * THREADS + threadIdx.x, row = e / D, column = e % D;
            if (e >= rows * D) break;
            float x = o[n] * scores.shrink[row];
#pragma unroll 8
            for (int key = 0; key < TILE; ++key) x += scores.p[row][key] * values[key * STRIDE + column];
            o[n] = x;
        }

        if (here.ends_unit() || i == count - 1) {
            const bool whole = from_start && here.ends_unit();
            const i64 partial = partial_row(blockIdx.x, from_start);
#pragma unroll
            for (int n = 0; n < OUTPUTS; ++n) {
                const int e = n * THREADS + threadIdx.x, row = e / D;
                if (e >= rows * D) break;
                const float x = o[n] / scores.sum[row];
                if (whole) {
                    out[head + e] = x;
                } else {
                    partial_out[partial * D + e] = x;
                    if (e % D == 0) partial_lse[partial + row] = scores.max[row] * LOG2_E + log2f(scores.sum[row]);
                }
            }
        }
        __syncthreads();  // the buffer, Q and the scores are free again
        advance(here, prefix, B, grouping.groups);
    }
}
