// Reading what the whole grid reads once (weights), and what many blocks read again (activations).
#pragma once
#include "common/async.cuh"

// start_copy for a stream of weights: L2 fetches the whole 128-byte line that the 16 bytes lie in.
__device__ __forceinline__ void start_stream_copy(u32 shared, const void* global, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes)
                 : "memory");
}

// 16 bytes, kept in L1 for the other warps of this multiprocessor. Not the read-only path (ld.global.nc): with overlapping
// kernels the data may have been written after this kernel started, see common/overlap.cuh.
__device__ __forceinline__ uint4 load_cached(const void* p) { return *static_cast<const uint4*>(p); }
