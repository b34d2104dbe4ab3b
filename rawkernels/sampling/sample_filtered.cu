// The draw among the tokens that top-k, then top-p, then min-p keep.
//
// Idea: each filter keeps the logits above some threshold, so nothing is sorted: thresholds are found by counting
// (top-k) and by summing probability (top-p) above pivots, with integers, hence exactly and in any order. Two kernels:
// bucket_summary reads the logits once, one warp per bucket (common/vocab.cuh). sample_filtered, one block per row,
// derives from the bucket maxima a floor that the threshold will not lie below, gathers the few logits above it in
// shared memory and works there. When they are too many, or do not hold the threshold (a nearly flat distribution with
// a high top_p, a very large top_k, thousands of equal logits), it works on the row itself: the same code, slower.
// Bound: bucket_summary by memory (4 bytes a logit), sample_filtered by latency: about 40 block-wide reductions.
#include "common/types.cuh"
#include "common/reduce.cuh"
#include "common/gumbel_max.cuh"

// Warp w of block (c, n) summarises bucket 8 * c + w of row n. maxima, sums [N, 1024].
extern "C" __global__ void __launch_bounds__(256) bucket_summary(const float* logits, const float* temperature,
                                                                 float* maxima, float* sums, int V) {
    const int n = blockIdx.y, bucket = blockIdx.x * 8 + (threadIdx.x >> 5);
    const i64 at = (i64)n * BUCKETS + bucket;
    summarise_bucket(logits + (i64)n * V, V, bucket, temperature[n], maxima + at, sums + at);
}

struct Shared {
    u32 maxima[BUCKETS];
    u64 scratch[3 * 32];
    Buffer buffer;
};

struct Filters {
    int top_k;      // 0: off
    float top_p;    // 1: off
    u32 min_p_key;  // logits below it are dropped
    __device__ __forceinline__ bool off() const { return !top_k && top_p >= 1.0f && min_p_key == LOWEST_KEY; }
};

__device__ __forceinline__ Filters read_filters(int top_k, float top_p, float min_p, float top, int V) {
    Filters f;
    f.top_k = top_k > 0 && top_k < V ? top_k : 0;
    f.top_p = top_p < 1.0f ? top_p : 1.0f;
    f.min_p_key = min_p > 0.0f ? key_of(top + logf(fminf(min_p, 1.0f))) : LOWEST_KEY;
    return f;
}

// Rank among the bucket maxima where the floor is set: a k-th largest bucket maximum is at most the k-th largest logit.
// The rank 15/16 gives about 2.8 candidates per bucket, which the buffer holds; a quarter gives 0.3.
__device__ __forceinline__ int floor_rank(const Filters& f, int V, bool wide) {
    const int buckets = min(BUCKETS, (V + LINE - 1) / LINE), most = buckets - buckets / 16;
    if (f.top_k) return min(f.top_k, most);
    return wide ? most : (buckets + 3) / 4;
}

// The gathered candidates: every logit with a key >= floor, when complete.
struct Candidates {
    u32 floor;
    bool complete;
};

__device__ __forceinline__ Candidates gather(Shared& s, const Row& row, u32 floor) {
    return {floor, s.buffer.gather(row, floor)};
}

__device__ __forceinline__ Candidates gather_for(Shared& s, const Row& row, const Filters& f, bool wide) {
    if (row.V <= Buffer::CAPACITY) return gather(s, row, LOWEST_KEY);
    if (!f.top_k && f.top_p >= 1.0f) return gather(s, row, f.min_p_key);
    return gather(s, row, kth_largest(s.maxima[threadIdx.x], floor_rank(f, row.V, wide)));
}

// The threshold of top-k: the k-th largest key.
__device__ __forceinline__ u32 top_k_key(Shared& s, const Row& row, const Candidates& c, int k, u32 top_key) {
    if (c.complete && s.buffer.count >= k) return select_key(s.buffer, Counting{}, k, c.floor, top_key + 1, s.scratch);
    const u32 high = c.complete ? c.floor : top_key + 1;
    return select_key(row, Counting{}, k, LOWEST_KEY, max(high, LOWEST_KEY + 1), s.scratch);
}

// The probability mass of all logits, from the bucket sums: thread t adds bucket t.
__device__ __forceinline__ u64 row_mass(Shared& s, const float* sums, float top) {
    const float maximum = value_of(s.maxima[threadIdx.x]);
    u64 mass[1] = {mass_of(sums[threadIdx.x] * weight(maximum, top))};
    block_sum<1>(mass, s.scratch);
    return mass[0];
}

// The threshold of top-p among the keys >= t. May gather again, into `c`.
__device__ __forceinline__ u32 top_p_key(Shared& s, const Row& row, Candidates& c, const Filters& f, const float* sums,
                                         u32 t, u32 top_key) {
    const Weighing weighing{value_of(top_key)};
    u64 mass;
    if (c.complete && t >= c.floor) {
        mass = total_above(s.buffer, weighing, t, s.scratch);
    } else {
        mass = f.top_k ? total_above(row, weighing, t, s.scratch) : row_mass(s, sums, weighing.top);
    }
    const u64 target = max((u64)1, (u64)ceil(max(0.0, (double)f.top_p) * (double)mass));
    for (int wide = 0; wide < 2; ++wide) {
        if (wide) c = gather_for(s, row, f, true);
        const u32 low = max(t, c.floor);
        if (!c.complete) break;
        if (total_above(s.buffer, weighing, low, s.scratch) >= target) {
            return select_key(s.buffer, weighing, target, low, top_key + 1, s.scratch);
        }
        if (f.top_k || row.V <= Buffer::CAPACITY) break;  // there is nothing wider
    }
    const u32 high = c.complete ? c.floor : top_key + 1;
    return select_key(row, weighing, target, t, max(high, t + 1), s.scratch);
}

// The best of the keys >= t, packed: with Gumbel noise, or without when greedy.
template <typename Source>
__device__ __forceinline__ u64 draw(const Source& source, u32 t, bool greedy, u64 seed, u32 step, u64* scratch) {
    u64 best = 0;
    source.each(t, [&](u32 key, int id) {
        if (key < t) return;
        if (!greedy) {
            u32 words[4];
            random_words(seed, step, (u32)id / 4, words);
            const u32 word = id & 2 ? (id & 1 ? words[3] : words[2]) : (id & 1 ? words[1] : words[0]);
            key = key_of(value_of(key) + gumbel(word));
        }
        best = max(best, pack(key, id));
    });
    return block_max(best, scratch);
}

// One block of 1024 threads per row.
extern "C" __global__ void __launch_bounds__(1024)
    sample_filtered(const float* logits, const float* temperature, const int* top_k, const float* top_p,
                    const float* min_p, const u64* seeds, const int* steps, const float* maxima, const float* sums,
                    int* tokens, int V) {
    __shared__ Shared s;
    const int n = blockIdx.x;
    const bool greedy = temperature[n] < GREEDY_BELOW;
    const u32 own_key = key_of(maxima[(i64)n * BUCKETS + threadIdx.x]);
    s.maxima[threadIdx.x] = own_key;
    const u32 top_key = (u32)block_max(own_key, s.scratch);  // its barrier publishes s.maxima, too
    if (top_key == LOWEST_KEY) {
        if (threadIdx.x == 0) tokens[n] = 0;
        return;
    }
    const Row row{logits + (i64)n * V, V, temperature[n], s.maxima};
    const Filters f = read_filters(top_k[n], top_p[n], min_p[n], value_of(top_key), V);
    if (!greedy && f.off()) {
        const u64 best = best_random<ROW_THREADS>(row.logits, 0, V, row.temperature, seeds[n], (u32)steps[n]);
        const u64 winner = block_max(best, s.scratch);
        if (threadIdx.x == 0) tokens[n] = index_of(winner);
        return;
    }
    u32 t = top_key;  // greedy: only the largest
    Candidates c{};
    if (greedy) {
        c = gather(s, row, top_key);
    } else {
        c = gather_for(s, row, f, false);
        t = f.top_k ? top_k_key(s, row, c, f.top_k, top_key) : LOWEST_KEY;
        if (f.top_p < 1.0f) t = top_p_key(s, row, c, f, sums + (i64)n * BUCKETS, t, top_key);
        t = max(t, f.min_p_key);
    }
    const u64 best = c.complete && t >= c.floor ? draw(s.buffer, t, greedy, seeds[n], steps[n], s.scratch)
                                                : draw(row, t, greedy, seeds[n], steps[n], s.scratch);
    if (threadIdx.x == 0) tokens[n] = index_of(best);
}
