// In the place of csrc/pieces.cuh, dequant.cuh and ptx.cuh: the same functions for emulated threads.
#pragma once

#include "cuda.h"

namespace pyquant {

constexpr int kPiece = 8;

inline float value_of(uint32_t bits, __half) { return half_value(bits); }
inline float value_of(uint32_t bits, __nv_bfloat16) { return bf16_value(bits & 0xFFFF); }
inline uint32_t pack2(float low, float high, __half) { return half_bits(low) | half_bits(high) << 16; }
inline uint32_t pack2(float low, float high, __nv_bfloat16) {
    return bf16_bits(low) | static_cast<uint32_t>(bf16_bits(high)) << 16;
}
template <typename T>
T from_float(float v) {
    return {static_cast<uint16_t>(pack2(v, 0.0f, T{}))};
}
template <typename T>
float to_float(T v) {
    return value_of(v.bits, v);
}
template <typename T>
struct Magic {
    static float low(uint32_t two) { return value_of(two, T{}); }
    static float high(uint32_t two) { return value_of(two >> 16, T{}); }
};
template <int LANES>
float sum_lanes(float v) {
    for (int lane = LANES / 2; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffff, v, lane);
    return v;
}

namespace ptx {

inline void launch_dependents() {}
inline void wait_for_predecessor() {}
inline int load_int(const int* from) { return *from; }
template <typename T>
uint16_t load_bits(const T* from) {
    return from->bits;
}
template <typename T>
float load_one(const T* from) {
    return to_float(*from);
}
inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }
inline float exp2_approx(float x) { return std::exp2(x); }
inline unsigned count_arrival(unsigned* counter) { return (*counter)++; }

// An mbarrier for one arrival: bytes that are missing below, the phase above.
inline void barrier_init(uint64_t* barrier, int) { *barrier = 0; }
inline void barrier_init_fence() {}
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
    if (static_cast<uint32_t>(*barrier)) fail("bytes are expected at a barrier that still misses some");
    *barrier |= bytes;
}
inline void bytes_arrive(uint64_t* barrier, uint32_t bytes) {
    if (static_cast<uint32_t>(*barrier) < bytes) fail("more bytes than were expected");
    *barrier -= bytes;
    if (static_cast<uint32_t>(*barrier) == 0) *barrier ^= uint64_t{1} << 32;
}
inline void barrier_wait(const uint64_t* barrier, uint32_t parity) {
    for (int i = 0; (*barrier >> 32 & 1) == parity; ++i) {
        if (i > 100000) fail("a barrier never completes");
        take_turns();
    }
}
inline void copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    const auto misfit = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes;
    if (misfit % 16 || !bytes) fail("a copy of sizes or addresses that are no multiple of 16");
    std::memcpy(to, from, bytes);
    bytes_arrive(barrier, bytes);
}

// Copies of a thread's own come when it waits for their group, and not before: in the order of the groups.
inline auto& own_groups() {
    auto& groups = fibers.copies[fibers.current];
    if (groups.empty()) groups.emplace_back();
    return groups;
}
inline void copy_async_or_zero(void* to, const void* from, bool wanted) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16) fail("a copy not at 16 bytes");
    own_groups().back().push_back({to, from, wanted ? 16 : 0, 16});
}
template <int BYTES>
void copy_async(void* to, const void* from) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % BYTES) fail("a copy not at its size");
    own_groups().back().push_back({to, from, BYTES, BYTES});
}
inline void copy_async_commit() {
    own_groups();
    fibers.copies[fibers.current].emplace_back();
}
template <int PENDING>
void copy_async_wait() {
    auto& groups = own_groups();
    while (groups.size() > PENDING + 1) {  // the last is not committed yet
        for (const Copy& copy : groups.front()) {
            std::memcpy(copy.to, copy.from, copy.bytes);
            std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.all - copy.bytes);
        }
        groups.pop_front();
    }
}

inline auto& own_fragments() { return fibers.fragments[fibers.block][threadIdx.x / 32]; }

// Registers and halves by the picture of m16n8k16 in the PTX manual.
template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T type) {
    auto& all = own_fragments();
    all[lane_of()] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    __syncwarp();
    for (int e = 0; e < 4; ++e) {
        const int row = lane_of() / 4 + 8 * (e / 2), column = 2 * (lane_of() % 4) + e % 2;
        double sum = d[e];
        for (int k = 0; k < 16; ++k) {
            const int of_a = 4 * (row % 8) + k % 8 / 2, of_b = 4 * column + k % 8 / 2;
            const uint32_t x = all[of_a][row / 8 + 2 * (k / 8)] >> (16 * (k % 2));
            const uint32_t y = all[of_b][4 + k / 8] >> (16 * (k % 2));
            sum += static_cast<double>(value_of(x, type)) * value_of(y, type);
        }
        d[e] = static_cast<float>(sum);
    }
    __syncwarp();
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
    uint64_t address = reinterpret_cast<uint64_t>(shared);
    if (address % 16) fail("a row of an ldmatrix not at 16 bytes");
    for (int i = 0; i < 4; ++i) {
        const auto* row = reinterpret_cast<const uint32_t*>(from_lane(address, 8 * i + lane_of() / 4));
        r[i] = row[lane_of() % 4];
    }
}
inline uint32_t transpose8(uint32_t a) {
    auto& all = own_fragments();
    all[lane_of()][0] = a;
    __syncwarp();
    const auto element = [&](int row, int column) { return all[4 * row + column / 2][0] >> (16 * (column % 2)) & 0xFFFF; };
    const int row = lane_of() / 4, column = 2 * (lane_of() % 4);
    const uint32_t r = element(column, row) | element(column + 1, row) << 16;
    __syncwarp();
    return r;
}

// Clusters: an address in another block's shared memory is its rank above 24 bits of offset.
inline int cluster_size() { return fibers.cluster; }
inline int cluster_rank() { return fibers.block; }
inline void cluster_arrive_relaxed() { ++fibers.met; }
inline void cluster_wait() {
    while (fibers.met < fibers.cluster * fibers.blocks[0].wanted) take_turns();
}
inline uint32_t map_shared(const void* shared, uint32_t rank) {
    return rank << 24 | static_cast<uint32_t>(static_cast<const unsigned char*>(shared) - memory);
}
template <typename T>
void send(uint32_t address, const T& v, uint32_t barrier) {
    if (address % sizeof(T)) fail("numbers are sent to an address that is no multiple of their size");
    std::memcpy(fibers.memory[address >> 24] + (address & 0xFFFFFF), &v, sizeof(T));
    bytes_arrive(reinterpret_cast<uint64_t*>(fibers.memory[barrier >> 24] + (barrier & 0xFFFFFF)), sizeof(T));
}

}  // namespace ptx
}  // namespace pyquant
