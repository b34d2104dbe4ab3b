// out[T, N] = bias[N] in every row: what a matrix product with beta = 1 then adds to, in float32, before it rounds once.
//
// Idea: thread i of block (t, b) writes column b * blockDim.x + i of row t. Bound: memory, T * N * sizeof(O) bytes.
//
// Macros: DTYPE (float, fp16, bf16), OUT (the same, or float).
#include "common/types.cuh"

typedef DTYPE T;
typedef OUT O;

extern "C" __global__ void fill_bias(const T* __restrict__ bias, O* __restrict__ out, int N) {
    const int column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column < N) out[(i64)blockIdx.x * N + column] = from_float<O>(to_float(bias[column]));
}
