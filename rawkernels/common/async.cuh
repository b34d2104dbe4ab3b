// Asynchronous copies from global to shared memory (cp.async, sm_80 and later): a thread starts many 16-byte copies,
// goes on computing, and waits later. That keeps tens of KB in flight per SM with few threads and no registers.
//
// Copies are counted in groups, per thread: start_copy... commit_copies() closes a group, wait_copies<N>() returns when
// all but the N youngest groups of this thread have landed. Other threads' copies need a barrier after the wait.
#pragma once
#include "common/types.cuh"

// The 32-bit address of a shared-memory object, as the copy and matrix instructions take it.
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Starts copying 16 bytes, both sides 16-byte aligned, past the L1 cache. When not `valid`, 16 zero bytes are written
// and `global` is not read.
__device__ __forceinline__ void start_copy(u32 shared, const void* global, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N> __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// As wait_copies<pending>, for 0 <= pending <= 4 known at run time only.
__device__ __forceinline__ void wait_copies(int pending) {
    switch (pending) {
        case 4: return wait_copies<4>();
        case 3: return wait_copies<3>();
        case 2: return wait_copies<2>();
        case 1: return wait_copies<1>();
        default: return wait_copies<0>();
    }
}
