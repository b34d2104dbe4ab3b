// Log-probabilities of the tokens drawn, their ranks, and the top_n most likely tokens.
//
// Idea: unscaled_bucket_summary reads the logits once (common/vocab.cuh); maximum and denominator of the softmax follow
// from the summaries alone. One block per row then visits only buckets that hold a logit above the drawn token's (its
// rank) or above the top_n-th largest bucket maximum (the most likely tokens, gathered in shared memory, then taken one
// by one). Should more logits than the buffer holds be equal to the smallest of these, the row itself is searched.
// Bound: memory (4 bytes a logit) for the summary, latency for the rest.
#include "common/types.cuh"
#include "common/reduce.cuh"
#include "common/vocab.cuh"

// Warp w of block (c, n) summarises bucket 8 * c + w of row n. maxima, sums [N, 1024].
extern "C" __global__ void __launch_bounds__(256) unscaled_bucket_summary(const float* logits, float* maxima,
                                                                          float* sums, int V) {
    const int n = blockIdx.y, bucket = blockIdx.x * 8 + (threadIdx.x >> 5);
    const i64 at = (i64)n * BUCKETS + bucket;
    summarise_bucket(logits + (i64)n * V, V, bucket, 1.0f, maxima + at, sums + at);
}

struct Shared {
    u32 maxima[BUCKETS];
    u64 scratch[3 * 32];
    float sums[32];
    Buffer buffer;
};

struct Softmax {
    float top, log_total;
    __device__ __forceinline__ float logprob(float x) const { return (x - top) - log_total; }
};

// Log-probability and rank of the drawn token; (NaN, 0) for an id outside the vocabulary.
__device__ __forceinline__ void write_chosen(Shared& s, const Row& row, const Softmax& softmax, int token,
                                             float* chosen, int* rank) {
    const bool valid = token >= 0 && token < row.V;
    const u32 key = valid ? key_of(row.logits[token]) : 0xfffffffeu;
    const u64 larger = total_above(row, Counting{}, key + 1, s.scratch);
    if (threadIdx.x == 0) {
        *chosen = valid ? softmax.logprob(value_of(key)) : __int_as_float(0x7fffffff);
        *rank = valid ? 1 + (int)larger : 0;
    }
}

// The pairs of the source in falling order, the first top_n of them.
template <typename Source>
__device__ __forceinline__ void write_top(Shared& s, const Source& source, const Softmax& softmax, u32 floor, int top_n,
                                          int* ids, float* logprobs) {
    u64 last = ~(u64)0;
    for (int i = 0; i < top_n; ++i) {
        u64 best = 0;
        source.each(floor, [&](u32 key, int id) {
            const u64 packed = pack(key, id);
            if (key >= floor && packed < last && packed > best) best = packed;
        });
        last = block_max(best, s.scratch);
        if (threadIdx.x == 0) {
            ids[i] = index_of(last);
            logprobs[i] = softmax.logprob(value_of((u32)(last >> 32)));
        }
    }
}

// One block of 1024 threads per row. top_ids, top_logprobs [N, top_n] (null when top_n is 0).
extern "C" __global__ void __launch_bounds__(1024)
    logprobs(const float* logits, const int* tokens, const float* maxima, const float* sums, float* chosen, int* ranks,
             int* top_ids, float* top_logprobs, int V, int top_n) {
    __shared__ Shared s;
    const int n = blockIdx.x;
    const i64 at = (i64)n * BUCKETS + threadIdx.x;
    const float own_max = maxima[at];
    s.maxima[threadIdx.x] = key_of(own_max);
    const float top = block_reduce<Max>(own_max, s.sums);  // its barriers publish s.maxima, too
    const float total = block_reduce<Sum>(sums[at] * weight(own_max, top), s.sums);
    const Softmax softmax{top, logf(total)};
    const Row row{logits + (i64)n * V, V, 1.0f, s.maxima};
    write_chosen(s, row, softmax, tokens[n], chosen + n, ranks + n);
    if (top_n == 0) return;
    const bool small = V <= Buffer::CAPACITY;
    const u32 floor = small ? LOWEST_KEY : kth_largest(s.maxima[threadIdx.x], top_n);
    if (s.buffer.gather(row, floor)) {
        write_top(s, s.buffer, softmax, floor, top_n, top_ids + (i64)n * top_n, top_logprobs + (i64)n * top_n);
    } else {
        write_top(s, row, softmax, floor, top_n, top_ids + (i64)n * top_n, top_logprobs + (i64)n * top_n);
    }
}
