// Data types of the kernels: float, fp16, bf16, and how to move them between memory and float32 registers.
//
// The 16-bit types are plain 2-byte structs of our own rather than cuda_fp16.h's classes: NVRTC then needs no header
// beyond rawkernels/, and the same source can run on a CPU. All arithmetic is float32; 16 bits is a storage format.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct __align__(2) fp16 { u16 bits; };
struct __align__(2) bf16 { u16 bits; };

// 16-bit -> float32 is exact; float32 -> 16-bit rounds to nearest even.
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
__device__ __forceinline__ float to_float(fp16 x) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
    return r;
}

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
    bf16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
    return r;
}
template <> __device__ __forceinline__ fp16 from_float<fp16>(float x) {
    fp16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
    return r;
}

// What x becomes when it is stored as T and read back: Hugging Face's 16-bit models round between operations.
template <typename T> __device__ __forceinline__ float rounded(float x) { return to_float(from_float<T>(x)); }

// N values of T moved as one access (16 bytes at most, aligned to their size).
template <typename T, int N> struct __align__(sizeof(T) * N) Vec {
    T v[N];
    static_assert(sizeof(T) * N <= 16, "one access moves at most 16 bytes");
};

// How many T fit in one 16-byte access.
template <typename T> struct Width { static constexpr int value = 16 / sizeof(T); };

template <typename T, int N> __device__ __forceinline__ void load_floats(const T* p, float (&out)[N]) {
    Vec<T, N> raw = *reinterpret_cast<const Vec<T, N>*>(p);
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = to_float(raw.v[i]);
}

template <typename T, int N> __device__ __forceinline__ void store_floats(T* p, const float (&in)[N]) {
    Vec<T, N> raw;
#pragma unroll
    for (int i = 0; i < N; ++i) raw.v[i] = from_float<T>(in[i]);
    *reinterpret_cast<Vec<T, N>*>(p) = raw;
}
