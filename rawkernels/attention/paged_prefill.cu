// Paged prefill attention for 16-bit caches: causal FlashAttention-2 over pages, on tensor cores.
//
// Idea: a block holds a tile of query rows, walks over the keys and values that they see, 64 at a time, and keeps
// the running maximum, sum and output of every row in registers, so no score ever reaches memory. The query heads
// that share a key/value head are rows of the same tile (row = token * G + head in group): a tile then spans few
// tokens, which keeps short chunks efficient and wastes little at the causal edge.
// Warp w owns rows 16*TILES*w .. of the tile through everything: S = Q K^T, softmax, O += P V, and its rows of
// shared Q; two 16-row tiles per warp (D <= 128) use every K and V fragment twice, which shared-memory bandwidth
// needs.
// All threads copy: the rows of the cache that hold the keys of a tile are looked up two tiles ahead and kept in
// shared memory (`rows`); K and V travel as separate cp.async groups. With two buffers (D <= 128) K and V of the
// next tile are in flight during the whole current one; with one, V arrives during S = Q K^T and the next K during
// O += P V.
// Tiles of keys that no row of a warp sees are skipped, masks are applied only at the edges, and the longest row tiles
// of a sequence start first.
// Bound: mma.sync throughput, then the exp2 and scaling between the two products.
//
// Macros: DTYPE (fp16, bf16), HEAD_DIM (a multiple of 16 up to 256).
#include "common/types.cuh"
#include "common/reduce.cuh"
#include "common/math.cuh"
#include "common/async.cuh"
#include "common/mma.cuh"

typedef DTYPE T;
constexpr int D = HEAD_DIM;
constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int TILES = D > 128 ? 1 : 2;             // 16-row tiles of a warp; as in attention.py
constexpr int STAGES = D > 128 ? 1 : 2;            // buffers of K and of V; as in attention.py
constexpr int WARP_ROWS = 16 * TILES, ROWS = WARPS * WARP_ROWS;
constexpr int KEYS = 64;                           // keys of a tile
constexpr int CHUNKS = D / 8;                      // 16-byte chunks of a row
constexpr int TILE_BYTES = KEYS * D * 2;           // K or V of a tile

struct Cache {
    const T* kv;
    const int* table;  // of this sequence
    int K, log2_S, kv_head;
};

// The query rows of the block: `count` rows of G heads per token, the first at row `first` of the sequence.
struct Block {
    int first, count, G, position;  // position: of the sequence's first query token
    __device__ int position_of(int row) const { return position + (first + min(row, count - 1)) / G; }
};

// Row number (of D values) in the cache of the key at `position`; -1 outside [first, end).
__device__ __forceinline__ int find_row(const Cache& cache, int position, int first, int end) {
    if (position < first || position >= end) return -1;
    const int page = cache.table[position >> cache.log2_S];
    return ((page * 2 * cache.K + cache.kv_head) << cache.log2_S) + (position & ((1 << cache.log2_S) - 1));
}

// All threads start copying KEYS rows of keys (or values, `offset` elements behind) to a shared tile; row -1: zeros.
__device__ __forceinline__ void start_tile(const T* __restrict__ kv, const int* rows, u32 target) {
#pragma unroll
    for (int i = 0; i < KEYS * CHUNKS / THREADS; ++i) {
        const int r = (i * THREADS + threadIdx.x) / CHUNKS, chunk = (i * THREADS + threadIdx.x) % CHUNKS;
        const int source = rows[r];
        start_copy(target + swizzled<CHUNKS>(r, chunk) * 16, kv + (i64)max(source, 0) * D + chunk * 8, source >= 0);
    }
}

// All threads start copying the block's query rows; missing rows become zeros.
__device__ __forceinline__ void start_queries(const T* __restrict__ q, const Block& block, int H, u32 target) {
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        const int r = i / CHUNKS, chunk = i % CHUNKS, row = block.first + r;
        const i64 head = (i64)(row / block.G) * H + row % block.G;
        const bool valid = r < block.count;
        start_copy(target + swizzled<CHUNKS>(r, chunk) * 16, q + (valid ? head : 0) * D + chunk * 8, valid);
    }
}

// What a lane holds of its warp's rows: row lane/4 (+8) of each 16-row tile, columns 2*(lane%4).. of every 8.
struct State {
    float o[TILES][D / 8][4];
    float max[TILES][2], sum[TILES][2];  // in base 2; `sum` of this lane's columns only
    int position[TILES][2];
};

// s = Q K^T: the warp's rows against the KEYS keys of a shared tile.
__device__ __forceinline__ void score(u32 queries, u32 keys, float (&s)[TILES][KEYS / 8][4]) {
    const int lane = threadIdx.x & 31;
    const int row = lane & 15, row_odd = lane >> 4, key = (lane & 7) + (lane >> 4) * 8, key_odd = (lane >> 3) & 1;
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) s[t][n][0] = s[t][n][1] = s[t][n][2] = s[t][n][3] = 0.0f;
    }
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        u32 a[TILES][4];
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
            load_matrices(a[t], queries + swizzled<CHUNKS>(16 * t + row, 2 * k + row_odd) * 16);
        }
#pragma unroll
        for (int n = 0; n < KEYS / 16; ++n) {
            u32 b[4];
            load_matrices(b, keys + swizzled<CHUNKS>(16 * n + key, 2 * k + key_odd) * 16);
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                mma<T>(s[t][2 * n], a[t], b[0], b[1]);
                mma<T>(s[t][2 * n + 1], a[t], b[2], b[3]);
            }
        }
    }
}

// x = softcap * tanh(scale * x / softcap): afterwards the scores need no further scale.
__device__ __forceinline__ void cap(float (&s)[TILES][KEYS / 8][4], float scale, float softcap) {
    const float inner = scale / softcap;
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) s[t][n][e] = softcap * fast_tanh(s[t][n][e] * inner);
        }
    }
}

// -inf where a row does not see the key: keys first_key.. of the tile, rows at state.position.
__device__ __forceinline__ void mask(const State& state, float (&s)[TILES][KEYS / 8][4], int first_key, int window) {
    const int column = first_key + 2 * (threadIdx.x & 3);
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int distance = state.position[t][e / 2] - (column + n * 8 + (e & 1));
                if (distance < 0 || (window > 0 && distance >= window)) s[t][n][e] = MINUS_INFINITY;
            }
        }
    }
}

// Online softmax: scores become 2^(scale * s - max), and what was summed so far shrinks to the new maximum.
__device__ __forceinline__ void soften(State& state, float (&s)[TILES][KEYS / 8][4], float scale) {
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
        float shrink[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top = MINUS_INFINITY;
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) top = fmaxf(top, fmaxf(s[t][n][2 * half], s[t][n][2 * half + 1]));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
            top = fmaxf(state.max[t][half], top * scale);
            const float base = top == MINUS_INFINITY ? 0.0f : top;  // a row that has seen no key yet
            shrink[half] = fast_exp2(state.max[t][half] - base);
            state.max[t][half] = top;
            float sum = state.sum[t][half] * shrink[half];
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; ++e) {
                    s[t][n][e] = fast_exp2(s[t][n][e] * scale - base);
                    sum += s[t][n][e];
                }
            }
            state.sum[t][half] = sum;
        }
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) state.o[t][n][e] *= shrink[e / 2];
        }
    }
}

// O += P V for the KEYS values of a shared tile; P is packed to 16 bits, 16 keys at a time.
__device__ __forceinline__ void accumulate(State& state, const u32 (&p)[TILES][KEYS / 16][4], u32 values) {
    const int lane = threadIdx.x & 31, key = lane & 15, odd = lane >> 4;
#pragma unroll
    for (int k = 0; k < KEYS / 16; ++k) {
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            u32 b[4];
            load_matrices_transposed(b, values + swizzled<CHUNKS>(16 * k + key, 2 * n + odd) * 16);
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                mma<T>(state.o[t][2 * n], p[t][k], b[0], b[1]);
                mma<T>(state.o[t][2 * n + 1], p[t][k], b[2], b[3]);
            }
        }
    }
}

// Normalises the warp's rows, passes them through its rows of shared Q, and writes them in 16-byte pieces.
__device__ __forceinline__ void write_rows(State& state, u8* staging, const Block& block, T* __restrict__ out, int H) {
    const int lane = threadIdx.x & 31, warp_row = (threadIdx.x >> 5) * WARP_ROWS;
    __syncwarp();  // the warp has read its queries
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = state.sum[t][half];
            sum += __shfl_xor_sync(FULL_WARP, sum, 1);
            sum += __shfl_xor_sync(FULL_WARP, sum, 2);
            const float scale = sum > 0.0f || sum != sum ? 1.0f / sum : 0.0f;  // no key at all: zeros; NaN stays
            const int row = 16 * t + 8 * half + lane / 4;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                u32* target = reinterpret_cast<u32*>(staging + swizzled<CHUNKS>(row, n) * 16);
                target[lane % 4] = pack<T>(state.o[t][n][2 * half] * scale, state.o[t][n][2 * half + 1] * scale);
            }
        }
    }
    __syncwarp();
    for (int i = lane; i < WARP_ROWS * CHUNKS; i += 32) {
        const int r = i / CHUNKS, chunk = i % CHUNKS, row = block.first + warp_row + r;
        if (warp_row + r >= block.count) break;
        const i64 head = (i64)(row / block.G) * H + row % block.G;
        *reinterpret_cast<Vec<T, 8>*>(out + head * D + chunk * 8) =
            *reinterpret_cast<const Vec<T, 8>*>(staging + swizzled<CHUNKS>(r, chunk) * 16);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    paged_prefill(const T* __restrict__ q, const T* __restrict__ kv_cache, const int* __restrict__ tables,
                  const int* __restrict__ query_start, const int* __restrict__ context_lens, T* __restrict__ out, int H,
                  int K, int M, int log2_S, int window, float scale, float softcap) {
    extern __shared__ __align__(16) u8 shared[];  // Q [ROWS, D], K [STAGES, KEYS, D], V [STAGES, KEYS, D]
    __shared__ int rows[2][KEYS];
    const int b = blockIdx.z, kv_head = blockIdx.y, G = H / K;
    const int start = query_start[b], tokens = query_start[b + 1] - start, context = context_lens[b];
    const int first_row = (gridDim.x - 1 - blockIdx.x) * ROWS;  // late rows see the most keys: they go first
    if (first_row >= tokens * G) return;
    const Block block = {first_row, min(ROWS, tokens * G - first_row), G, context - tokens};
    const i64 origin = ((i64)start * H + kv_head * G) * D;

    const int end = block.position_of(block.count - 1) + 1;
    const int first = window > 0 ? max(0, block.position_of(0) - window + 1) : 0;
    const int first_tile = first / KEYS, tiles = max(0, (end + KEYS - 1) / KEYS - first_tile);
    const Cache cache = {kv_cache, tables + (i64)b * M, K, log2_S, kv_head};
    const T* values_origin = kv_cache + (i64)(K << log2_S) * D;  // a value lies this far behind its key
    const u32 queries = shared_address(shared), keys = queries + ROWS * D * 2, values = keys + STAGES * TILE_BYTES;

    const int lane = threadIdx.x & 31, warp_row = (threadIdx.x >> 5) * WARP_ROWS;
    const u32 warp_queries = queries + warp_row * D * 2;
    const int low = block.position_of(warp_row), high = block.position_of(warp_row + WARP_ROWS - 1);
    State state;
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            state.position[t][half] = block.position_of(warp_row + 16 * t + 8 * half + lane / 4);
            state.max[t][half] = MINUS_INFINITY;
            state.sum[t][half] = 0.0f;
        }
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) state.o[t][n][e] = 0.0f;
        }
    }

    const auto find = [&](int tile) {
        return find_row(cache, (first_tile + tile) * KEYS + (threadIdx.x & (KEYS - 1)), first, end);
    };
    const auto start_keys = [&](int tile) {
        if (tile < tiles) start_tile(kv_cache, rows[tile % 2], keys + tile % STAGES * TILE_BYTES);
        commit_copies();
    };
    const auto start_values = [&](int tile) {
        if (tile < tiles) start_tile(values_origin, rows[tile % 2], values + tile % STAGES * TILE_BYTES);
        commit_copies();
    };
    rows[threadIdx.x / KEYS][threadIdx.x % KEYS] = find(threadIdx.x / KEYS);
    __syncthreads();
    start_queries(q + origin, block, H, queries);
    start_keys(0);
    if (STAGES == 2) start_values(0);

    const float score_scale = softcap > 0.0f ? LOG2_E : scale * LOG2_E;
    for (int tile = 0; tile < tiles; ++tile) {
        const int first_key = (first_tile + tile) * KEYS;
        const bool needed = warp_row < block.count && first_key <= high &&
                            (window == 0 || first_key + KEYS - 1 > low - window);
        wait_copies<STAGES - 1>();
        __syncthreads();  // K of this tile is there; all warps are done with the previous tile
        if (STAGES == 2) start_keys(tile + 1);
        else start_values(tile);
        const int later_row = find(tile + 2);

        u32 p[TILES][KEYS / 16][4];
        if (needed) {
            float s[TILES][KEYS / 8][4];
            score(warp_queries, keys + tile % STAGES * TILE_BYTES, s);
            if (softcap > 0.0f) cap(s, scale, softcap);
            if (first_key + KEYS - 1 > low || (window > 0 && first_key <= high - window)) {
                mask(state, s, first_key, window);
            }
            soften(state, s, score_scale);
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n) {
                    p[t][n / 2][n % 2 * 2] = pack<T>(s[t][n][0], s[t][n][1]);
                    p[t][n / 2][n % 2 * 2 + 1] = pack<T>(s[t][n][2], s[t][n][3]);
                }
            }
        }
        wait_copies<STAGES - 1>();
        __syncthreads();  // V of this tile is there; all warps are done with K
        if (STAGES == 2) start_values(tile + 1);
        else start_keys(tile + 1);
        if (threadIdx.x < KEYS) rows[tile % 2][threadIdx.x] = later_row;
        if (needed) accumulate(state, p, values + tile % STAGES * TILE_BYTES);
    }
    wait_copies<0>();  // with no tile at all the queries are still on their way
    __syncthreads();
    write_rows(state, shared + warp_row * D * 2, block, out + origin, H);
}
