// The sampling state: counts of the tokens each sequence has seen, and the token each sequence drew last.
//
// Idea: one thread per token, a scattered update of one word. Atomics, since a prompt repeats tokens.
// Bound: launch latency; a few hundred tokens at most for the drawn ones, a few thousand for prompts.
#include "common/types.cuh"
#include "common/overlap.cuh"

// The word counts[row, id] of entry i, or null where the entry is to be skipped.
__device__ __forceinline__ int* count_of(const int* ids, const int* rows, int* counts, int i, int V) {
    const int row = rows[i], id = ids[i];
    return row >= 0 && id >= 0 && id < V ? counts + (i64)row * V + id : nullptr;
}

// A count is 2 * (times generated) + (1 if the token is in the prompt).
extern "C" __global__ void count_tokens(const int* tokens, const int* rows, int* counts, int N, int V) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    allow_next();
    await_previous();
    if (i >= N) return;
    int* count = count_of(tokens, rows, counts, i, V);
    if (count != nullptr) atomicAdd(count, 2);
}

extern "C" __global__ void count_prompt(const int* token_ids, const int* rows, int* counts, int T, int V) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    allow_next();
    await_previous();
    if (i >= T) return;
    int* count = count_of(token_ids, rows, counts, i, V);
    if (count != nullptr) atomicOr(count, 1);
}

// Rows are distinct (or -1): one writer per word.
extern "C" __global__ void store_last(const int* tokens, const int* rows, int* last_tokens, int N) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    allow_next();
    await_previous();
    if (i < N && rows[i] >= 0) last_tokens[rows[i]] = tokens[i];
}
