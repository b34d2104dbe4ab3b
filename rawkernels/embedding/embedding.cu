// Rows by index: token embedding (scaled, plus learned positions), the step's token ids, and gathered rows.
//
// Idea: one block per output row. Thread t moves the 16-byte chunks t, t + blockDim.x, ...; a row whose length is not a
// whole number of chunks is moved value by value, since then most rows are not 16-byte aligned either.
// Bound: memory latency for few rows, memory bandwidth for many (2 * E * sizeof(T) bytes a row).
//
// Macros: DTYPE (float, fp16, bf16).
#include "common/types.cuh"
#include "common/overlap.cuh"

typedef DTYPE T;

// out[0..E) = source[0..E) * scale + position[0..E), N values per access; position may be null. Each operation rounds
// to T, as the 16-bit models it reproduces do. With scale 1 and no position this is an exact copy.
template <int N>
__device__ __forceinline__ void embed_row(const T* source, const T* position, T* out, int E, float scale) {
    for (int i = threadIdx.x * N; i < E; i += blockDim.x * N) {
        float x[N];
        load_floats<T, N>(source + i, x);
#pragma unroll
        for (int j = 0; j < N; ++j) x[j] *= scale;
        if (position != nullptr) {
            float p[N];
            load_floats<T, N>(position + i, p);
#pragma unroll
            for (int j = 0; j < N; ++j) x[j] = rounded<T>(x[j]) + p[j];
        }
        store_floats<T, N>(out + i, x);
    }
}

__device__ __forceinline__ void any_row(const T* source, const T* position, T* out, int E, float scale) {
    constexpr int N = Width<T>::value;
    if (E % N == 0) {
        embed_row<N>(source, position, out, E, scale);
    } else {
        embed_row<1>(source, position, out, E, scale);
    }
}

extern "C" __global__ void embed(const int* token_ids, const T* table, const int* positions, const T* position_table,
                                 T* out, int E, float scale) {
    const int t = blockIdx.x;
    allow_next();
    await_previous();
    const T* position = position_table == nullptr ? nullptr : position_table + (i64)positions[t] * E;
    any_row(table + (i64)token_ids[t] * E, position, out + (i64)t * E, E, scale);
}

extern "C" __global__ void gather_rows(const T* x, const int* indices, T* out, int E) {
    const int n = blockIdx.x;
    allow_next();
    await_previous();
    any_row(x + (i64)indices[n] * E, nullptr, out + (i64)n * E, E, 1.0f);
}

// One thread per token. Tokens that the host did not know when it built the step come from the device's own state.
extern "C" __global__ void resolve_tokens(const int* token_ids, const int* token_rows, const int* last_tokens, int* out,
                                          int count) {
    const int t = blockIdx.x * blockDim.x + threadIdx.x;
    allow_next();
    await_previous();
    if (t >= count) return;
    const int row = token_rows[t];
    out[t] = row < 0 ? token_ids[t] : last_tokens[row];
}
