// Enough of CUDA for some kernels to run on a CPU: each thread of a block (and of the blocks of a
// cluster) is a fiber, fibers take turns, and what joins threads waits until all are there. Copies of the copy engine
// happen at once, but their bytes count at barriers as on a GPU. Tensor cores: exact products, summed in fp64, rounded
// once to fp32.
//
// What it cannot show: races between threads, alignment of what is no copy, registers, time.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__    static
#define __CUDA_ARCH__ 900

using std::max;
using std::min;

// ---- types

struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using cudaStream_t = void*;

struct __half {
    uint16_t bits;
};
struct __half2 {
    __half x, y;
};
struct __nv_bfloat16 {
    uint16_t bits;
};

inline float half_value(uint32_t bits) {
    const uint16_t low = static_cast<uint16_t>(bits);
    _Float16 v;
    std::memcpy(&v, &low, 2);
    return static_cast<float>(v);
}
inline uint16_t half_bits(double v) {
    const _Float16 h = static_cast<_Float16>(v);
    uint16_t bits;
    std::memcpy(&bits, &h, 2);
    return bits;
}
inline float bf16_value(uint32_t bits) {
    const uint32_t wide = bits << 16;
    float v;
    std::memcpy(&v, &wide, 4);
    return v;
}
inline uint16_t bf16_bits(float v) {
    uint32_t wide;
    std::memcpy(&wide, &v, 4);
    if (v != v) return 0x7FFF;
    return static_cast<uint16_t>((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16);
}
inline float __half2float(__half h) { return half_value(h.bits); }
inline __half __float2half_rn(float v) { return {half_bits(v)}; }
inline __half2 __float2half2_rn(float v) { return {{half_bits(v)}, {half_bits(v)}}; }
inline __half fma1(__half a, __half b, __half c) {
    return {half_bits(static_cast<double>(__half2float(a)) * __half2float(b) + __half2float(c))};
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {fma1(a.x, b.x, c.x), fma1(a.y, b.y, c.y)}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return __hfma2(a, b, {{0}, {0}}); }

// ---- one thread

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, int by) {
    by &= 31;
    return by ? low >> by | high << (32 - by) : low;
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, int by) {
    by &= 31;
    return by ? high << by | low >> (32 - by) : high;
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t which) {
    const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
    uint32_t r = 0;
    for (int i = 0; i < 4; ++i) r |= static_cast<uint32_t>(both >> (8 * (which >> (4 * i) & 7)) & 255) << (8 * i);
    return r;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __ffs(unsigned v) { return __builtin_ffs(static_cast<int>(v)); }
template <typename T>
T __ldcg(const T* from) {
    return *from;
}

// ---- fibers

constexpr int kMostBlocks = 16, kMostWarps = 16;

struct Gathering {
    int wanted = 0, here = 0, times = 0;
};
struct Index {
    int x = 0, y = 0;
};
struct Copy {
    void* to;
    const void* from;
    int bytes, all;  // what is copied, and with zeros
};
struct Fibers {
    ucontext_t scheduler{};
    std::vector<ucontext_t> contexts;
    std::vector<char> done;
    int current = 0, block = 0;  // block: within the cluster
    int cluster = 1, met = 0;    // blocks of a cluster; threads that arrived at its barrier
    Gathering blocks[kMostBlocks], warps[kMostBlocks][kMostWarps];
    std::array<uint64_t, 32> slots[kMostBlocks][kMostWarps];
    std::array<std::array<uint32_t, 6>, 32> fragments[kMostBlocks][kMostWarps];
    std::vector<std::deque<std::vector<Copy>>> copies;  // of a thread, by groups; the last is open
    bool any[kMostBlocks];                              // whether a thread said so
    unsigned char* memory[kMostBlocks];                 // dynamic shared memory
    void (*body)(const void*) = nullptr;
    const void* argument = nullptr;
};
inline Fibers fibers;
inline Index threadIdx, blockIdx, gridDim;
inline unsigned char* memory;

[[noreturn]] inline void fail(const char* why) {
    std::fprintf(stderr, "emulated kernel: %s\n", why);
    std::abort();
}
inline void take_turns() {
    const int own = fibers.current;
    swapcontext(&fibers.contexts[own], &fibers.scheduler);
}
inline void gather(Gathering& g) {
    const int now = g.times;
    if (++g.here == g.wanted) {
        g.here = 0;
        ++g.times;
        return;
    }
    while (g.times == now) take_turns();
}
inline void run_fiber() {
    fibers.body(fibers.argument);
    fibers.done[fibers.current] = 1;
    take_turns();
}

// `grid` x `rows` blocks of `threads` threads, `cluster` of them at a time; a round without any progress is a deadlock.
inline void run_grid(void (*body)(const void*), const void* argument, int grid, int rows, int threads, size_t bytes,
                     int cluster = 1) {
    static std::vector<std::vector<char>> stacks;
    const int all = threads * cluster;
    while (static_cast<int>(stacks.size()) < all) stacks.emplace_back(1 << 15);
    std::vector<std::vector<unsigned char>> shared(cluster, std::vector<unsigned char>(bytes + 16));
    fibers.body = body, fibers.argument = argument, fibers.cluster = cluster;
    gridDim = {grid, rows};
    for (int first = 0; first < grid * rows; first += cluster) {
        for (int b = 0; b < cluster; ++b) {
            std::fill(shared[b].begin(), shared[b].end(), 0xFF);  // NaN, and counts that cannot be right
            fibers.memory[b] =
                reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared[b].data()) + 15) & ~15);
            fibers.blocks[b] = {threads};
            fibers.any[b] = false;
            for (auto& warp : fibers.warps[b]) warp = {32};
        }
        fibers.met = 0;
        fibers.contexts.assign(all, {});
        fibers.done.assign(all, 0);
        fibers.copies.assign(all, {});
        for (int i = 0; i < all; ++i) {
            getcontext(&fibers.contexts[i]);
            fibers.contexts[i].uc_stack.ss_sp = stacks[i].data();
            fibers.contexts[i].uc_stack.ss_size = stacks[i].size();
            fibers.contexts[i].uc_link = &fibers.scheduler;
            makecontext(&fibers.contexts[i], run_fiber, 0);
        }
        for (int left = all; left > 0;) {
            for (int i = 0; i < all; ++i) {
                if (fibers.done[i]) continue;
                fibers.current = i, fibers.block = i / threads;
                threadIdx.x = i % threads;
                blockIdx = {(first + fibers.block) % grid, (first + fibers.block) / grid};
                memory = fibers.memory[fibers.block];
                swapcontext(&fibers.scheduler, &fibers.contexts[i]);
                left -= fibers.done[i];
            }
        }
    }
}

// ---- a block and its warps

inline int lane_of() { return threadIdx.x % 32; }
inline auto& own_slots() { return fibers.slots[fibers.block][threadIdx.x / 32]; }
inline void __syncthreads() { gather(fibers.blocks[fibers.block]); }
inline bool __syncthreads_or(bool v) {  // once a kernel
    fibers.any[fibers.block] |= v;
    __syncthreads();
    return fibers.any[fibers.block];
}
inline void __syncwarp() { gather(fibers.warps[fibers.block][threadIdx.x / 32]); }

template <typename T>
T from_lane(T v, int lane) {
    auto& slots = own_slots();
    std::memcpy(&slots[lane_of()], &v, sizeof(T));
    __syncwarp();
    T r;
    std::memcpy(&r, &slots[lane], sizeof(T));
    __syncwarp();
    return r;
}
template <typename T>
T __shfl_sync(unsigned, T v, int lane) {
    return from_lane(v, lane);
}
template <typename T>
T __shfl_xor_sync(unsigned, T v, int by) {
    return from_lane(v, lane_of() ^ by);
}
template <typename T>
T __shfl_up_sync(unsigned, T v, int by) {
    return from_lane(v, lane_of() >= by ? lane_of() - by : lane_of());
}
inline unsigned __ballot_sync(unsigned, bool v) {
    unsigned all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= static_cast<unsigned>(from_lane<int>(v, lane)) << lane;
    return all;
}
inline bool __any_sync(unsigned, bool v) { return __ballot_sync(0, v) != 0; }
inline int __reduce_add_sync(unsigned, int v) {
    int sum = 0;
    for (int lane = 0; lane < 32; ++lane) sum += from_lane(v, lane);
    return sum;
}
