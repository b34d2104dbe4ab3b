// Matrix product with few rows: out[T, N] = x[T, I] @ w[N, I]^T (+ bias), T = 1..16 (16-bit) or 1..8 (float32).
//
// Idea: with few rows every weight is used once or a few times, so the kernel is a stream of the weights from device
// memory. Block b owns the weight rows 8 TILES b..; its warps split I among themselves and add their sums through shared
// memory in a fixed order (no atomics: the same bits every time). common/skinny.cuh has the loop.
// Bound: memory, N * I * sizeof(T) bytes; the rings of the resident blocks keep 100-200 KB in flight on each
// multiprocessor. Larger TILES read the activations less often; smaller ones give more blocks. skinny_plan chooses.
//
// Macros: DTYPE (float, fp16, bf16), OUT (the same, or float), ROWS (8, 16; float: 1, 2, 4, 8), TILES (1, 2, 4).
#include "common/overlap.cuh"
#include "common/skinny.cuh"

typedef DTYPE T;
typedef OUT O;

extern "C" __global__ void __launch_bounds__(512, sizeof(T) == 2 ? 2 : 1)
    skinny(const T* x, const T* __restrict__ w, const T* __restrict__ bias, O* out, int rows,
           int N, int I) {
    extern __shared__ __align__(16) char shared[];
    constexpr int COLUMNS = 8 * TILES;
    const int first = blockIdx.x * COLUMNS;
    const T* weights[TILES];
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
        const int row = min(first + n * 8 + skinny_row(), N - 1);  // past the end: read the last row, drop the result
        weights[n] = w + (i64)row * I + skinny_offset<T>();
    }
    skinny_products<ROWS, TILES, T>([&](int r) { return x + (i64)min(r, rows - 1) * I; }, weights, I, shared);
    for (int i = threadIdx.x; i < rows * COLUMNS; i += blockDim.x) {
        const int row = i / COLUMNS, column = i % COLUMNS;
        if (first + column >= N) continue;
        float sum = skinny_sum<TILES>(shared, row, column);
        if (bias != nullptr) sum += to_float(bias[first + column]);
        out[(i64)row * N + first + column] = from_float<O>(sum);
    }
}
