// Tensor-core building blocks for 16-bit types (sm_80 and later): mma.sync m16n8k16, ldmatrix, packing.
//
// A warp computes C[16x8] += A[16x16] B[16x8]. With row = lane / 4 and col = 2 * (lane % 4), a lane holds
//   A  a[0]: (row, col..col+1)  a[1]: (row + 8, col..)  a[2]: (row, col + 8..)  a[3]: (row + 8, col + 8..)
//   B  b0: (k = col..col+1, n = row)  b1: (k = col + 8.., n = row)
//   C  c[0], c[1]: (row, col..col+1)  c[2], c[3]: (row + 8, col..col+1)
// where each u32 packs two neighbours, the first in the low half. Two C tiles side by side, packed to 16 bits, are
// therefore the A operand of the next product: P = softmax(S) needs no exchange between lanes.
#pragma once
#include "common/types.cuh"

template <typename T> __device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <> __device__ __forceinline__ void mma<bf16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ __forceinline__ void mma<fp16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices of 16-bit values from shared memory: lane i gives the address of row i % 8 of matrix i / 8 (16
// bytes, aligned); r[m] receives (row lane / 4, columns 2 * (lane % 4)..) of matrix m, or of its transpose.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// Where the 16-byte chunk `chunk` of row `row` lies in a shared tile whose rows are CHUNKS chunks long (in chunks from
// the tile's start). The XOR moves the same column of 8 consecutive rows to 8 different groups of 4 banks, so neither
// load_matrices nor 16-byte copies conflict; rows need no padding.
template <int CHUNKS> __device__ __forceinline__ int swizzled(int row, int chunk) {
    constexpr int GROUP = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : CHUNKS % 2 == 0 ? 2 : 1;
    return row * CHUNKS + (chunk ^ ((row / (8 / GROUP)) & (GROUP - 1)));
}

// Two floats rounded to T in one register, `low` in the low half.
template <typename T> __device__ __forceinline__ u32 pack(float low, float high);
template <> __device__ __forceinline__ u32 pack<bf16>(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
template <> __device__ __forceinline__ u32 pack<fp16>(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
