// LayerNorm, alone and fused with the residual addition before it.
//
// Idea: as rms_norm.cu: one block per token, the row is read once and stays in registers. Mean and variance are two
// block reductions over those registers (two passes over the data, one over memory): subtracting the mean first
// avoids the cancellation of E[x^2] - E[x]^2.
// Thread t handles the 16-byte chunks t, t + blockDim.x, ...
// Bound: memory. 2 * E * sizeof(T) bytes a token (layer_norm), 4 * E * sizeof(T) (add_layer_norm).
//
// Macros: DTYPE (float, fp16, bf16).
#include "common/types.cuh"
#include "common/reduce.cuh"

typedef DTYPE T;
constexpr int N = Width<T>::value;
constexpr int CHUNKS = 8;  // chunks a thread can keep in registers: rows up to blockDim.x * CHUNKS * N values
constexpr int MAX_THREADS = 512;  // 64 values a thread and the addresses need up to 128 registers

template <bool ADD>
__device__ __forceinline__ float load_row(const T* __restrict__ x, T* __restrict__ residual, int E,
                                          float (&values)[CHUNKS][N]) {
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        const int i = (c * blockDim.x + threadIdx.x) * N;
        if (i < E) {
            load_floats<T, N>(x + i, values[c]);
            if constexpr (ADD) {
                float other[N];
                load_floats<T, N>(residual + i, other);
#pragma unroll
                for (int j = 0; j < N; ++j) values[c][j] = rounded<T>(values[c][j] + other[j]);
                store_floats<T, N>(residual + i, values[c]);
            }
#pragma unroll
            for (int j = 0; j < N; ++j) sum += values[c][j];
        }
    }
    return sum;
}

template <bool ADD>
__device__ __forceinline__ void norm_row(const T* __restrict__ x, T* __restrict__ residual,
                                         const T* __restrict__ weight, const T* __restrict__ bias, T* __restrict__ out,
                                         int E, float eps) {
    __shared__ float scratch[32];
    const i64 row = (i64)blockIdx.x * E;
    float values[CHUNKS][N];
    const float sum = load_row<ADD>(x + row, ADD ? residual + row : nullptr, E, values);
    const float mean = block_reduce<Sum>(sum, scratch) / E;
    float squares = 0.0f;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        if ((c * blockDim.x + threadIdx.x) * N < E) {
#pragma unroll
            for (int j = 0; j < N; ++j) {
                values[c][j] -= mean;
                squares += values[c][j] * values[c][j];
            }
        }
    }
    const float scale = rsqrtf(block_reduce<Sum>(squares, scratch) / E + eps);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        const int i = (c * blockDim.x + threadIdx.x) * N;
        if (i < E) {
            float w[N], b[N], y[N];
            load_floats<T, N>(weight + i, w);
            load_floats<T, N>(bias + i, b);
#pragma unroll
            for (int j = 0; j < N; ++j) y[j] = values[c][j] * scale * w[j] + b[j];
            store_floats<T, N>(out + row + i, y);
        }
    }
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS)
    layer_norm(const T* x, const T* weight, const T* bias, T* out, int E, float eps) {
    norm_row<false>(x, nullptr, weight, bias, out, E, eps);
}

// residual += x, then out = norm(residual)
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
    add_layer_norm(const T* x, T* residual, const T* weight, const T* bias, T* out, int E, float eps) {
    norm_row<true>(x, residual, weight, bias, out, E, eps);
}
