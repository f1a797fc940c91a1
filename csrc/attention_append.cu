// rope_append: L new tokens a sequence (a prompt). Rotates queries and keys, gives the queries back, and writes keys
// and values to the cache; the attention itself is another kernel's.
//
//   qkv [B L, (Hq + 2 Hkv) D]   q_out [B, L, Hq, D] contiguous   cache, slot, start, cos and sin as in attention_decode
//
// Token l of sequence b goes to slot[b] + l, at position slot[b] + l - start[b] (0 for padding before start). Sixteen
// lanes a head; bound by memory, 4 bytes a value.
#include "ops.h"
#include "programmatic.cuh"
#include "rope.cuh"

namespace pyquant {
namespace {

constexpr int kThreads = 256;
constexpr int kHeadsAtOnce = kThreads / kHeadLanes;

template <typename T, int D>
__global__ void __launch_bounds__(kThreads)
    rope_kernel(AttentionArguments a, const float* cos, const float* sin, T* q_out, int64_t length) {
    ptx::launch_dependents();
    ptx::wait_for_predecessor();
    const int64_t row = blockIdx.x, batch = row / length;
    const int slot = ptx::load_int(a.slot + batch) + static_cast<int>(row % length);
    const int position = min(max(slot - ptx::load_int(a.start + batch), 0), static_cast<int>(a.positions) - 1);
    const int half_warp = threadIdx.x / kHeadLanes, lane = threadIdx.x % kHeadLanes;
    const Angles angles = load_angles<D>(cos, sin, position, lane);
    const int heads = static_cast<int>(a.heads), kv_heads = static_cast<int>(a.kv_heads), all = heads + 2 * kv_heads;
    for (int first = half_warp & ~1; first < all; first += kHeadsAtOnce) {
        const int head = first + (half_warp & 1);
        const bool is_v = head >= heads + kv_heads, wanted = head < all;
        HeadSlice slice = load_head<T, D>(static_cast<const T*>(a.qkv) + row * a.qkv_stride + head * D, lane, wanted);
        if (a.q_norm) {
            HeadSlice normed = slice;
            norm_head<T, D>(normed, static_cast<const T*>(head < heads ? a.q_norm : a.k_norm), a.eps, lane);
            if (!is_v) slice = normed;
        }
        if (!is_v) rotate(slice, angles);
        if (!wanted) continue;
        if (head < heads) {
            store_head<T, D>(q_out + (row * heads + head) * D, lane, slice);
        } else if (slot < a.capacity) {
            T* const cache = static_cast<T*>(is_v ? a.v_cache : a.k_cache);
            const int kv_head = head - heads - (is_v ? kv_heads : 0);
            store_head<T, D>(cache + batch * a.batch_stride + kv_head * a.head_stride + slot * a.slot_stride, lane,
                             slice);
        }
    }
}

}  // namespace

void rope_append(const AttentionArguments& a, const void* cos, const void* sin, void* q_out, int64_t length,
                 cudaStream_t stream) {
    const int64_t rows = a.batch * length;
    if (rows == 0) return;
    require(a.dtype == 0 || a.dtype == 1, "rope_append: qkv must be bf16 or fp16");
    require(rows < (int64_t{1} << 31) && a.capacity < (1 << 30), "rope_append: too many tokens or slots");
    const int major = current_device().major;
    const auto run = [&](auto type, auto size) {
        using T = decltype(type);
        launch_programmatic("rope_append", rope_kernel<T, decltype(size)::value>, dim3(static_cast<unsigned>(rows)),
                            kThreads, 0, 1, major, stream, a, static_cast<const float*>(cos),
                            static_cast<const float*>(sin), static_cast<T*>(q_out), length);
    };
    const auto with_type = [&](auto size) { a.dtype == 0 ? run(__nv_bfloat16{}, size) : run(__half{}, size); };
    with_head_size(a.head_size, "rope_append", with_type);
}

}  // namespace pyquant
