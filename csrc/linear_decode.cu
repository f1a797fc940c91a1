// linear_w4a16 for few tokens: y [M, N] = x [M, K] w_hat^T + bias, with w_hat = (code - zero) * scale.
//
// The problem is transposed: the weight is the A operand (64 rows of a strip = 4 warps x m16), the tokens are the B
// operand (n8 tiles), so that no tensor-core row is wasted on missing tokens and the packed weight is loaded straight
// into fragments.
//
//                      K of this block ->                 cluster along K: up to 8 blocks, each its own range of units
//   strip   warp 0   [unit][unit][unit] ...               8 warps: warps 0-3 take even units, warps 4-7 odd ones
//   64 rows warp 1      |
//           warp 2    16 bytes a thread = 4 A fragments
//           warp 3
//
// Per group the tensor cores add up integers times 16-bit values, and the fp32 sum is multiplied by the scale: the
// weight is never rounded to 16 bits. For up to 16 tokens the integers are base + code as they come out of the bit
// trick (base 128 in bf16, 1024 in fp16), and (base + zero) * sum(x) is taken away per group, with sum(x) from one more
// product with a matrix of ones: 4 subtractions a word less. Above that the extra products cost more than the
// subtractions.
//
// Partial sums of the warps meet in shared memory, those of the blocks of a cluster through distributed shared memory
// in a fixed order: one launch, no workspace, no atomics, the same bits every time, on any stream and in any graph.
//
// Bound by memory: 0.516 bytes a weight at group 128. Each thread copies its own 16 bytes of the next 8 units ahead
// into its own slots of shared memory (cp.async), so that 32 KB a block are on their way without holding registers.
// Below sm_90 there are no clusters: the cluster is one block (right, but slow when N is small).
#include <algorithm>

#include "dequant.cuh"
#include "launch.cuh"
#include "ops.h"

namespace pyquant {
namespace {

constexpr int kHalves = 2;                        // groups of 4 warps
constexpr int kThreads = kHalves * kUnitThreads;  // 256
constexpr int kDepth = 8;                         // units on their way for each half: 32 KB of weights a block
constexpr int kRowPad = 8;                        // elements between staged rows: ldmatrix without bank conflicts

struct Problem {
    int64_t x_stride;
    int m, n, k, units, groups;  // units = padded K / 64, groups as stored
    int group_shift;             // group of column col is col >> group_shift; 31 when there is one group per row
};

// 8 neighbours of x's row m from column col, zeros outside [0, M) x [0, K).
template <typename T>
__device__ __forceinline__ uint4 load_x(const T* __restrict__ x, const Problem& p, int m, int col, bool vectors) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (m >= p.m || col >= p.k) return v;
    const T* from = x + m * p.x_stride + col;
    if (vectors) return *reinterpret_cast<const uint4*>(from);
    T* parts = reinterpret_cast<T*>(&v);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (col + i < p.k) parts[i] = from[i];
    }
    return v;
}

// What depends on the number of token tiles.
template <int TILES>
struct Shape {
    static constexpr int kM = 8 * TILES;
    static constexpr int kUnits = TILES == 1 ? 16 : 8;      // units of x staged at once
    static constexpr int kRow = kUnits * kUnitK + kRowPad;  // elements from one staged row to the next
    static constexpr bool kSumX = TILES <= 2;               // correct by sums of x instead of subtracting per weight
};

// A thread's own slots for kDepth units on their way from memory: nobody else reads them, so no barrier guards them.
template <int GROUPS>
struct Ring {
    uint4 weight[kDepth][kThreads];
    uint32_t scale[GROUPS][kDepth][kThreads];  // pairs: the scales of rows g and g + 8
};

// GROUPS of scales that a unit touches: 2 at group size 32, else 1.
template <typename T, int TILES, int GROUPS, bool ZERO>
__global__ void __launch_bounds__(kThreads, TILES == 1 ? 3 : 2)
    decode_kernel(const T* __restrict__ x, const uint4* __restrict__ qweight, const T* __restrict__ scale,
                  const uint8_t* __restrict__ zero, const T* __restrict__ bias, T* __restrict__ y, Problem p,
                  int log_splits, bool vectors) {
    using S = Shape<TILES>;
    extern __shared__ __align__(16) unsigned char shared[];
    Ring<GROUPS>& ring = *reinterpret_cast<Ring<GROUPS>*>(shared);
    T* staged = reinterpret_cast<T*>(shared + sizeof(Ring<GROUPS>));  // [kM][kRow]
    float* sums = reinterpret_cast<float*>(shared);                   // [kM][kStrip + 1], once the ring is used up

    const int thread = threadIdx.x, half = thread / kUnitThreads, warp = thread % kUnitThreads / 32, lane = thread % 32;
    const int g = lane / 4, c = lane % 4;
    const int splits = 1 << log_splits, split = blockIdx.x & (splits - 1), strip = blockIdx.x >> log_splits;
    const int first_m = blockIdx.y * S::kM, live = min(p.m - first_m, S::kM);
    const int share = (p.units + splits - 1) >> log_splits;
    const int begin = min(split * share, p.units), end = min(begin + share, p.units);
    // Scales and zeros of this thread's two rows in group 0; a group further is kStrip further.
    const int64_t first_pair = static_cast<int64_t>(strip) * p.groups * kStrip + 2 * (8 * warp + g);
    const auto pair_at = [&](int unit, int j) { return ((unit * kUnitK + 32 * j) >> p.group_shift) * kStrip; };

    int ahead = begin + half, slot = 0;  // the next unit to fetch, and the slot of the unit at hand
    const uint4* weight =
        qweight + (static_cast<int64_t>(strip) * p.units + ahead) * kUnitThreads + thread % kUnitThreads;
    const T* pairs = scale + first_pair;
    const auto fetch = [&](int to) {
        if (ahead < end) {
            ptx::copy_async<16>(&ring.weight[to][thread], weight);
#pragma unroll
            for (int j = 0; j < GROUPS; ++j) {
                ptx::copy_async<4>(&ring.scale[j][to][thread], pairs + pair_at(ahead, j));
            }
        }
        ptx::copy_async_commit();
        ahead += kHalves;
        weight += kHalves * kUnitThreads;
    };
#pragma unroll
    for (int i = 0; i < kDepth; ++i) fetch(i);

    float total[TILES][4] = {};
    for (int chunk = begin; chunk < end; chunk += S::kUnits) {
        const int chunk_end = min(chunk + S::kUnits, end), columns = (chunk_end - chunk) * kUnitK;
        __syncthreads();
        for (int i = thread; i < live * (S::kUnits * kUnitK / 8); i += kThreads) {
            const int row = i / (S::kUnits * kUnitK / 8), col = i % (S::kUnits * kUnitK / 8) * 8;
            if (col < columns) {
                *reinterpret_cast<uint4*>(staged + row * S::kRow + col) =
                    load_x(x, p, first_m + row, chunk * kUnitK + col, vectors);
            }
        }
        __syncthreads();
        const T* tile = staged + (lane % 8) * S::kRow + half * kUnitK + lane / 8 * 8;
        for (int unit = chunk + half; unit < chunk_end; unit += kHalves, tile += kHalves * kUnitK) {
            ptx::copy_async_wait<kDepth - 1>();
            const uint4 packed = ring.weight[slot][thread];
            const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
            float part[TILES][4] = {}, sum_x[TILES][4] = {};
#pragma unroll
            for (int j = 0; j < 2; ++j) {  // 32 columns: one ldmatrix gives the B fragments of two k16 steps
                int z[2] = {kSymmetricZero, kSymmetricZero};
                if (ZERO) {
                    const uchar2 pair = *reinterpret_cast<const uchar2*>(zero + first_pair + pair_at(unit, j));
                    z[0] = pair.x;
                    z[1] = pair.y;
                }
                uint32_t a[2][4];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if constexpr (S::kSumX) {
                        word_to_magic<T>(a[i], words[2 * j + i]);
                    } else {
                        const uint32_t offset[2] = {offset2<T>(z[0]), offset2<T>(z[1])};
                        word_to_fragment<T>(a[i], words[2 * j + i], offset);
                    }
                }
#pragma unroll
                for (int t = 0; t < TILES; ++t) {
                    uint32_t b[4];
                    ptx::ldmatrix_x4(b, tile + 8 * t * S::kRow + 32 * j);
                    ptx::mma_m16n8k16(part[t], a[0], {b[0], b[1]}, T{});
                    ptx::mma_m16n8k16(part[t], a[1], {b[2], b[3]}, T{});
                    if constexpr (S::kSumX) {
                        constexpr uint32_t kOnes[4] = {Magic<T>::kOnes, Magic<T>::kOnes, Magic<T>::kOnes,
                                                       Magic<T>::kOnes};
                        ptx::mma_m16n8k16(sum_x[t], kOnes, {b[0], b[1]}, T{});
                        ptx::mma_m16n8k16(sum_x[t], kOnes, {b[2], b[3]}, T{});
                    }
                }
                if (GROUPS == 2 || j == 1) {
                    const uint32_t pair = ring.scale[GROUPS == 2 ? j : 0][slot][thread];
                    const float s[2] = {Magic<T>::low(pair), Magic<T>::high(pair)};
#pragma unroll
                    for (int t = 0; t < TILES; ++t) {
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            float value = part[t][e];
                            if constexpr (S::kSumX) value -= (Magic<T>::kBase + z[e / 2]) * sum_x[t][e % 2];
                            total[t][e] += s[e / 2] * value;
                        }
#pragma unroll
                        for (int e = 0; e < 4; ++e) part[t][e] = sum_x[t][e] = 0.0f;
                    }
                }
            }
            fetch(slot);
            slot = (slot + 1) % kDepth;
        }
    }
    ptx::copy_async_wait<0>();

    // Sum the two halves: element (row, token) of this block at sums[token][row].
    __syncthreads();
    for (int turn = kHalves - 1; turn >= 0; --turn) {
        if (half == turn) {
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float* to = sums + (8 * t + 2 * c + e % 2) * (kStrip + 1) + 16 * warp + g + 8 * (e / 2);
                    *to = turn == kHalves - 1 ? total[t][e] : *to + total[t][e];
                }
            }
        }
        __syncthreads();
    }

    // Sum the blocks of the cluster; block `split` writes its share of the strip's rows.
#if __CUDA_ARCH__ >= 900
    if (splits > 1) ptx::cluster_sync();
#endif
    const int log_rows = 6 - log_splits;
    for (int i = thread; i < live << log_rows; i += kThreads) {
        const int row = (split << log_rows) + (i & ((1 << log_rows) - 1)), token = i >> log_rows;
        const int n = strip * kStrip + row;
        const float* from = sums + token * (kStrip + 1) + row;
        float sum = 0.0f;
#if __CUDA_ARCH__ >= 900
        if (splits > 1) {
            float parts[8];
#pragma unroll
            for (int rank = 0; rank < 8; ++rank) {
                parts[rank] = rank < splits ? ptx::load_cluster(ptx::map_shared(from, rank)) : 0.0f;
            }
#pragma unroll
            for (int rank = 0; rank < 8; ++rank) sum += parts[rank];
        } else {
            sum = *from;
        }
#else
        sum = *from;
#endif
        if (n < p.n) {
            y[static_cast<int64_t>(first_m + token) * p.n + n] = from_float<T>(bias ? sum + to_float(bias[n]) : sum);
        }
    }
#if __CUDA_ARCH__ >= 900
    if (splits > 1) ptx::cluster_sync();  // nobody leaves while its shared memory is being read
#endif
}

// log2 of the blocks along K for one strip: the fewest that fill every multiprocessor evenly, two blocks on each at
// least.
int choose_log_splits(int64_t strips, int64_t units, int multiprocessors, int major) {
    if (major < 9) return 0;
    int best = 0;
    double best_cost = 1e30;
    for (int log = 0; log <= 3; ++log) {
        const int64_t splits = 1 << log, blocks = strips * splits;
        if (log > 0 && units < 4 * splits) break;
        double cost = static_cast<double>(ceil_div(blocks, multiprocessors)) / splits * (1.0 + 0.03 * log);
        if (blocks < 2 * multiprocessors) cost *= 1.5;
        if (cost < best_cost) {
            best = log;
            best_cost = cost;
        }
    }
    return best;
}

struct Device {
    int multiprocessors, major;
};

Device current_device() {
    int device = 0;
    Device d{};
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, device),
               "cudaDeviceGetAttribute");
    check_cuda(cudaDeviceGetAttribute(&d.major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    return d;
}

template <typename T, int TILES, int GROUPS, bool ZERO>
void launch(const T* x, const int32_t* qweight, const T* scale, const uint8_t* zero, const T* bias, T* y,
            const Problem& p, cudaStream_t stream) {
    constexpr int M = Shape<TILES>::kM;
    const auto kernel = decode_kernel<T, TILES, GROUPS, ZERO>;
    constexpr size_t bytes = sizeof(Ring<GROUPS>) + sizeof(T) * M * Shape<TILES>::kRow;
    static_assert(bytes >= sizeof(float) * M * (kStrip + 1), "the sums reuse the ring and the staged x");
    // Asked for at every launch: the attribute belongs to a device, and setting it again costs less than remembering
    // where it is set.
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
               "linear_w4a16: shared memory");
    const Device device = current_device();
    const int64_t strips = ceil_div(p.n, kStrip);
    const int log_splits = choose_log_splits(strips, p.units, device.multiprocessors, device.major),
              splits = 1 << log_splits;
    const int64_t row_tiles = ceil_div(p.m, M);
    require(row_tiles <= 65535, "linear_w4a16: M=" + std::to_string(p.m) + " is too large for one launch");

    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(strips * splits), static_cast<unsigned>(row_tiles));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = splits;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = splits > 1 ? 1 : 0;
    const bool vectors = p.k % 8 == 0 && p.x_stride % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
    check_cuda(cudaLaunchKernelEx(&config, kernel, x, reinterpret_cast<const uint4*>(qweight), scale, zero, bias, y, p,
                                  log_splits, vectors),
               "linear_w4a16");
}

template <typename T>
void dispatch(const T* x, const int32_t* qweight, const T* scale, const uint8_t* zero, const T* bias, T* y,
              const Problem& p, cudaStream_t stream) {
    const auto with_tiles = [&](auto groups, auto zeros) {
        constexpr int kGroups = decltype(groups)::value;
        constexpr bool kZero = decltype(zeros)::value;
        if (p.m <= 8) return launch<T, 1, kGroups, kZero>(x, qweight, scale, zero, bias, y, p, stream);
        if (p.m <= 16) return launch<T, 2, kGroups, kZero>(x, qweight, scale, zero, bias, y, p, stream);
        if (p.m <= 32) return launch<T, 4, kGroups, kZero>(x, qweight, scale, zero, bias, y, p, stream);
        return launch<T, 8, kGroups, kZero>(x, qweight, scale, zero, bias, y, p, stream);
    };
    const auto with_groups = [&](auto zeros) {
        if (p.group_shift == 5) return with_tiles(std::integral_constant<int, 2>{}, zeros);
        return with_tiles(std::integral_constant<int, 1>{}, zeros);
    };
    zero ? with_groups(std::true_type{}) : with_groups(std::false_type{});
}

}  // namespace

void linear_w4a16(const void* x, int64_t x_stride, int dtype, const int32_t* qweight, const void* scale,
                  const uint8_t* zero, const void* bias, void* y, int64_t m, int64_t n, int64_t k, int64_t group_size,
                  cudaStream_t stream) {
    if (m == 0 || n == 0) return;
    require(dtype == 0 || dtype == 1, "linear_w4a16: x must be bf16 or fp16");
    require(group_size == -1 || group_size == 32 || group_size == 64 || group_size == 128,
            "linear_w4a16: group_size=" + std::to_string(group_size) + " must be 32, 64, 128 or -1");
    require(std::max({m, n, k}) < (1 << 30), "linear_w4a16: a size of 2^30 or more is not supported");
    const int shift = group_size < 0 ? 31 : group_size == 32 ? 5 : group_size == 64 ? 6 : 7;
    const Problem p{x_stride,
                    static_cast<int>(m),
                    static_cast<int>(n),
                    static_cast<int>(k),
                    static_cast<int>(ceil_div(k, kUnitK)),
                    static_cast<int>(tiled_groups(k, group_size)),
                    shift};
    const auto run = [&](auto type) {
        using T = decltype(type);
        dispatch<T>(static_cast<const T*>(x), qweight, static_cast<const T*>(scale), zero, static_cast<const T*>(bias),
                    static_cast<T*>(y), p, stream);
    };
    dtype == 0 ? run(__nv_bfloat16{}) : run(__half{});
}

}  // namespace pyquant
