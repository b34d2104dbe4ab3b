// Logits adjusted before the draw: penalties for tokens already seen, and biases of single tokens.
#include "common/types.cuh"

constexpr int PER_THREAD = 4;

// Idea: a dense pass over the row of counts; block (c, n) handles 1024 logits of row n, thread t every 256th of them,
// so that accesses are coalesced whatever V is. Logits are read and written only where the count is not zero. A row
// without penalties returns at once. Bound: memory, 4 bytes of counts per logit.
extern "C" __global__ void apply_penalties(float* logits, const int* rows, const int* counts, const float* repetition,
                                           const float* presence, const float* frequency, int V) {
    const int n = blockIdx.y, row = rows[n];
    const float factor = repetition[n], once = presence[n], each = frequency[n];
    if (row < 0 || (factor == 1.0f && once == 0.0f && each == 0.0f)) return;
    float* x = logits + (i64)n * V;
    const int* count = counts + (i64)row * V;
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j) {
        const int i = (blockIdx.x * PER_THREAD + j) * blockDim.x + threadIdx.x;
        const int c = i < V ? count[i] : 0;
        if (c == 0) continue;
        const int times = c >> 1;  // bit 0: the token is in the prompt
        const float value = x[i] > 0.0f ? x[i] / factor : x[i] * factor;
        x[i] = value - (each * times + (times > 0 ? once : 0.0f));
    }
}

// One thread per entry. An atomic, since a token may have both a bias and a min_tokens mask.
extern "C" __global__ void apply_bias(float* logits, const int* bias_rows, const int* bias_ids,
                                      const float* bias_values, int V, int J) {
    const int j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= J || bias_rows[j] < 0) return;
    atomicAdd(logits + (i64)bias_rows[j] * V + bias_ids[j], bias_values[j]);
}
