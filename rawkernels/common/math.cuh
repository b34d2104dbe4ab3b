// Constants and the few transcendental functions that attention needs.
#pragma once
#include "common/types.cuh"

#define MINUS_INFINITY __int_as_float(0xff800000)
constexpr float LOG2_E = 1.4426950408889634f;

// 2^x in one instruction, relative error 2^-22; 2^-inf = 0.
__device__ __forceinline__ float fast_exp2(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// tanh with an absolute error near 1e-7, from one fast_exp2.
__device__ __forceinline__ float fast_tanh(float x) { return 1.0f - 2.0f / (fast_exp2(2.0f * LOG2_E * x) + 1.0f); }
