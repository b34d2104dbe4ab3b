// Searching one row of logits [V]: keys that order like floats, a summary in 1024 buckets, sources and a select.
//
// A row of 150,000 logits is read once, by all SMs: each of 1024 buckets yields its maximum and the sum of its
// exponentials. One block per row then knows the row's maximum, its softmax denominator, and (from the bucket maxima)
// a value that the k-th largest logit cannot lie below; it visits only buckets that hold something above that.
//
// Bucket b is the lines b, b + 1024, ... of 32 consecutive logits: a warp reads a line as one access, and neighbouring
// ids, which tend to be likely together, fall into different buckets. Rows have up to 1024 * 8 * 32 = 2^18 logits.
#pragma once
#include "common/types.cuh"
#include "common/reduce.cuh"

constexpr int BUCKETS = 1024, LINE = 32, LINES = 8;
constexpr int ROW_THREADS = 1024;        // of the block that searches one row: thread t owns bucket t's summary
constexpr float GREEDY_BELOW = 1e-5f;    // temperatures below this take the largest logit
constexpr u32 LOWEST_KEY = 0x007fffffu;  // key_of(-inf); 0 is the key of "no logit here"

// A u32 that orders like x. -0 equals 0; NaN counts as -inf.
__device__ __forceinline__ u32 key_of(float x) {
    if (x != x) return LOWEST_KEY;
    const u32 bits = x == 0.0f ? 0u : __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of(u32 key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// The larger of two packed values has the larger key; among equal keys, the lower index.
__device__ __forceinline__ u64 pack(u32 key, int index) { return (u64)key << 32 | ~(u32)index; }
__device__ __forceinline__ int index_of(u64 packed) { return (int)~(u32)packed; }

// A logit as the draw sees it. The division is IEEE's, so that NumPy gets the same bits.
__device__ __forceinline__ float scaled(float x, float temperature) {
    x = x != x ? value_of(LOWEST_KEY) : x;
    return temperature < GREEDY_BELOW ? x : x / temperature;
}

// exp(x - top) for x <= top, right for infinities as well.
__device__ __forceinline__ float weight(float x, float top) { return x == top ? 1.0f : expf(x - top); }

// Probability mass as an integer: sums do not depend on the order. At most 2^18 * 2^40.
__device__ __forceinline__ u64 mass_of(float w) { return (u64)(w * 0x1p40f); }

// The id that this lane holds of a bucket's line.
__device__ __forceinline__ int bucket_index(int bucket, int line) {
    return (line * BUCKETS + bucket) * LINE + (threadIdx.x & 31);
}

// The 8 logits that this lane holds of a bucket, all in flight at once; -inf beyond V.
__device__ __forceinline__ void load_bucket(const float* __restrict__ row, int V, int bucket, float (&x)[LINES]) {
#pragma unroll
    for (int l = 0; l < LINES; ++l) {
        const int i = bucket_index(bucket, l);
        x[l] = i < V ? row[i] : value_of(LOWEST_KEY);
    }
}

// One warp: the maximum and the sum of exp(x - maximum) of a bucket; (-inf, 0) where it is empty or all -inf.
__device__ __forceinline__ void summarise_bucket(const float* __restrict__ row, int V, int bucket, float temperature,
                                                 float* maximum, float* sum) {
    float x[LINES];
    load_bucket(row, V, bucket, x);
    float top = value_of(LOWEST_KEY), total = 0.0f;
#pragma unroll
    for (int l = 0; l < LINES; ++l) {
        x[l] = scaled(x[l], temperature);
        top = fmaxf(top, x[l]);
    }
    top = warp_reduce<Max>(top);
    if (top != value_of(LOWEST_KEY)) {
#pragma unroll
        for (int l = 0; l < LINES; ++l) total += weight(x[l], top);
    }
    total = warp_reduce<Sum>(total);
    if ((threadIdx.x & 31) == 0) {
        *maximum = top;
        *sum = total;
    }
}

// --- reductions over a block of ROW_THREADS; `scratch` has 3 * 32 words and may be reused right after the call -----
__device__ __forceinline__ u64 block_max(u64 x, u64* scratch) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x = max(x, __shfl_xor_sync(FULL_WARP, x, offset));
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = scratch[lane];
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x = max(x, __shfl_xor_sync(FULL_WARP, x, offset));
    __syncthreads();
    return x;
}

template <int COUNT> __device__ __forceinline__ void block_sum(u64 (&x)[COUNT], u64* scratch) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int c = 0; c < COUNT; ++c) {
#pragma unroll
        for (int offset = 16; offset > 0; offset >>= 1) x[c] += __shfl_xor_sync(FULL_WARP, x[c], offset);
        if (lane == 0) scratch[c * 32 + warp] = x[c];
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < COUNT; ++c) {
        x[c] = scratch[c * 32 + lane];
#pragma unroll
        for (int offset = 16; offset > 0; offset >>= 1) x[c] += __shfl_xor_sync(FULL_WARP, x[c], offset);
    }
    __syncthreads();
}

// The k-th largest of the keys that the block's threads hold one each of (1 <= k <= threads).
__device__ __forceinline__ u32 kth_largest(u32 key, int k) {
    u32 low = 0, high = 0xffffffffu;  // at least k keys are >= low, fewer than k are >= high
    while (high - low > 1) {
        const u32 middle = low + (high - low) / 2;
        if (__syncthreads_count(key >= middle) >= k) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

// --- sources: where a block finds (key, token id) pairs ------------------------------------------------------------
// each(floor, f) calls f(key, id) at least for every pair whose key is >= floor; f must test keys itself.

// The row in global memory, bucket by bucket, skipping those whose maximum lies below the floor. All lanes of a warp
// call f together; a lane beyond the end of the row passes key 0.
struct Row {
    const float* logits;
    int V;
    float temperature;
    const u32* maxima;  // keys of the bucket maxima, in shared memory

    template <typename F> __device__ __forceinline__ void each(u32 floor, F f) const {
        for (int bucket = threadIdx.x >> 5; bucket < BUCKETS; bucket += ROW_THREADS / 32) {
            if (maxima[bucket] < floor) continue;
            float x[LINES];
            load_bucket(logits, V, bucket, x);
#pragma unroll
            for (int l = 0; l < LINES; ++l) {
                const int i = bucket_index(bucket, l);
                if (i - (int)(threadIdx.x & 31) < V) f(i < V ? key_of(scaled(x[l], temperature)) : 0u, i);
            }
        }
    }
};

// The pairs with the largest keys, gathered in shared memory. Their order is arbitrary: nothing may depend on it.
struct Buffer {
    static constexpr int CAPACITY = 4096;
    u32 keys[CAPACITY];
    int ids[CAPACITY];
    int count;  // pairs found; more than CAPACITY when they did not fit

    template <typename F> __device__ __forceinline__ void each(u32 floor, F f) const {
        for (int i = threadIdx.x; i < count; i += ROW_THREADS) f(keys[i], ids[i]);
    }

    // Collect every pair of the row with a key >= floor (floor >= 1). True when they fit.
    __device__ __forceinline__ bool gather(const Row& row, u32 floor) {
        __syncthreads();
        if (threadIdx.x == 0) count = 0;
        __syncthreads();
        row.each(floor, [&](u32 key, int id) {
            const bool wanted = key >= floor;
            const u32 votes = __ballot_sync(FULL_WARP, wanted);
            if (votes == 0) return;
            const int lane = threadIdx.x & 31;
            int first = 0;
            if (lane == 0) first = atomicAdd(&count, __popc(votes));
            first = __shfl_sync(FULL_WARP, first, 0);
            const int slot = first + __popc(votes & ((1u << lane) - 1));
            if (wanted && slot < CAPACITY) {
                keys[slot] = key;
                ids[slot] = id;
            }
        });
        __syncthreads();
        return count <= CAPACITY;
    }
};

// --- measures of a set of keys, and the select ---------------------------------------------------------------------
struct Counting {
    __device__ __forceinline__ u64 operator()(u32 key) const { return 1; }
};
struct Weighing {
    float top;
    __device__ __forceinline__ u64 operator()(u32 key) const { return mass_of(weight(value_of(key), top)); }
};

// The measure of the keys >= each of three pivots in rising order.
template <typename Source, typename Measure>
__device__ __forceinline__ void measure_above(const Source& source, const Measure& measure, const u32 (&pivots)[3],
                                              u64 (&sums)[3], u64* scratch) {
    sums[0] = sums[1] = sums[2] = 0;
    source.each(pivots[0], [&](u32 key, int) {
        if (key < pivots[0]) return;
        const u64 amount = measure(key);
        sums[0] += amount;
        if (key >= pivots[1]) sums[1] += amount;
        if (key >= pivots[2]) sums[2] += amount;
    });
    block_sum<3>(sums, scratch);
}

template <typename Source, typename Measure>
__device__ __forceinline__ u64 total_above(const Source& source, const Measure& measure, u32 floor, u64* scratch) {
    const u32 pivots[3] = {floor, 0xffffffffu, 0xffffffffu};
    u64 sums[3];
    measure_above(source, measure, pivots, sums, scratch);
    return sums[0];
}

// The largest key t in [low, high) such that the keys >= t measure at least `target` (>= 1); low where there is none.
// `high` must lie above every key. Each pass over the source quarters the interval: 16 passes at most.
template <typename Source, typename Measure>
__device__ __forceinline__ u32 select_key(const Source& source, const Measure& measure, u64 target, u32 low, u32 high,
                                          u64* scratch) {
    while (high - low > 1) {
        const u32 width = high - low, quarter = max(1u, width / 4);
        const u32 pivots[3] = {low + quarter, low + width / 2, high - quarter};
        u64 sums[3];
        measure_above(source, measure, pivots, sums, scratch);
        if (sums[2] >= target) {
            low = pivots[2];
        } else if (sums[1] >= target) {
            low = pivots[1];
            high = pivots[2];
        } else if (sums[0] >= target) {
            low = pivots[0];
            high = pivots[1];
        } else {
            high = pivots[0];
        }
    }
    return low;
}
