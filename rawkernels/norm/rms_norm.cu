// RMSNorm, alone and fused with the residual addition that always precedes it in a transformer.
//
// Idea: one block per token. The row is read once, kept in registers (float32), its sum of squares reduced over the
// block, and the scaled row written. Fusing the addition saves writing x + residual and reading it back.
// Thread t handles the 16-byte chunks t, t + blockDim.x, ...: consecutive threads read consecutive chunks, so every
// warp access is fully coalesced.
// Bound: memory. 2 * E * sizeof(T) bytes a token (rms_norm), 4 * E * sizeof(T) (add_rms_norm); no data is reused.
//
// Macros: DTYPE (float, fp16, bf16).
#include "common/types.cuh"
#include "common/overlap.cuh"
#include "common/reduce.cuh"

typedef DTYPE T;
constexpr int N = Width<T>::value;
constexpr int CHUNKS = 8;  // chunks a thread can keep in registers: rows up to blockDim.x * CHUNKS * N values
constexpr int MAX_THREADS = 512;  // 64 values a thread and the addresses need up to 128 registers

template <bool ADD>
__device__ __forceinline__ void norm_row(const T* x, T* residual, const T* __restrict__ weight, T* out, int E, float eps,
                                         float offset) {
    __shared__ float scratch[32];
    const i64 row = (i64)blockIdx.x * E;
    float values[CHUNKS][N], first_weights[N];
    float squares = 0.0f;
    allow_next();
    if (threadIdx.x * N < E) load_floats<T, N>(weight + threadIdx.x * N, first_weights);  // while the last kernel ends
    await_previous();
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        const int i = (c * blockDim.x + threadIdx.x) * N;
        if (i < E) {
            load_floats<T, N>(x + row + i, values[c]);
            if constexpr (ADD) {
                float other[N];
                load_floats<T, N>(residual + row + i, other);
#pragma unroll
                for (int j = 0; j < N; ++j) values[c][j] = rounded<T>(values[c][j] + other[j]);
                store_floats<T, N>(residual + row + i, values[c]);
            }
#pragma unroll
            for (int j = 0; j < N; ++j) squares += values[c][j] * values[c][j];
        }
    }
    const float scale = rsqrtf(block_reduce<Sum>(squares, scratch) / E + eps);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        const int i = (c * blockDim.x + threadIdx.x) * N;
        if (i < E) {
            float w[N], y[N];
            if (c > 0) load_floats<T, N>(weight + i, w);
#pragma unroll
            for (int j = 0; j < N; ++j) y[j] = values[c][j] * scale * (offset + (c > 0 ? w[j] : first_weights[j]));
            store_floats<T, N>(out + row + i, y);
        }
    }
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS)
    rms_norm(const T* x, const T* weight, T* out, int E, float eps, float offset) {
    norm_row<false>(x, nullptr, weight, out, E, eps, offset);
}

// residual += x, then out = norm(residual)
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
    add_rms_norm(const T* x, T* residual, const T* weight, T* out, int E, float eps, float offset) {
    norm_row<true>(x, residual, weight, out, E, eps, offset);
}
