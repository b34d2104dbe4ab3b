// The first half of a gated MLP with few rows: out[T, F] = act(x @ gate^T) * (x @ up^T), weight [2F, I] = gate, then up.
//
// Idea: gemm/skinny.cu with the activation in its epilogue. Block b owns the outputs 4 TILES b.., for each both the gate
// row and the up row of the weight, so the two sums meet in its shared memory: neither is written, and the elementwise
// kernel after the product is gone. Sums are rounded to T before the activation, as when they were stored.
// Which thread does what, and the bound (memory, 2 F * I * sizeof(T) bytes): as in gemm/skinny.cu.
//
// Macros: DTYPE (float, fp16, bf16), ACTIVATION (silu, gelu, gelu_tanh), ROWS (8, 16; float: 1, 2, 4, 8), TILES (2, 4).
#include "common/activations.cuh"
#include "common/overlap.cuh"
#include "common/skinny.cuh"

typedef DTYPE T;
constexpr int HALF = 4 * TILES;  // outputs of a block: half of its weight rows are gates

extern "C" __global__ void __launch_bounds__(512, 2)
    gated_skinny(const T* x, const T* __restrict__ w, T* out, int rows, int F, int I) {
    extern __shared__ __align__(16) char shared[];
    const int first = blockIdx.x * HALF;
    const T* weights[TILES];
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
        const int up = n >= TILES / 2;
        const int row = min(first + (n - up * (TILES / 2)) * 8 + skinny_row(), F - 1);  // past the end: not used
        weights[n] = w + ((i64)up * F + row) * I + skinny_offset<T>();
    }
    skinny_products<ROWS, TILES, T>([&](int r) { return x + (i64)min(r, rows - 1) * I; }, weights, I, shared);
    for (int i = threadIdx.x; i < rows * HALF; i += blockDim.x) {
        const int row = i / HALF, column = i % HALF;
        if (first + column >= F) continue;
        const float gate = rounded<T>(skinny_sum<TILES>(shared, row, column));
        const float up = rounded<T>(skinny_sum<TILES>(shared, row, HALF + column));
        out[(i64)row * F + first + column] = from_float<T>(rounded<T>(ACTIVATION(gate)) * up);
    }
}
