// One of the two products of the experts' MLPs when each expert has few rows (a decode step; float32 always).
//
// GATE 1: hidden[position] = act(x[token] gate_e^T) * (x[token] up_e^T)      w is gate_up[X, 2N, I], N = F, I = E
// GATE 0: y[pair] = hidden[position] down_e^T                                w is down[X, N, I],     N = E, I = F
// A position is a place in the order of sort.cu: the rows of one expert are neighbours there.
//
// Idea: a stream of the weights of the experts that were hit, as in gemm/skinny.cu. Block (b, i) computes the rows of
// tile i and 8 columns (GATE: from the 8 gate rows and the 8 up rows of the weight, the activation done at once) or 16.
// Tiles that are not used leave at once: the grid is the same for every routing, so a graph may replay it.
// Bound: memory, the weights of each tile's expert once.
//
// Macros: DTYPE (float, fp16, bf16), GATE (0, 1), ACTIVATION (silu, gelu_tanh), ROWS (8; 16 for 16-bit types).
#include "common/activations.cuh"
#include "common/skinny.cuh"

typedef DTYPE T;
constexpr int OUTPUTS = GATE ? 8 : 16;  // columns of a block

extern "C" __global__ void __launch_bounds__(512, sizeof(T) == 2 ? 2 : 1)
    experts_few(const T* __restrict__ x, const T* __restrict__ w, const int* __restrict__ sorted,
                const int4* __restrict__ tiles, T* __restrict__ out, int top_k, int N, int I) {
    extern __shared__ __align__(16) char shared[];
    const int4 tile = tiles[blockIdx.y];  // expert, first position, rows
    if (tile.x < 0) return;               // the whole block
    const int first = blockIdx.x * OUTPUTS;
    const T* expert = w + (i64)tile.x * (GATE ? 2 : 1) * N * I + skinny_offset<T>();
    const T* weights[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        const int column = min(first + (GATE ? 0 : n * 8) + skinny_row(), N - 1);
        weights[n] = expert + (i64)(column + (GATE ? n * N : 0)) * I;
    }
    auto x_row = [&](int r) {
        const int position = tile.y + min(r, tile.z - 1);
        return x + (i64)(GATE ? sorted[position] / top_k : position) * I;
    };
    skinny_products<ROWS, 2, T>(x_row, weights, I, shared);
    for (int i = threadIdx.x; i < tile.z * OUTPUTS; i += blockDim.x) {
        const int row = i / OUTPUTS, column = i % OUTPUTS, position = tile.y + row;
        if (first + column >= N) continue;
        float sum = skinny_sum<2>(shared, row, column);
        if (GATE) sum = ACTIVATION(sum) * skinny_sum<2>(shared, row, 8 + column);
        out[(i64)(GATE ? position : sorted[position]) * N + first + column] = from_float<T>(sum);
    }
}
