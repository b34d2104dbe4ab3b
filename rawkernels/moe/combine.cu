// out[t] = sum over the choices j of weights[t, j] * y[t * top_k + j]: the experts' outputs back into one row a token.
//
// Idea: thread i of block (t, b) adds the 16-byte chunk b * blockDim.x + i of the token's top_k rows in float32, in the
// order of the choices, so the same bits every time. A weight is rounded to the model's type first, as Hugging Face does.
// Bound: memory, (top_k + 1) * E * sizeof(T) bytes a token.
//
// Macros: DTYPE (float, fp16, bf16).
#include "common/types.cuh"

typedef DTYPE T;

extern "C" __global__ void combine(const T* __restrict__ y, const float* __restrict__ weights,
                                   const int* __restrict__ experts, T* __restrict__ out, int X, int E, int top_k) {
    constexpr int N = Width<T>::value;
    const int i = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (i >= E) return;
    float sum[N] = {};
    for (int j = 0; j < top_k; ++j) {
        const i64 pair = (i64)blockIdx.x * top_k + j;
        if (experts[pair] < 0 || experts[pair] >= X) continue;  // its row of y was never written
        const float weight = rounded<T>(weights[pair]);
        float row[N];
        load_floats<T, N>(y + pair * E + i, row);
#pragma unroll
        for (int n = 0; n < N; ++n) sum[n] += weight * row[n];
    }
    store_floats<T, N>(out + (i64)blockIdx.x * E + i, sum);
}
