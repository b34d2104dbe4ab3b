// QK norm + rotary embedding + append to the paged KV cache, in one pass over the fused QKV row.
//
// Idea: q, k and v of a token leave the QKV projection as one row. Normalising, rotating and scattering them
// separately would read and write each head three times; here every head is read once and written once, to where it
// is needed next:
// q to q_out, k and v to their slot of the cache.
// A group of `lanes` threads (a power of two, 1 to 32) handles one head of one token. Its item i is the pair of VEC-
// wide chunks (i, i + Dr/2/VEC) that the rotation mixes, so both halves of a pair sit in one thread; dims beyond Dr
// pass through as plain pairs of neighbouring chunks. The sum of squares for the norm is a shuffle within the group.
// Bound: memory, 2 * (H + 2K) * D * sizeof(T) bytes a token; at T = 1 by the latency of one load and one store.
//
// Macros: DTYPE (float, fp16, bf16), VEC (values per access; divides D and Dr/2, at most 16 bytes).
#include "common/types.cuh"
#include "common/overlap.cuh"
#include "common/reduce.cuh"

typedef DTYPE T;
constexpr int ITEMS = VEC >= 4 ? 1 : 4 / VEC;  // per thread: 32 threads x ITEMS pairs of chunks cover D = 256

__device__ __forceinline__ void load_table(const float* p, float (&out)[VEC]) {
    constexpr int STEP = VEC < 4 ? VEC : 4;
#pragma unroll
    for (int i = 0; i < VEC; i += STEP) load_floats<float, STEP>(p + i, reinterpret_cast<float(&)[STEP]>(out[i]));
}

// Chunk indices of an item; `second` is -1 when the item has one chunk only.
struct Item {
    int first, second;
    bool rotates;
    __device__ Item(int i, int pairs, int chunks) {
        rotates = i < pairs;
        first = rotates ? i : 2 * i;  // 2 * pairs + 2 * (i - pairs)
        second = rotates ? i + pairs : first + 1;
        if (second >= chunks) second = -1;
        if (first >= chunks) first = -1;
    }
};

// Where a head goes: q_out, or its cache slot, or nowhere (padding).
__device__ __forceinline__ T* destination(T* q_out, T* kv_cache, int slot, i64 token, int head, int H, int K, int D,
                                          int log2_S) {
    if (head < H) return q_out + (token * H + head) * D;
    if (slot < 0) return nullptr;
    const int half = head < H + K ? 0 : 1, h = head - H - half * K;
    const i64 page = slot >> log2_S, offset = slot & ((1 << log2_S) - 1);
    return kv_cache + ((((page * 2 + half) * K + h) << log2_S) + offset) * D;
}

extern "C" __global__ void __launch_bounds__(128)
    rope_append(const T* qkv, const int* __restrict__ positions, const int* __restrict__ slot_mapping,
                const float* __restrict__ rope_table, const T* __restrict__ q_norm, const T* __restrict__ k_norm,
                T* q_out, T* kv_cache, int tokens, int H, int K, int D, int Dr, int log2_S,
                int lanes, float norm_eps, float norm_offset) {
    const int heads = H + 2 * K, chunks = D / VEC, pairs = Dr / 2 / VEC;
    const int lane = threadIdx.x & (lanes - 1);
    const int unit = blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
    const bool exists = unit < tokens * heads;  // no early return: every thread takes part in the shuffles
    const int token = exists ? unit / heads : 0, head = exists ? unit - token * heads : 0;
    const T* row = qkv + (i64)(exists ? unit : 0) * D;

    allow_next();
    await_previous();
    float a[ITEMS][VEC], b[ITEMS][VEC], squares = 0.0f;
#pragma unroll
    for (int n = 0; n < ITEMS; ++n) {
        const Item item(lane + n * lanes, pairs, chunks);
#pragma unroll
        for (int j = 0; j < VEC; ++j) a[n][j] = b[n][j] = 0.0f;
        if (item.first >= 0) load_floats<T, VEC>(row + item.first * VEC, a[n]);
        if (item.second >= 0) load_floats<T, VEC>(row + item.second * VEC, b[n]);
#pragma unroll
        for (int j = 0; j < VEC; ++j) squares += a[n][j] * a[n][j] + b[n][j] * b[n][j];
    }

    float scale = 1.0f;
    const T* weight = head < H ? q_norm : head < H + K ? k_norm : nullptr;
    if (q_norm || k_norm) {
        for (int offset = lanes / 2; offset > 0; offset >>= 1) squares += __shfl_xor_sync(FULL_WARP, squares, offset);
        scale = rsqrtf(squares / D + norm_eps);
    }
    T* target = exists ? destination(q_out, kv_cache, slot_mapping[token], token, head, H, K, D, log2_S) : nullptr;
    if (target == nullptr) return;

    const float* angles = rope_table + (i64)positions[token] * Dr;
#pragma unroll
    for (int n = 0; n < ITEMS; ++n) {
        const int i = lane + n * lanes;
        const Item item(i, pairs, chunks);
        if (weight) {
            float w[VEC];
            if (item.first >= 0) {
                load_floats<T, VEC>(weight + item.first * VEC, w);
#pragma unroll
                for (int j = 0; j < VEC; ++j) a[n][j] *= scale * (w[j] + norm_offset);
            }
            if (item.second >= 0) {
                load_floats<T, VEC>(weight + item.second * VEC, w);
#pragma unroll
                for (int j = 0; j < VEC; ++j) b[n][j] *= scale * (w[j] + norm_offset);
            }
        }
        if (item.rotates && head < H + K) {
            float cos[VEC], sin[VEC];
            load_table(angles + i * VEC, cos);
            load_table(angles + Dr / 2 + i * VEC, sin);
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                const float x = a[n][j], y = b[n][j];
                a[n][j] = x * cos[j] - y * sin[j];
                b[n][j] = y * cos[j] + x * sin[j];
            }
        }
        if (item.first >= 0) store_floats<T, VEC>(target + item.first * VEC, a[n]);
        if (item.second >= 0) store_floats<T, VEC>(target + item.second * VEC, b[n]);
    }
}
