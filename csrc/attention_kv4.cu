// attention_kv4: csrc/attention_kv4.cuh says what it does.
#include "attention_kv4_launch.cuh"

namespace pyquant {

int64_t attention_kv4_workspace(int64_t head_size, int multiprocessors) {
    return kCounters * 4 + int64_t{2} * 2 * multiprocessors * 32 * (head_size + 2) * 4;
}

int64_t attention_kv4_shared(int64_t bits, int64_t head_size, int64_t rows) {
    size_t bytes = 0;
    with_head_size(head_size, "attention_kv4", [&](auto size) {
        constexpr int kSize = decltype(size)::value;
        with_rows<kSize>(rows, [&](auto nt) {
            constexpr int kNt = decltype(nt)::value;
            bytes = bits == 2   ? sizeof(Shared<__half, kSize, kNt, 2>)
                    : bits == 3 ? sizeof(Shared<__half, kSize, kNt, 3>)
                    : bits == 4 ? sizeof(Shared<__half, kSize, kNt, 4>)
                                : sizeof(Shared<__half, kSize, kNt, 8>);
        });
    });
    return static_cast<int64_t>(bytes);
}

void attention_kv4(const Kv4Arguments& a, cudaStream_t stream) {
    if (a.batch == 0 || a.tokens == 0) return;
    const int64_t group = a.kv_heads ? a.heads / a.kv_heads : 0, rows = group * a.tokens, d = a.head_size;
    require(a.dtype == 0 || a.dtype == 1, "attention_kv4: q must be bf16 or fp16");
    require(
        group * a.kv_heads == a.heads && group > 0,
        "attention_kv4: " + std::to_string(a.heads) + " query heads do not divide over " + std::to_string(a.kv_heads));
    require(rows <= (d > 128 ? 16 : 32), "attention_kv4: " + std::to_string(group) + " query heads a KV head times " +
                                             std::to_string(a.tokens) + " tokens are too many rows");
    require(a.batch <= kMaxBatch && a.batch * a.kv_heads <= kCounters,
            "attention_kv4: at most " + std::to_string(kMaxBatch) + " sequences and " + std::to_string(kCounters) +
                " KV heads of all of them");
    switch (a.bits) {
        case 2:
            return a.dtype ? attention_kv4_2bit_fp16(a, stream) : attention_kv4_2bit_bf16(a, stream);
        case 3:
            return a.dtype ? attention_kv4_3bit_fp16(a, stream) : attention_kv4_3bit_bf16(a, stream);
        case 4:
            return a.dtype ? attention_kv4_4bit_fp16(a, stream) : attention_kv4_4bit_bf16(a, stream);
        case 8:
            return a.dtype ? attention_kv4_8bit_fp16(a, stream) : attention_kv4_8bit_bf16(a, stream);
        default:
            throw std::invalid_argument("attention_kv4: pages of " + std::to_string(a.bits) +
                                        " bits; there are those of 2, 3, 4 and 8");
    }
}

}  // namespace pyquant
