// linear_w4a16 for few tokens: y [M, N] = x [M, K] w_hat^T + bias, with w_hat = (code - zero) * scale.
//
// The problem is transposed: the weight is the A operand (64 rows of a strip = 4 warps x m16), the tokens are the B
// operand (n8 tiles), so that no tensor-core row is wasted on missing tokens and the packed weight is loaded straight
// into fragments.
//
//                      K of this block ->                 cluster along K: up to 8 blocks, each its own range
//   strip   warp 0   [pair][pair][pair] ...               a pair is 2 units, 128 columns; warps 0-3 take even pairs,
//   64 rows warp 1      |                                 warps 4-7 odd ones
//           warp 2    2 x 16 bytes a thread = 8 A fragments
//           warp 3
//
// Per group the tensor cores add up integers times 16-bit values, and the fp32 sum is multiplied by the scale: the
// weight is never rounded to 16 bits. For up to 16 tokens the integers are base + code as they come out of the bit
// trick (base 128 in bf16, 1024 in fp16), and (base + zero) * sum(x) is taken away per group; the sums of x are made
// once a block, while x is staged. Above 16 tokens base + zero is subtracted from each weight.
//
// Partial sums of the warps meet in shared memory, those of the blocks of a cluster through distributed shared memory
// in a fixed order: one launch, no workspace, no atomics, the same bits every time, on any stream and in any graph.
//
// Bound by memory: 0.516 bytes a weight at group 128. Each thread copies its own 32 bytes of the next pairs ahead into
// its own slots of shared memory (cp.async), so that 32 KB a block are on their way without holding registers. The
// launch is programmatic (sm_90): weights start streaming while the kernel before still runs, and x is read only after
// it has ended. That is right because weights are never written by a kernel that lets its successor start early.
// Below sm_90 there are no clusters: the cluster is one block (right, but slow when N is small).
//
// Tried and lost: weights in registers two chunks deep (80 to 212 registers, 2 blocks a multiprocessor); sums of x by a
// product with a matrix of ones in every warp (as many tensor instructions again); one unit a step (86 instructions for
// 32 weights a thread instead of about 50).
#include <algorithm>

#include "dequant.cuh"
#include "launch.cuh"
#include "ops.h"

namespace pyquant {
namespace {

constexpr int kHalves = 2;                        // groups of 4 warps
constexpr int kThreads = kHalves * kUnitThreads;  // 256
constexpr int kPairK = 2 * kUnitK;                // 128 columns: what a half takes at a time
constexpr int kDepth = 4;                         // pairs on their way for each half: 32 KB of weights a block
constexpr int kRowPad = 8;                        // elements between staged rows: ldmatrix without bank conflicts

struct Problem {
    int64_t x_stride;
    int m, n, k, units, pairs, groups;  // units = padded K / 64, pairs of them (the last may be half), groups as stored
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
    static constexpr int kPairs = TILES == 1 ? 8 : 4;       // pairs of x staged at once when all kM rows are used
    static constexpr int kRow = kPairs * kPairK + kRowPad;  // elements from one staged row to the next
    static constexpr bool kSumX = TILES <= 2;               // correct by sums of x instead of subtracting per weight
    static constexpr int kBlocks = TILES == 1 ? 4 : TILES == 2 ? 3 : 2;  // a multiprocessor
};

// Shared memory. GROUPS: groups of scales that a pair touches, 4 at group size 32, 2 at 64, else 1.
template <typename T, int TILES, int GROUPS>
struct Shared {
    // A thread's own slots for weights and scales on their way: nobody else reads them, so no barrier guards them.
    uint4 weight[kDepth][2][kThreads];
    uint32_t scale[kDepth][GROUPS][kThreads];                       // the scales of rows g and g + 8
    T x[Shape<TILES>::kM * Shape<TILES>::kRow];                     // [rows][row], see Window
    float sum_x[Shape<TILES>::kPairs * GROUPS * Shape<TILES>::kM];  // [pair][group][rows]
};

// How the memory for x is used: the fewer tokens, the more columns of each fit, and the fewer barriers a block needs.
template <int TILES>
struct Window {
    int rows, pairs, row;  // tokens kept apart, pairs of columns at once, elements from one token to the next
    int log_pieces;        // log2 of a token's 16-byte pieces

    __device__ explicit Window(int live) {
        rows = TILES > 1 || live > 4 ? Shape<TILES>::kM : live > 2 ? 4 : 2;
        pairs = Shape<TILES>::kPairs * Shape<TILES>::kM / rows;
        row = pairs * kPairK + kRowPad;
        log_pieces = 31 - __clz(pairs * kPairK / 8);
    }
};

// Bring columns [first, first + columns) of x to shared memory, and their sums over each group.
template <typename T, int TILES, int GROUPS>
__device__ __forceinline__ void stage_x(Shared<T, TILES, GROUPS>& shared, const T* __restrict__ x, const Problem& p,
                                        Window<TILES> window, int first_m, int live, int first, int columns,
                                        bool vectors) {
    using S = Shape<TILES>;
    constexpr int kPerGroup = kPairK / GROUPS / 8;  // neighbouring lanes that hold one group
    for (int i = threadIdx.x; i / 32 * 32 < live << window.log_pieces;
         i += kThreads) {  // whole warps, for the shuffles
        const int row = i >> window.log_pieces, col = (i & ((1 << window.log_pieces) - 1)) * 8;
        const bool wanted = row < live && col < columns;
        uint4 piece = make_uint4(0, 0, 0, 0);
        if (wanted) {
            piece = load_x(x, p, first_m + row, first + col, vectors);
            *reinterpret_cast<uint4*>(&shared.x[row * window.row + col]) = piece;
        }
        if constexpr (S::kSumX) {
            const uint32_t two[4] = {piece.x, piece.y, piece.z, piece.w};
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; ++j) sum += Magic<T>::low(two[j]) + Magic<T>::high(two[j]);
#pragma unroll
            for (int lane = kPerGroup / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffff, sum, lane);
            if (wanted && threadIdx.x % kPerGroup == 0) {
                shared.sum_x[col / (kPairK / GROUPS) * window.rows + row] = sum;
            }
        }
    }
}

template <typename T, int TILES, int GROUPS, bool PER_CHANNEL, bool ZERO>
__global__ void __launch_bounds__(kThreads, Shape<TILES>::kBlocks)
    decode_kernel(const T* __restrict__ x, const uint4* __restrict__ qweight, const T* __restrict__ scale,
                  const uint8_t* __restrict__ zero, const T* __restrict__ bias, T* __restrict__ y, Problem p,
                  int log_splits, bool vectors) {
    using S = Shape<TILES>;
    extern __shared__ __align__(16) unsigned char memory[];
    auto& shared = *reinterpret_cast<Shared<T, TILES, GROUPS>*>(memory);
    float* sums = reinterpret_cast<float*>(memory);  // [kM][kStrip + 1], once the weights are used up

    const int thread = threadIdx.x, half = thread / kUnitThreads, warp = thread % kUnitThreads / 32, lane = thread % 32;
    const int g = lane / 4, c = lane % 4;
    const int splits = 1 << log_splits, split = blockIdx.x & (splits - 1), strip = blockIdx.x >> log_splits;
    const int first_m = blockIdx.y * S::kM, live = min(p.m - first_m, S::kM);
    const int share = (p.pairs + splits - 1) >> log_splits;
    const int begin = min(split * share, p.pairs), end = min(begin + share, p.pairs);
    ptx::launch_dependents();

    // Where this thread's two rows sit in group 0 of the strip; a group further is kStrip further.
    const int64_t first_pair = static_cast<int64_t>(strip) * p.groups * kStrip + 2 * (8 * warp + g);
    const auto group_at = [&](int pair, int group) { return PER_CHANNEL ? 0 : (pair * GROUPS + group) * kStrip; };

    int ahead = begin + half, slot = 0;  // the next pair to fetch, and the slot of the pair at hand
    const uint4* weight =
        qweight + (static_cast<int64_t>(strip) * p.units + 2 * ahead) * kUnitThreads + thread % kUnitThreads;
    const auto fetch = [&](int to) {
        if (ahead < end) {
            ptx::copy_async<16>(&shared.weight[to][0][thread], weight);
            if (2 * ahead + 1 < p.units) ptx::copy_async<16>(&shared.weight[to][1][thread], weight + kUnitThreads);
#pragma unroll
            for (int i = 0; i < GROUPS; ++i) {
                if (GROUPS == 1 || ahead * GROUPS + i < p.groups) {
                    ptx::copy_async<4>(&shared.scale[to][i][thread], scale + first_pair + group_at(ahead, i));
                } else {
                    shared.scale[to][i][thread] = 0;  // x is 0 there, but what lies in the slot may be NaN
                }
            }
        }
        ptx::copy_async_commit();
        ahead += kHalves;
        weight += kHalves * 2 * kUnitThreads;
    };
#pragma unroll
    for (int i = 0; i < kDepth; ++i) fetch(i);
    ptx::wait_for_predecessor();  // x and y may be another kernel's until here

    const Window<TILES> window(live);
    const int sum_token =
        2 * c < window.rows ? 2 * c : 0;  // tokens past the last have no sums; their columns are not read
    float total[TILES][4] = {};
    for (int chunk = begin; chunk < end; chunk += window.pairs) {
        const int chunk_end = min(chunk + window.pairs, end);
        __syncthreads();
        stage_x<T, TILES, GROUPS>(shared, x, p, window, first_m, live, chunk * kPairK, (chunk_end - chunk) * kPairK,
                                  vectors);
        __syncthreads();
        const T* tile = &shared.x[min(lane % 8, window.rows - 1) * window.row + half * kPairK + lane / 8 * 8];
        for (int pair = chunk + half; pair < chunk_end; pair += kHalves, tile += kHalves * kPairK) {
            ptx::copy_async_wait<kDepth - 1>();
            float part[TILES][4] = {};
#pragma unroll
            for (int j = 0; j < 4; ++j) {  // 32 columns: one ldmatrix gives the B fragments of two k16 steps
                const int group = j * GROUPS / 4;
                int z[2] = {kSymmetricZero, kSymmetricZero};
                if (ZERO && (GROUPS == 1 || pair * GROUPS + group < p.groups)) {
                    const auto two = *reinterpret_cast<const uchar2*>(zero + first_pair + group_at(pair, group));
                    z[0] = two.x;
                    z[1] = two.y;
                }
                const uint2 words = reinterpret_cast<const uint2*>(&shared.weight[slot][j / 2][thread])[j % 2];
                uint32_t a[2][4];
                if constexpr (S::kSumX) {
                    word_to_magic<T>(a[0], words.x);
                    word_to_magic<T>(a[1], words.y);
                } else {
                    const uint32_t offset[2] = {offset2<T>(z[0]), offset2<T>(z[1])};
                    word_to_fragment<T>(a[0], words.x, offset);
                    word_to_fragment<T>(a[1], words.y, offset);
                }
#pragma unroll
                for (int t = 0; t < TILES; ++t) {
                    uint32_t b[4];
                    ptx::ldmatrix_x4(b, tile + 8 * t * window.row + 32 * j);
                    ptx::mma_m16n8k16(part[t], a[0], {b[0], b[1]}, T{});
                    ptx::mma_m16n8k16(part[t], a[1], {b[2], b[3]}, T{});
                }
                if ((j + 1) * GROUPS % 4 == 0) {  // the last columns of a group
                    const uint32_t two = shared.scale[slot][group][thread];
                    const float s[2] = {Magic<T>::low(two), Magic<T>::high(two)};
#pragma unroll
                    for (int t = 0; t < TILES; ++t) {
                        float2 sum_x = make_float2(0.0f, 0.0f);
                        if constexpr (S::kSumX) {
                            const int at = ((pair - chunk) * GROUPS + group) * window.rows + 8 * t + sum_token;
                            sum_x = *reinterpret_cast<const float2*>(&shared.sum_x[at]);
                        }
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            float value = part[t][e];
                            if constexpr (S::kSumX) {
                                value -= (Magic<T>::kBase + z[e / 2]) * (e % 2 ? sum_x.y : sum_x.x);
                            }
                            total[t][e] += s[e / 2] * value;
                            part[t][e] = 0.0f;
                        }
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

// log2 of the blocks along K for one strip: the fewest that give each multiprocessor about two blocks, and twice as
// many where four fit and each still has a dozen pairs. More blocks hide latency; fewer leave room for the next kernel
// of the stream to bring its weights in meanwhile. benchmarks/NOTES.md has the sweep.
int choose_log_splits(int64_t strips, int64_t pairs, int multiprocessors, int major) {
    if (major < 9) return 0;
    const auto pairs_of = [&](int log) { return pairs >> log; };
    int log = 0;
    while (log < 3 && (strips << log) * 10 < 19 * multiprocessors && pairs_of(log + 1) >= 2) ++log;
    const bool room = (strips << log) * 2 <= 4 * multiprocessors;
    if (log < 3 && ((room && pairs_of(log) >= 24) || pairs_of(log) >= 64)) ++log;
    return log;
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

template <typename T, int TILES, int GROUPS, bool PER_CHANNEL, bool ZERO>
void launch(const T* x, const int32_t* qweight, const T* scale, const uint8_t* zero, const T* bias, T* y,
            const Problem& p, cudaStream_t stream) {
    constexpr int M = Shape<TILES>::kM;
    const auto kernel = decode_kernel<T, TILES, GROUPS, PER_CHANNEL, ZERO>;
    constexpr size_t bytes = sizeof(Shared<T, TILES, GROUPS>);
    static_assert(bytes >= sizeof(float) * M * (kStrip + 1), "the sums reuse it");
    // Asked for at every launch: the attribute belongs to a device, and setting it again costs less than remembering
    // where it is set.
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
               "linear_w4a16: shared memory");
    const Device device = current_device();
    const int64_t strips = ceil_div(p.n, kStrip);
    const int log_splits = choose_log_splits(strips, p.pairs, device.multiprocessors, device.major),
              splits = 1 << log_splits;
    const int64_t row_tiles = ceil_div(p.m, M);
    require(row_tiles <= 65535, "linear_w4a16: M=" + std::to_string(p.m) + " is too large for one launch");

    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(strips * splits), static_cast<unsigned>(row_tiles));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    cudaLaunchAttribute attributes[2]{};
    config.attrs = attributes;
    if (splits > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim.x = splits;
        attributes[config.numAttrs].val.clusterDim.y = attributes[config.numAttrs].val.clusterDim.z = 1;
        ++config.numAttrs;
    }
    if (device.major >= 9) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
        ++config.numAttrs;
    }
    const bool vectors = p.k % 8 == 0 && p.x_stride % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
    check_cuda(cudaLaunchKernelEx(&config, kernel, x, reinterpret_cast<const uint4*>(qweight), scale, zero, bias, y, p,
                                  log_splits, vectors),
               "linear_w4a16");
}

template <typename T>
void dispatch(const T* x, const int32_t* qweight, const T* scale, const uint8_t* zero, const T* bias, T* y,
              const Problem& p, int64_t group_size, cudaStream_t stream) {
    const auto with_tiles = [&](auto groups, auto per_channel, auto zeros) {
        constexpr int kGroups = decltype(groups)::value;
        constexpr bool kPerChannel = decltype(per_channel)::value, kZero = decltype(zeros)::value;
        const auto run = [&](auto tiles) {
            launch<T, decltype(tiles)::value, kGroups, kPerChannel, kZero>(x, qweight, scale, zero, bias, y, p, stream);
        };
        if (p.m <= 8) return run(std::integral_constant<int, 1>{});
        if (p.m <= 16) return run(std::integral_constant<int, 2>{});
        if (p.m <= 32) return run(std::integral_constant<int, 4>{});
        return run(std::integral_constant<int, 8>{});
    };
    const auto with_groups = [&](auto zeros) {
        using No = std::false_type;
        switch (group_size) {
            case 32:
                return with_tiles(std::integral_constant<int, 4>{}, No{}, zeros);
            case 64:
                return with_tiles(std::integral_constant<int, 2>{}, No{}, zeros);
            case 128:
                return with_tiles(std::integral_constant<int, 1>{}, No{}, zeros);
            default:
                return with_tiles(std::integral_constant<int, 1>{}, std::true_type{}, zeros);
        }
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
    const int units = static_cast<int>(ceil_div(k, kUnitK));
    const Problem p{x_stride,
                    static_cast<int>(m),
                    static_cast<int>(n),
                    static_cast<int>(k),
                    units,
                    (units + 1) / 2,
                    static_cast<int>(tiled_groups(k, group_size))};
    const auto run = [&](auto type) {
        using T = decltype(type);
        dispatch<T>(static_cast<const T*>(x), qweight, static_cast<const T*>(scale), zero, static_cast<const T*>(bias),
                    static_cast<T*>(y), p, group_size, stream);
    };
    dtype == 0 ? run(__nv_bfloat16{}) : run(__half{});
}

}  // namespace pyquant
