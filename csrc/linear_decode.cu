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
// Per group the tensor cores add up (code - zero) * x, integers times 16-bit values, and the fp32 sum is multiplied by
// the scale: the weight is never rounded to 16 bits. Partial sums of the warps meet in shared memory, those of the
// blocks of a cluster through distributed shared memory in a fixed order: one launch, no workspace, no atomics, the
// same bits every time, on any stream and in any graph.
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

// Units of x staged at once: the most that leaves room for several blocks on a multiprocessor.
template <int TILES>
struct Stage {
    static constexpr int kM = 8 * TILES;
    static constexpr int kUnits = TILES == 1 ? 32 : TILES == 2 ? 16 : 8;
    static constexpr int kRow = kUnits * kUnitK + kRowPad;  // elements from one staged row to the next
};

// A thread's own slots for kDepth units on their way from memory: nobody else reads them, so no barrier guards them.
struct Ring {
    uint4 weight[kDepth][kThreads];
    uint32_t scale[2][kDepth][kThreads];  // pairs (row g, row g + 8); the second group is used at group size 32 only
};

template <typename T, int TILES, int GROUPS>  // GROUPS of scales a unit touches: 2 at group size 32, else 1
__global__ void __launch_bounds__(kThreads, TILES <= 2 ? 3 : 2)
    decode_kernel(const T* __restrict__ x, const uint4* __restrict__ qweight, const T* __restrict__ scale,
                  const uint8_t* __restrict__ zero, const T* __restrict__ bias, T* __restrict__ y, Problem p,
                  int splits, bool vectors) {
    constexpr int M = Stage<TILES>::kM, kRow = Stage<TILES>::kRow, kUnits = Stage<TILES>::kUnits;
    extern __shared__ __align__(16) unsigned char shared[];
    Ring& ring = *reinterpret_cast<Ring*>(shared);
    T* staged = reinterpret_cast<T*>(shared + sizeof(Ring));  // [M][kRow]
    float* sums = reinterpret_cast<float*>(shared);           // [M][kStrip + 1], once the weights are used up

    const int thread = threadIdx.x, half = thread / kUnitThreads, warp = thread % kUnitThreads / 32, lane = thread % 32;
    const int g = lane / 4, c = lane % 4;
    const int split = blockIdx.x % splits, strip = blockIdx.x / splits, first_m = blockIdx.y * M;
    const int share = (p.units + splits - 1) / splits;
    const int begin = min(split * share, p.units), end = min(begin + share, p.units);
    const uint4* weight = qweight + static_cast<int64_t>(strip) * p.units * kUnitThreads + thread % kUnitThreads;
    // Scales and zeros of this thread's two rows in group 0; a group further is kStrip further.
    const int64_t first_pair = static_cast<int64_t>(strip) * p.groups * kStrip + 2 * (8 * warp + g);
    const auto pair_at = [&](int unit, int j) {
        return first_pair + ((unit * kUnitK + 32 * j) >> p.group_shift) * kStrip;
    };

    const auto fetch = [&](int unit, int slot) {
        if (unit < end) {
            ptx::copy_async<16>(&ring.weight[slot][thread], weight + static_cast<int64_t>(unit) * kUnitThreads);
#pragma unroll
            for (int j = 0; j < GROUPS; ++j) ptx::copy_async<4>(&ring.scale[j][slot][thread], scale + pair_at(unit, j));
        }
        ptx::copy_async_commit();
    };
    int ahead = begin + half, slot = 0;  // the next unit to fetch, and the slot of the unit at hand
#pragma unroll
    for (int i = 0; i < kDepth; ++i, ahead += kHalves) fetch(ahead, i);

    float total[TILES][4] = {};
    for (int chunk = begin; chunk < end; chunk += kUnits) {
        const int chunk_end = min(chunk + kUnits, end), columns = (chunk_end - chunk) * kUnitK;
        __syncthreads();
        for (int i = thread; i < M * (columns / 8); i += kThreads) {
            const int row = i / (columns / 8), col = i % (columns / 8) * 8;
            *reinterpret_cast<uint4*>(staged + row * kRow + col) =
                load_x(x, p, first_m + row, chunk * kUnitK + col, vectors);
        }
        __syncthreads();
        for (int unit = chunk + half; unit < chunk_end; unit += kHalves) {
            ptx::copy_async_wait<kDepth - 1>();
            const uint4 packed = ring.weight[slot][thread];
            const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
            const T* tile = staged + (lane % 8) * kRow + (unit - chunk) * kUnitK + lane / 8 * 8;
            float part[TILES][4] = {};
#pragma unroll
            for (int j = 0; j < 2; ++j) {  // 32 columns: one ldmatrix gives the B fragments of two k16 steps
                uint32_t offset[2] = {offset2<T>(kSymmetricZero), offset2<T>(kSymmetricZero)};
                if (zero) {
                    const uint8_t* zeros = zero + pair_at(unit, j);
                    offset[0] = offset2<T>(zeros[0]);
                    offset[1] = offset2<T>(zeros[1]);
                }
                uint32_t a[2][4];
                word_to_fragment<T>(a[0], words[2 * j], offset);
                word_to_fragment<T>(a[1], words[2 * j + 1], offset);
#pragma unroll
                for (int t = 0; t < TILES; ++t) {
                    uint32_t b[4];
                    ptx::ldmatrix_x4(b, tile + 8 * t * kRow + 32 * j);
                    ptx::mma_m16n8k16(part[t], a[0], {b[0], b[1]}, T{});
                    ptx::mma_m16n8k16(part[t], a[1], {b[2], b[3]}, T{});
                }
                if (GROUPS == 2 || j == 1) {
                    const uint32_t pair = ring.scale[GROUPS == 2 ? j : 0][slot][thread];
                    const float s[2] = {to_float(reinterpret_cast<const T*>(&pair)[0]),
                                        to_float(reinterpret_cast<const T*>(&pair)[1])};
#pragma unroll
                    for (int t = 0; t < TILES; ++t) {
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            total[t][e] += s[e / 2] * part[t][e];
                            part[t][e] = 0.0f;
                        }
                    }
                }
            }
            fetch(ahead, slot);
            ahead += kHalves;
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
    const int rows = kStrip / splits;
    const int live = min(p.m - first_m, M);
    for (int i = thread; i < rows * live; i += kThreads) {
        const int row = split * rows + i % rows, token = i / rows, n = strip * kStrip + row;
        float sum = sums[token * (kStrip + 1) + row];
#if __CUDA_ARCH__ >= 900
        if (splits > 1) {
            sum = 0.0f;
            for (int from = 0; from < splits; ++from)
                sum += ptx::load_cluster(ptx::map_shared(sums + token * (kStrip + 1) + row, from));
        }
#endif
        if (n < p.n)
            y[static_cast<int64_t>(first_m + token) * p.n + n] = from_float<T>(bias ? sum + to_float(bias[n]) : sum);
    }
#if __CUDA_ARCH__ >= 900
    if (splits > 1) ptx::cluster_sync();  // nobody leaves while its shared memory is being read
#endif
}

// Blocks along K for one strip: enough that the whole GPU has about four blocks a multiprocessor, at least one chunk
// each.
int choose_splits(int64_t strips, int64_t units, int multiprocessors, int major) {
    if (major < 9) return 1;
    int splits = 1;
    while (splits < 8 && strips * splits < 4 * multiprocessors && units >= 2 * splits * kHalves) splits *= 2;
    return splits;
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

template <typename T, int TILES, int GROUPS>
void launch(const T* x, const int32_t* qweight, const T* scale, const uint8_t* zero, const T* bias, T* y,
            const Problem& p, cudaStream_t stream) {
    constexpr int M = Stage<TILES>::kM;
    const auto kernel = decode_kernel<T, TILES, GROUPS>;
    constexpr size_t bytes = sizeof(Ring) + sizeof(T) * M * Stage<TILES>::kRow;
    static_assert(bytes >= sizeof(float) * M * (kStrip + 1), "the sums reuse the ring and the staged x");
    // Asked for at every launch: the attribute belongs to a device, and setting it again costs less than remembering
    // where it is set.
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
               "linear_w4a16: shared memory");
    const Device device = current_device();
    const int64_t strips = ceil_div(p.n, kStrip);
    const int splits = choose_splits(strips, p.units, device.multiprocessors, device.major);
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
                                  splits, vectors),
               "linear_w4a16");
}

template <typename T>
void dispatch(const T* x, const int32_t* qweight, const T* scale, const uint8_t* zero, const T* bias, T* y,
              const Problem& p, cudaStream_t stream) {
    const auto with_tiles = [&](auto groups) {
        constexpr int kGroups = decltype(groups)::value;
        if (p.m <= 8) return launch<T, 1, kGroups>(x, qweight, scale, zero, bias, y, p, stream);
        if (p.m <= 16) return launch<T, 2, kGroups>(x, qweight, scale, zero, bias, y, p, stream);
        if (p.m <= 32) return launch<T, 4, kGroups>(x, qweight, scale, zero, bias, y, p, stream);
        return launch<T, 8, kGroups>(x, qweight, scale, zero, bias, y, p, stream);
    };
    if (p.group_shift == 5) {
        with_tiles(std::integral_constant<int, 2>{});
    } else {
        with_tiles(std::integral_constant<int, 1>{});
    }
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
