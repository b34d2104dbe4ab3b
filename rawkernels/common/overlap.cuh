// Overlapping a kernel with the one before it: programmatic dependent launch (sm_90 and later).
//
// A kernel normally starts when all blocks of the one before have ended, and pays its launch, its first address
// calculations and its first trip to memory with the device idle: 2-4 us, hundreds of times in a decode step. When a
// launch allows overlap (runtime/kernels.py does so inside CUDA graphs), the next kernel's blocks start as soon as every
// block of this one has called allow_next() and there is room. They run up to await_previous(), which returns when the
// kernel before has ended and its writes are visible.
//
// The rules for a kernel that overlaps:
// - every block calls allow_next() and then await_previous() before it reads what another kernel writes, and before it
//   writes anything at all: not only the kernel before, but earlier ones too may still be running;
// - what may be read before is what no kernel of the graph writes: weights, rotary tables, the step's inputs;
// - pointers to what other kernels write are not `const __restrict__`: the compiler may move such loads up.
// On older devices both do nothing.
#pragma once

__device__ __forceinline__ void allow_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void await_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
