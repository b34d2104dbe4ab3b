// Elementwise ops: gated activations, activations, soft-capping, residual addition.
//
// Idea: block (t, c) handles chunk c of row t; every thread moves 16 bytes. A row that is not a whole number of chunks
// is moved value by value (its later rows, and the second half of gate_up, are then not 16-byte aligned).
// Bound: memory. 3 * F * sizeof(T) bytes a token for gate_mul and add, 2 * F * sizeof(T) for the others. The accurate
// expf, tanhf and erff cost 20-40 instructions a value and stay hidden behind the memory accesses.
//
// Macros: DTYPE (float, fp16, bf16), ACTIVATION (silu, gelu, gelu_tanh, relu).
#include "common/types.cuh"
#include "common/activations.cuh"
#include "common/overlap.cuh"

typedef DTYPE T;

// f(i) for every value or 16-byte chunk i of this block's part of a row of F values.
template <typename Vector, typename Scalar>
__device__ __forceinline__ void along_row(int F, Vector vector, Scalar scalar) {
    constexpr int N = Width<T>::value;
    const int first = blockIdx.y * blockDim.x * N;
    allow_next();
    await_previous();
    if (F % N == 0) {
        const int i = first + threadIdx.x * N;
        if (i < F) vector(i);
    } else {
        const int end = min(F, first + (int)blockDim.x * N);
        for (int i = first + threadIdx.x; i < end; i += blockDim.x) scalar(i);
    }
}

// out[i..i+N) = f(a[i..i+N), b[i..i+N))
template <int N, typename F2> __device__ __forceinline__ void map2(const T* a, const T* b, T* out, int i, F2 f) {
    float x[N], y[N];
    load_floats<T, N>(a + i, x);
    load_floats<T, N>(b + i, y);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = f(x[j], y[j]);
    store_floats<T, N>(out + i, x);
}

template <typename F2> __device__ __forceinline__ void map2_row(const T* a, const T* b, T* out, int F, F2 f) {
    along_row(
        F, [&](int i) { map2<Width<T>::value>(a, b, out, i, f); }, [&](int i) { map2<1>(a, b, out, i, f); });
}

template <int N, typename F1> __device__ __forceinline__ void map1(const T* a, T* out, int i, F1 f) {
    float x[N];
    load_floats<T, N>(a + i, x);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = f(x[j]);
    store_floats<T, N>(out + i, x);
}

template <typename F1> __device__ __forceinline__ void map1_row(const T* a, T* out, int F, F1 f) {
    along_row(
        F, [&](int i) { map1<Width<T>::value>(a, out, i, f); }, [&](int i) { map1<1>(a, out, i, f); });
}

extern "C" __global__ void gate_mul(const T* gate_up, T* out, int F) {
    const T* gate = gate_up + (i64)blockIdx.x * 2 * F;
    map2_row(gate, gate + F, out + (i64)blockIdx.x * F, F,
             [](float g, float u) { return rounded<T>(ACTIVATION(g)) * u; });
}

extern "C" __global__ void activate(const T* x, T* out, int F) {
    const i64 row = (i64)blockIdx.x * F;
    map1_row(x + row, out + row, F, [](float v) { return ACTIVATION(v); });
}

extern "C" __global__ void softcap(const T* x, T* out, int F, float cap) {
    const i64 row = (i64)blockIdx.x * F;
    map1_row(x + row, out + row, F, [cap](float v) { return cap * tanhf(v / cap); });
}

// residual += x
extern "C" __global__ void add(const T* x, T* residual, int E) {
    const i64 row = (i64)blockIdx.x * E;
    map2_row(x + row, residual + row, residual + row, E, [](float a, float b) { return a + b; });
}
