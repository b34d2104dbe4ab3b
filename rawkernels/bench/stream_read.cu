// Read a large array and write almost nothing: the rate is the ceiling of every memory-bound kernel.
//
// Idea: each thread sums 16-byte chunks, four of them in flight, a grid apart so that a warp reads 512 consecutive bytes.
// The sum is written only if it has an impossible value, so that the compiler cannot drop the loads.
// Bound: device memory, when the array is several times the L2 cache.
#include "common/types.cuh"

extern "C" __global__ void stream_read(const uint4* data, u32* out, i64 chunks) {
    const i64 stride = (i64)gridDim.x * blockDim.x;
    u32 sum = 0;
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 3 * stride < chunks; i += 4 * stride) {
        uint4 v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) v[j] = data[i + j * stride];
#pragma unroll
        for (int j = 0; j < 4; ++j) sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    for (; i < chunks; i += stride) {
        const uint4 v = data[i];
        sum += v.x ^ v.y ^ v.z ^ v.w;
    }
    if (sum == 0x9e3779b9u) out[0] = sum;
}
