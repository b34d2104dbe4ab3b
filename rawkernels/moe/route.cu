// Choose top_k of X experts for each token: p = softmax(logits), the k largest (equal logits: the lower index first).
//
// Idea: one warp a token. A lane keeps the logits of experts lane, lane + 32, ... as 64-bit keys: the float's bits made
// monotonic above, the inverted index below. The largest key of the warp is then the next choice with ties decided, and
// no two keys are equal. k rounds of a warp-wide maximum; lane j keeps choice j and writes it.
// Bound: latency of the k maxima (about 0.1 us each); the memory traffic is X values a token.
//
// Macros: DTYPE (float, fp16, bf16).
#include "common/types.cuh"
#include "common/reduce.cuh"

typedef DTYPE T;
constexpr int PER_LANE = 8;  // experts of a lane: up to 256 in all

// Unsigned integers in the order of the floats; both zeros are equal.
__device__ __forceinline__ u32 ordered(float x) {
    const u32 bits = __float_as_uint(x == 0.0f ? 0.0f : x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(u32 bits) {
    return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

extern "C" __global__ void __launch_bounds__(128)
    route(const T* __restrict__ logits, float* __restrict__ weights, int* __restrict__ experts, int tokens, int X,
          int top_k, int renormalise) {
    const int token = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (token >= tokens) return;  // the whole warp

    float value[PER_LANE], top = Max::identity();
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const int expert = lane + 32 * i;
        value[i] = expert < X ? to_float(logits[(i64)token * X + expert]) : Max::identity();
        top = fmaxf(top, value[i]);
    }
    top = warp_reduce<Max>(top);
    u64 key[PER_LANE];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const int expert = lane + 32 * i;
        if (expert < X) sum += expf(value[i] - top);
        key[i] = expert < X ? (u64)ordered(value[i]) << 32 | (u32)~expert : 0;
    }
    sum = warp_reduce<Sum>(sum);

    float weight = 0.0f;
    int chosen = 0;
    for (int j = 0; j < top_k; ++j) {
        u64 best = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) best = key[i] > best ? key[i] : best;
#pragma unroll
        for (int offset = 16; offset > 0; offset >>= 1) {
            const u64 other = __shfl_xor_sync(FULL_WARP, best, offset);
            best = other > best ? other : best;
        }
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) key[i] = key[i] == best ? 0 : key[i];
        if (lane == j) {
            weight = expf(unordered((u32)(best >> 32)) - top) / sum;
            chosen = (int)~(u32)best;
        }
    }
    if (renormalise) weight /= warp_reduce<Sum>(weight);
    if (lane < top_k) {
        weights[(i64)token * top_k + lane] = weight;
        experts[(i64)token * top_k + lane] = chosen;
    }
}
