// Paged prefill attention for float32 caches, on the ordinary cores: the algorithm of paged_prefill.cu without its
// tricks.
//
// Idea: a block holds ROWS query rows (row = token * G + head in group, so the heads that share K and V are
// together) and walks over the keys they see, KEYS at a time. One shared buffer holds the keys, then the values of a
// tile.
// Thread (y, x) of 8 x 16 owns rows 4y..4y+3: their scores against keys x and x + 16, and the output columns 4x.. of
// every 64. A row's softmax is thus a shuffle among 16 lanes; only the probabilities pass through shared memory.
// Rows are padded by 4 floats so that 16 threads reading 16 rows hit different banks.
// Bound: FP32 arithmetic, 4 FMA per pair of shared loads.
//
// Macros: HEAD_DIM (a multiple of 16 up to 256).
#include "common/types.cuh"
#include "common/reduce.cuh"
#include "common/math.cuh"

constexpr int D = HEAD_DIM;
constexpr int THREADS = 128;
constexpr int ROWS = 32, KEYS = 32;            // as in attention.py
constexpr int STRIDE = D + 4;                  // floats of a shared row
constexpr int PIECES = (D / 4 + 15) / 16;      // groups of 4 output columns of a thread

struct Query {
    int first, count, G, position;  // rows of the block; position of the sequence's first query token
    __device__ int position_of(int row) const { return position + (first + min(row, count - 1)) / G; }
};

struct Cache {
    const float* kv;  // keys of this key/value head in page 0; values are `values` floats behind
    const int* table;
    i64 page, values;  // floats from page to page, and from a key to its value
    int log2_S;
};

// Reduces over the 16 lanes of a half warp.
template <typename Op> __device__ __forceinline__ float half_warp_reduce(float x) {
#pragma unroll
    for (int offset = 8; offset > 0; offset >>= 1) x = Op::combine(x, __shfl_xor_sync(FULL_WARP, x, offset));
    return x;
}

// Copies the keys (offset 0) or values of positions first_key.. to shared memory; zeros outside [first, end).
__device__ __forceinline__ void load_tile(const Cache& cache, i64 offset, int first_key, int first, int end,
                                          float* to) {
    for (int i = threadIdx.x; i < KEYS * (D / 4); i += THREADS) {
        const int r = i / (D / 4), column = i % (D / 4) * 4, position = first_key + r;
        float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (position >= first && position < end) {
            const i64 page = cache.table[position >> cache.log2_S];
            const int slot = position & ((1 << cache.log2_S) - 1);
            load_floats<float, 4>(cache.kv + page * cache.page + offset + slot * D + column, x);
        }
        store_floats<float, 4>(to + r * STRIDE + column, x);
    }
}

__device__ __forceinline__ void load_queries(const float* __restrict__ q, const Query& query, int H, float* to) {
    for (int i = threadIdx.x; i < ROWS * (D / 4); i += THREADS) {
        const int r = i / (D / 4), column = i % (D / 4) * 4, row = query.first + r;
        float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (r < query.count) {
            load_floats<float, 4>(q + ((i64)(row / query.G) * H + row % query.G) * D + column, x);
        }
        store_floats<float, 4>(to + r * STRIDE + column, x);
    }
}

// s[r][k] = q_row . key: rows 4y + r, keys x + 16k.
__device__ __forceinline__ void score(const float* queries, const float* keys, float (&s)[4][2]) {
    const int x = threadIdx.x & 15, y = threadIdx.x >> 4;
#pragma unroll
    for (int r = 0; r < 4; ++r) s[r][0] = s[r][1] = 0.0f;
#pragma unroll 4
    for (int d = 0; d < D; d += 4) {
        float b[2][4];
        load_floats<float, 4>(keys + x * STRIDE + d, b[0]);
        load_floats<float, 4>(keys + (x + 16) * STRIDE + d, b[1]);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            float a[4];
            load_floats<float, 4>(queries + (4 * y + r) * STRIDE + d, a);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                s[r][0] += a[e] * b[0][e];
                s[r][1] += a[e] * b[1][e];
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    paged_prefill_f32(const float* __restrict__ q, const float* __restrict__ kv_cache, const int* __restrict__ tables,
                      const int* __restrict__ query_start, const int* __restrict__ context_lens,
                      float* __restrict__ out, int H, int K, int M, int log2_S, int window, float scale,
                      float softcap) {
    extern __shared__ __align__(16) u8 shared[];  // queries [ROWS, STRIDE], keys or values [KEYS, STRIDE]
    __shared__ float p[ROWS][KEYS + 1];
    float* queries = reinterpret_cast<float*>(shared);
    float* tile = queries + ROWS * STRIDE;
    const int x = threadIdx.x & 15, y = threadIdx.x >> 4, b = blockIdx.z, kv_head = blockIdx.y, G = H / K;
    const int start = query_start[b], tokens = query_start[b + 1] - start, context = context_lens[b];
    const int first_row = (gridDim.x - 1 - blockIdx.x) * ROWS;  // late rows see the most keys: they go first
    if (first_row >= tokens * G) return;
    const Query query = {first_row, min(ROWS, tokens * G - first_row), G, context - tokens};
    const i64 origin = ((i64)start * H + kv_head * G) * D, head = (i64)D << log2_S;
    const Cache cache = {kv_cache + kv_head * head, tables + (i64)b * M, 2 * K * head, K * head, log2_S};
    const int end = query.position_of(query.count - 1) + 1;
    const int first = window > 0 ? max(0, query.position_of(0) - window + 1) : 0;

    float o[4][PIECES][4], top[4], total[4];
    int position[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        top[r] = MINUS_INFINITY;
        total[r] = 0.0f;
        position[r] = query.position_of(4 * y + r);
#pragma unroll
        for (int n = 0; n < PIECES; ++n) o[r][n][0] = o[r][n][1] = o[r][n][2] = o[r][n][3] = 0.0f;
    }
    load_queries(q + origin, query, H, queries);

    for (int first_key = first / KEYS * KEYS; first_key < end; first_key += KEYS) {
        __syncthreads();  // everyone is done with the previous values
        load_tile(cache, 0, first_key, first, end, tile);
        __syncthreads();
        float s[4][2];
        score(queries, tile, s);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int distance = position[r] - (first_key + x + 16 * k);
                s[r][k] *= scale;
                if (softcap > 0.0f) s[r][k] = softcap * tanhf(s[r][k] / softcap);
                if (distance < 0 || (window > 0 && distance >= window)) s[r][k] = MINUS_INFINITY;
            }
            const float higher = fmaxf(top[r], half_warp_reduce<Max>(fmaxf(s[r][0], s[r][1])));
            const float base = higher == MINUS_INFINITY ? 0.0f : higher;  // a row that has seen no key yet
            const float shrink = expf(top[r] - base), low = expf(s[r][0] - base), high = expf(s[r][1] - base);
            p[4 * y + r][x] = low;
            p[4 * y + r][x + 16] = high;
            total[r] = total[r] * shrink + half_warp_reduce<Sum>(low + high);
            top[r] = higher;
#pragma unroll
            for (int n = 0; n < PIECES; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) o[r][n][e] *= shrink;
            }
        }
        __syncthreads();  // the keys are done with, the probabilities are there
        load_tile(cache, cache.values, first_key, first, end, tile);
        __syncthreads();
#pragma unroll 4
        for (int key = 0; key < KEYS; ++key) {
#pragma unroll
            for (int n = 0; n < PIECES; ++n) {
                const int column = 4 * x + 64 * n;
                if (D % 64 != 0 && column >= D) break;
                float v[4];
                load_floats<float, 4>(tile + key * STRIDE + column, v);
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const float weight = p[4 * y + r][key];
#pragma unroll
                    for (int e = 0; e < 4; ++e) o[r][n][e] += weight * v[e];
                }
            }
        }
    }

#pragma unroll
    for (int r = 0; r < 4; ++r) {
        if (4 * y + r >= query.count) break;
        const int row = query.first + 4 * y + r;
        float* target = out + origin + ((i64)(row / G) * H + row % G) * D;
#pragma unroll
        for (int n = 0; n < PIECES; ++n) {
            const int column = 4 * x + 64 * n;
            if (D % 64 != 0 && column >= D) break;
            float y4[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) y4[e] = total[r] == 0.0f ? 0.0f : o[r][n][e] / total[r];  // no key: zeros
            store_floats<float, 4>(target + column, y4);
        }
    }
}
