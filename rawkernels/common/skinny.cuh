// The inner product loop for few rows: a handful of activation rows times many weight rows, each weight read once.
//
// R is the number of activation rows, W the number of tiles of 8 weight rows. A block owns 8 W weight rows; its warps
// share the I axis: a warp takes a segment of 512 bytes of each row, then the segment `warps` further on, and so on. With
// g = lane / 4 and t = lane % 4, a lane reads weight row g of each tile at byte 16 t of every 64-byte chunk, so that
// each copy of the warp covers 8 rows x 64 bytes, whole sectors; a stage is two chunks, whole 128-byte lines.
// Each warp has its own ring of STAGES stages in shared memory, filled by cp.async and read back by the very lane that
// asked for it: no barriers, no registers spent on waiting, and a constant number of bytes in flight. Memory latency, not
// arithmetic, is what a kernel with few rows waits for.
//
// 16-bit types: a lane's 16 bytes are exactly the B fragments of two m16n8k16 products once k is renumbered so that lane
// t holds k = 8t..8t+7 of the chunk; reading the activations (A, up to 16 rows) the same way renumbers them alike. So up
// to 16 rows cost the same two tensor-core instructions.
// float32: multiply-adds on the same layout, R for each weight; the four lanes of a row are added at the end.
//
// The order of additions depends on I and the number of warps only, never on R or W: the result for one row has the same
// bits whatever the rows beside it are.
#pragma once
#include "common/mma.cuh"
#include "common/overlap.cuh"
#include "common/reduce.cuh"
#include "common/stream.cuh"

constexpr int SKINNY_SEGMENT = 512;  // bytes
constexpr int SKINNY_STAGE = 128;    // bytes of a row in a stage: two chunks

template <int W> __device__ constexpr int skinny_stages() { return W < 4 ? 4 : 3; }

// Shared memory of one warp in bytes: the ring, reused for the sums. runtime/gemm_plan.py computes the same.
template <int W> __device__ constexpr int skinny_warp_bytes() { return skinny_stages<W>() * 8 * W * SKINNY_STAGE; }

// A lane's place: which row of eight it reads, and the offset of its 16 bytes in a chunk, in values.
__device__ __forceinline__ int skinny_row() { return (threadIdx.x & 31) >> 2; }
template <typename T> __device__ __forceinline__ int skinny_offset() { return (threadIdx.x & 3) * Width<T>::value; }

// Sums for 16-bit types: R is 8 or 16.
template <typename T, int R, int W> struct SkinnySums {
    float acc[W][4] = {};
    const T *low, *high;    // activation rows g and g + 8
    uint4 next_low[2], next_high[2];

    template <typename Rows> __device__ __forceinline__ SkinnySums(Rows x_row) {
        low = x_row(skinny_row()) + skinny_offset<T>();
        high = R > 8 ? x_row(skinny_row() + 8) + skinny_offset<T>() : low;
    }

    // Fetch the activations of the stage at value k; those at and after `limit` count as zero.
    __device__ __forceinline__ void fetch(int k, int limit) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int at = k + c * (64 / (int)sizeof(T));
            const uint4 zero = make_uint4(0, 0, 0, 0);
            next_low[c] = at < limit ? load_cached(low + at) : zero;
            next_high[c] = R > 8 && at < limit ? load_cached(high + at) : zero;
        }
    }

    // Add the stage whose activations were fetched last, then fetch those of the stage at next_k.
    __device__ __forceinline__ void add(const uint4* stage, int next_k, int limit) {
        const uint4 a[2] = {next_low[0], next_low[1]}, b[2] = {next_high[0], next_high[1]};
        fetch(next_k, limit);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
#pragma unroll
            for (int n = 0; n < W; ++n) {
                const uint4 w = stage[(c * W + n) * 32];
                mma<T>(acc[n], {a[c].x, b[c].x, a[c].y, b[c].y}, w.x, w.y);
                mma<T>(acc[n], {a[c].z, b[c].z, a[c].w, b[c].w}, w.z, w.w);
            }
        }
    }

    // Write the warp's sums as [R][8 W].
    __device__ __forceinline__ void store(float* sums) {
        float* p = sums + skinny_row() * 8 * W + 2 * (threadIdx.x & 3);
#pragma unroll
        for (int n = 0; n < W; ++n) {
            p[n * 8] = acc[n][0];
            p[n * 8 + 1] = acc[n][1];
            if (R > 8) {
                p[n * 8 + 64 * W] = acc[n][2];
                p[n * 8 + 64 * W + 1] = acc[n][3];
            }
        }
    }
};

__device__ __forceinline__ float dot4(uint4 a, uint4 b, float c) {
    c = fmaf(__uint_as_float(a.x), __uint_as_float(b.x), c);
    c = fmaf(__uint_as_float(a.y), __uint_as_float(b.y), c);
    c = fmaf(__uint_as_float(a.z), __uint_as_float(b.z), c);
    return fmaf(__uint_as_float(a.w), __uint_as_float(b.w), c);
}

// Sums in float32: R is 1, 2, 4 or 8.
template <int R, int W> struct SkinnySums<float, R, W> {
    float acc[R][W] = {};
    const float* rows[R];
    int k = 0;

    template <typename Rows> __device__ __forceinline__ SkinnySums(Rows x_row) {
#pragma unroll
        for (int r = 0; r < R; ++r) rows[r] = x_row(r) + skinny_offset<float>();
    }

    __device__ __forceinline__ void fetch(int first_k, int) { k = first_k; }

    __device__ __forceinline__ void add(const uint4* stage, int next_k, int limit) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            uint4 w[W];
#pragma unroll
            for (int n = 0; n < W; ++n) w[n] = stage[(c * W + n) * 32];
            const int at = k + c * 16;
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const uint4 x = at < limit ? load_cached(rows[r] + at) : make_uint4(0, 0, 0, 0);
#pragma unroll
                for (int n = 0; n < W; ++n) acc[r][n] = dot4(x, w[n], acc[r][n]);
            }
        }
        k = next_k;
    }

    __device__ __forceinline__ void store(float* sums) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
            for (int n = 0; n < W; ++n) {
                float sum = acc[r][n];
                sum += __shfl_xor_sync(FULL_WARP, sum, 1);
                sum += __shfl_xor_sync(FULL_WARP, sum, 2);
                if ((threadIdx.x & 3) == (r & 3)) sums[(r * W + n) * 8 + skinny_row()] = sum;
            }
        }
    }
};

// All warps of the block: products of R activation rows with 8 W weight rows of I values.
//
// x_row(r) gives the start of activation row r for r < R; where there are fewer rows it may repeat one (its sums are
// then not used). weights[n] is the lane's weight row in tile n, plus skinny_offset. I is a multiple of 16 bytes, rows
// are 16-byte aligned. `shared` has blockDim.x / 32 * skinny_warp_bytes<W>() bytes. Afterwards the block is synchronised
// and skinny_sum gives the totals.
template <int R, int W, typename T, typename Rows>
__device__ __forceinline__ void skinny_products(Rows x_row, const T* const (&weights)[W], int I, char* shared) {
    constexpr int STAGES = skinny_stages<W>(), CHUNK = 64 / sizeof(T);
    constexpr int SEGMENT = SKINNY_SEGMENT / sizeof(T), PER_SEGMENT = SKINNY_SEGMENT / SKINNY_STAGE;
    const int warp = threadIdx.x >> 5, warps = blockDim.x >> 5, limit = I - skinny_offset<T>();
    char* ring = shared + warp * skinny_warp_bytes<W>();
    uint4* slot = reinterpret_cast<uint4*>(ring) + (threadIdx.x & 31);  // this lane's in every group of 32

    // Stage j of this warp starts at value (j / PER_SEGMENT * warps + warp) * SEGMENT + j % PER_SEGMENT * 2 * CHUNK.
    allow_next();
    auto start = [&](int j) { return ((j / PER_SEGMENT) * warps + warp) * SEGMENT + (j % PER_SEGMENT) * 2 * CHUNK; };
    auto request = [&](int place, int k) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int at = k + c * CHUNK;
#pragma unroll
            for (int n = 0; n < W; ++n)
                start_stream_copy(shared_address(slot + ((place * 2 + c) * W + n) * 32), weights[n] + at, at < limit);
        }
    };

#pragma unroll
    for (int j = 0; j < STAGES; ++j) {
        if (start(j) < I) request(j, start(j));
        commit_copies();
    }
    await_previous();  // the weights are on their way; the activations may only now be read
    SkinnySums<T, R, W> sums(x_row);
    sums.fetch(start(0), limit);
    int place = 0;
    for (int j = 0; start(j) < I; ++j) {
        wait_copies<STAGES - 1>();
        sums.add(slot + place * 2 * W * 32, start(j + 1), limit);
        if (start(j + STAGES) < I) request(place, start(j + STAGES));
        commit_copies();
        place = place + 1 == STAGES ? 0 : place + 1;
    }
    wait_copies<0>();
    __syncwarp();
    sums.store(reinterpret_cast<float*>(ring));
    __syncthreads();
}

// The total for activation row `row` and weight row `column` of the block's 8 W, added over the warps in order.
template <int W> __device__ __forceinline__ float skinny_sum(const char* shared, int row, int column) {
    const float* sums = reinterpret_cast<const float*>(shared) + row * 8 * W + column;
    float sum = 0.0f;
    for (int w = 0; w < (int)(blockDim.x >> 5); ++w) sum += sums[w * (skinny_warp_bytes<W>() / 4)];
    return sum;
}
