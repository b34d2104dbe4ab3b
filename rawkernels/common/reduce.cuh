// Reductions over a warp (shuffles) and over a block (shuffles, then one shared-memory exchange).
#pragma once

#define FULL_WARP 0xffffffffu

struct Sum {
    __device__ static __forceinline__ float identity() { return 0.0f; }
    __device__ static __forceinline__ float combine(float a, float b) { return a + b; }
};
struct Max {
    __device__ static __forceinline__ float identity() { return -__int_as_float(0x7f800000); }
    __device__ static __forceinline__ float combine(float a, float b) { return fmaxf(a, b); }
};

// Every lane of the warp gets the combined value. Butterfly order: all lanes compute identical bits.
template <typename Op> __device__ __forceinline__ float warp_reduce(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x = Op::combine(x, __shfl_xor_sync(FULL_WARP, x, offset));
    return x;
}

// Every thread of the block gets the combined value. The block is 1-D with a multiple of 32 threads; `scratch` has 32
// floats of shared memory and may be reused right after the call.
template <typename Op> __device__ __forceinline__ float block_reduce(float x, float* scratch) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    x = warp_reduce<Op>(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = warp_reduce<Op>(lane < warps ? scratch[lane] : Op::identity());
    __syncthreads();
    return x;
}
