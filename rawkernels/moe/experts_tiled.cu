// One of the two products of the experts' MLPs when an expert has many rows: tensor-core tiles (16-bit types).
//
// The products are those of experts_few.cu. Block (i, b) computes tile i, ROWS positions of one expert, and 128 weight
// rows: 128 columns of the down product, or 64 gate and the 64 matching up columns, whose activation and product are
// done in registers. Tiles run fastest over the grid, so the blocks that share weights run together and find them in L2.
//
// Idea: a ring of three stages of 64 values of I, filled by cp.async while the tensor cores work on an earlier one; 8
// warps as 2 x 4, a warp computes ROWS / 2 x 32. Both operands lie in shared memory as rows of 128 bytes, XOR-swizzled,
// read by ldmatrix without bank conflicts. Rows and values past the end are zeros.
// Bound: tensor cores (mma.sync reaches about 60 % of what Hopper's wgmma could).
//
// Macros: DTYPE (fp16, bf16), GATE (0, 1), ACTIVATION (silu, gelu_tanh), ROWS (64, 128).
#include "common/async.cuh"
#include "common/activations.cuh"
#include "common/mma.cuh"

typedef DTYPE T;
constexpr int COLUMNS = 128, DEPTH = 64, STAGES = 3, THREADS = 256;
constexpr int CHUNKS = DEPTH / 8;                       // 16-byte chunks of a row of a stage
constexpr int STAGE_CHUNKS = (ROWS + COLUMNS) * CHUNKS;  // x rows, then weight rows
constexpr int OUTPUTS = GATE ? COLUMNS / 2 : COLUMNS;
constexpr int PASS = THREADS / CHUNKS;  // rows that the block copies at once
constexpr int MT = ROWS / 32;           // 16-row tiles of a warp

// The copies of one thread: chunk threadIdx.x % 8 of every 32nd row. A null row is filled with zeros.
struct Loader {
    const T* rows[(ROWS + COLUMNS) / PASS];
    const T* anywhere;
    int I;

    __device__ __forceinline__ void load(u32 stage, int k) const {
        const int chunk = threadIdx.x % CHUNKS, row = threadIdx.x / CHUNKS;
        const bool inside = k + chunk * 8 < I;
#pragma unroll
        for (int i = 0; i < (ROWS + COLUMNS) / PASS; ++i) {
            const bool valid = inside && rows[i] != nullptr;
            const u32 to = stage + 16 * swizzled<CHUNKS>(row + i * PASS, chunk);
            start_copy(to, valid ? rows[i] + k + chunk * 8 : anywhere, valid);
        }
    }
};

// acc += x rows [16 MT] times weight rows [32] of a warp, over one stage.
__device__ __forceinline__ void multiply(u32 stage, int x_row, const int (&w_row)[2], float (&acc)[MT][4][4]) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int k = 0; k < DEPTH / 16; ++k) {
        u32 a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; ++m)
            load_matrices(a[m], stage + 16 * swizzled<CHUNKS>(x_row + m * 16 + (lane & 15), 2 * k + (lane >> 4)));
#pragma unroll
        for (int p = 0; p < 2; ++p) {
            u32 b[4];  // two column tiles: b[0], b[1] and b[2], b[3]
            const int row = w_row[p] + (lane & 7) + ((lane >> 4) << 3);
            load_matrices(b, stage + 16 * swizzled<CHUNKS>(row, 2 * k + ((lane >> 3) & 1)));
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                mma<T>(acc[m][2 * p], a[m], b[0], b[1]);
                mma<T>(acc[m][2 * p + 1], a[m], b[2], b[3]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    experts_tiled(const T* __restrict__ x, const T* __restrict__ w, const int* __restrict__ sorted,
                  const int4* __restrict__ tiles, T* __restrict__ out, int top_k, int N, int I) {
    extern __shared__ __align__(128) char shared[];
    const int4 tile = tiles[blockIdx.x];  // expert, first position, rows
    if (tile.x < 0) return;               // the whole block
    const int first = blockIdx.y * OUTPUTS;
    const T* expert = w + (i64)tile.x * (GATE ? 2 : 1) * N * I;

    Loader loader{{}, w, I};
#pragma unroll
    for (int i = 0; i < ROWS / PASS; ++i) {
        const int row = threadIdx.x / CHUNKS + i * PASS, position = tile.y + row;
        loader.rows[i] = row < tile.z ? x + (i64)(GATE ? sorted[position] / top_k : position) * I : nullptr;
    }
#pragma unroll
    for (int i = 0; i < COLUMNS / PASS; ++i) {
        const int row = threadIdx.x / CHUNKS + i * PASS;  // GATE: 0..63 gate, 64..127 up
        const int column = first + row % OUTPUTS;
        loader.rows[ROWS / PASS + i] =
            column < N ? expert + (i64)(column + (GATE ? row / OUTPUTS * N : 0)) * I : nullptr;
    }

    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int warp_row = (warp >> 2) * (ROWS / 2), warp_column = (warp & 3) * (GATE ? 16 : 32);
    const int w_row[2] = {ROWS + warp_column, ROWS + warp_column + (GATE ? COLUMNS / 2 : 16)};
    const u32 ring = shared_address(shared);
    const int steps = (I + DEPTH - 1) / DEPTH;
    float acc[MT][4][4] = {};
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < steps) loader.load(ring + s * STAGE_CHUNKS * 16, s * DEPTH);
        commit_copies();
    }
    for (int step = 0; step < steps; ++step) {
        wait_copies<STAGES - 2>();
        __syncthreads();  // this stage has landed for all, and all are done with the one before it
        const int ahead = step + STAGES - 1;
        if (ahead < steps) loader.load(ring + (ahead % STAGES) * STAGE_CHUNKS * 16, ahead * DEPTH);
        commit_copies();
        multiply(ring + (step % STAGES) * STAGE_CHUNKS * 16, warp_row, w_row, acc);
    }

#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = warp_row + m * 16 + half * 8 + (lane >> 2), position = tile.y + row;
            if (row >= tile.z) continue;
            T* to = out + (i64)(GATE ? position : sorted[position]) * N;
#pragma unroll
            for (int n = 0; n < (GATE ? 2 : 4); ++n) {
                const int column = first + warp_column + n * 8 + 2 * (lane & 3);
                if (column >= N) continue;  // N is even: both values are inside or none
                float low = acc[m][n][2 * half], high = acc[m][n][2 * half + 1];
                if (GATE) {
                    low = ACTIVATION(low) * acc[m][(n + 2) & 3][2 * half];
                    high = ACTIVATION(high) * acc[m][(n + 2) & 3][2 * half + 1];
                }
                *reinterpret_cast<u32*>(to + column) = pack<T>(low, high);
            }
        }
    }
}
