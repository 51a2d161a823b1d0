// Host side shared by the ops: which instantiation, how many blocks, and the checks of a launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../params.h"
#include "cluster.cuh"
#include "plan.cuh"
#include "rows.cuh"

namespace mustafar::cuda {

#define MUSTAFAR_CUDA_TRY(call)               \
  do {                                        \
    const cudaError_t error_ = (call);        \
    if (error_ != cudaSuccess) return error_; \
  } while (0)

// Blocks of a kernel whose work is dealt to teams of `team_warps` warps, with `fixed` bytes of shared memory
// and `per_team` for each team: as many teams as the current device has room for, on sm_86 and sm_89 within
// 99 KB.
struct Blocks {
  int device, teams, threads, shared_bytes, sms;
  int64_t resident;  // as many as shared memory lets be on the device at once
};

inline cudaError_t size_blocks(int fixed, int per_team, int most_teams, int team_warps, Blocks* blocks) {
  constexpr int kReservedBytes = 1024;  // of shared memory per block, taken by CUDA
  int block_bytes, sm_bytes;
  MUSTAFAR_CUDA_TRY(cudaGetDevice(&blocks->device));
  const int device = blocks->device;
  MUSTAFAR_CUDA_TRY(cudaDeviceGetAttribute(&blocks->sms, cudaDevAttrMultiProcessorCount, device));
  MUSTAFAR_CUDA_TRY(cudaDeviceGetAttribute(&block_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  MUSTAFAR_CUDA_TRY(cudaDeviceGetAttribute(&sm_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  blocks->teams = per_team == 0 ? most_teams : std::min((block_bytes - fixed) / per_team, most_teams);
  if (blocks->teams < 1) return cudaErrorInvalidConfiguration;
  blocks->threads = blocks->teams * team_warps * kWarpSize;
  blocks->shared_bytes = fixed + blocks->teams * per_team;
  blocks->resident = int64_t{blocks->sms} * std::max(1, sm_bytes / (blocks->shared_bytes + kReservedBytes));
  return cudaSuccess;
}

constexpr int kMaxSplits = 256;
// What a block costs beside its slices, in slices of one warp: tables, merging.
constexpr double kSplitOverhead = 3.;

// What make_plan() takes from kernels whose splits are no clusters, but combined by a second kernel.
struct NoClusters {
  static constexpr double kCombineOverhead = 0.;  // of the second kernel, in slices of one warp
  int64_t operator()(int /*splits*/) const { return 0; }
};

// And from those whose splits can be clusters: so many problems of the kernel the device holds at once. Any
// dtype stands for all.
template <auto kKernel>
struct KernelClusters {
  // At batch 1, 4k 8 splits in clusters took 0.0149 ms, 14 with a second kernel 0.0167.
  static constexpr double kCombineOverhead = 0.5;
  const Blocks& blocks;
  int64_t operator()(int splits) const {
    return resident_clusters<kKernel>(blocks.device, splits, blocks.threads, blocks.shared_bytes);
  }
};

// `heads` query heads share a pass. Splits every problem of `units` slices, dealt to the `warps` of each
// block, so that the blocks come in whole waves of `resident` blocks, or of clusters(splits) problems whose
// splits are clusters (0: none), at the least estimated time. 3 or 6 splits where 4 or 8 fill the GPU cost 30
// % (measured).
template <class Clusters = NoClusters>
Plan make_plan(int batch, int q_heads, int kv_heads, int heads, int64_t units, int64_t warps,
               int64_t resident, const Clusters& clusters = {}) {
  Plan plan;
  plan.batch = batch, plan.kv_heads = kv_heads;
  plan.group = q_heads / kv_heads;
  plan.chunks = (plan.group + heads - 1) / heads;
  plan.heads_per_chunk = (plan.group + plan.chunks - 1) / plan.chunks;
  const int64_t work = int64_t{batch} * kv_heads * plan.chunks;
  const int64_t most = std::clamp<int64_t>(units, 1, kMaxSplits);
  double best = INFINITY;
  const auto consider = [&](int64_t splits, bool clustered, int64_t waves, double more) {
    const int64_t of_block = (units + splits - 1) / splits, turns = (of_block + warps - 1) / warps;
    // Warps without work leave the SM to the others.
    const double time = waves * (kSplitOverhead + (turns > 1 ? turns : 0.5 + 0.5 * of_block / warps)) + more;
    if (time < best) best = time, plan.splits = static_cast<int32_t>(splits), plan.clustered = clustered;
  };
  for (int64_t splits = 1; splits <= most; ++splits) {
    consider(splits, false, (work * splits + resident - 1) / resident,
             splits > 1 ? Clusters::kCombineOverhead : 0.);
    const int64_t at_once =
        splits > 1 && splits <= kMostClusterBlocks ? clusters(static_cast<int>(splits)) : 0;
    if (at_once > 0) consider(splits, true, (work + at_once - 1) / at_once, 0.);
  }
  return plan;
}

// cudaFuncSetAttribute holds for the current device only, so it is not cached.
template <class... KernelArgs, class... Args>
cudaError_t launch(void (*kernel)(KernelArgs...), const Plan& plan, const Blocks& blocks, cudaStream_t stream,
                   const Args&... args) {
  const int64_t blocks_x = int64_t{plan.splits} * plan.chunks;
  if (plan.batch > kMaxGridSize || plan.kv_heads > kMaxGridSize || blocks_x > INT32_MAX)
    return cudaErrorInvalidValue;
  MUSTAFAR_CUDA_TRY(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, blocks.shared_bytes));
  const dim3 grid(static_cast<unsigned>(blocks_x), plan.kv_heads, plan.batch);
  if (plan.clustered) {
    if (plan.splits > kPortableClusterBlocks)
      MUSTAFAR_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    const ClusterLaunch clusters(grid, plan.splits, blocks.threads, blocks.shared_bytes, stream);
    return cudaLaunchKernelEx(&clusters.config, kernel, args...);
  }
  kernel<<<grid, blocks.threads, blocks.shared_bytes, stream>>>(args...);
  return cudaGetLastError();
}

// Launches a kernel that reads what the previous launch in the stream writes, after
// wait_for_previous_launch(). From sm_90 on its blocks are brought to the SMs while the previous launch,
// which says launch_next(), still runs.
template <class... KernelArgs, class... Args>
cudaError_t launch_after(void (*kernel)(KernelArgs...), int64_t blocks, int threads, cudaStream_t stream,
                         const Args&... args) {
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  int device, major;
  MUSTAFAR_CUDA_TRY(cudaGetDevice(&device));
  MUSTAFAR_CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}
__device__ __forceinline__ void launch_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

inline bool aligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Whether rows `stride` elements apart stay aligned to vectors; the stride of a single row does not matter.
inline bool aligned_stride(int64_t stride, int64_t size) { return size <= 1 || stride % kVectorValues == 0; }

inline cudaError_t check_view(const CompressedView& view, int batch, int kv_heads, int slices) {
  if (slices == 0) return cudaSuccess;
  if (slices < 0 || (view.offsets == nullptr) != (view.widths == nullptr)) return cudaErrorInvalidValue;
  if (view.width % kVectorValues != 0) return cudaErrorInvalidValue;
  const bool ok =
      aligned(view.bitmap, 16) && aligned(view.values, 16) &&
      aligned_stride(view.bitmap_batch_stride, batch) && aligned_stride(view.bitmap_head_stride, kv_heads) &&
      aligned_stride(view.values_batch_stride, batch) && aligned_stride(view.values_head_stride, kv_heads);
  return ok ? cudaSuccess : cudaErrorMisalignedAddress;
}

inline cudaError_t check_shape(int batch, int q_heads, int kv_heads, int head_dim, DType dtype) {
  const bool ok = batch > 0 && kv_heads > 0 && q_heads > 0 && q_heads % kv_heads == 0 && head_dim > 0 &&
                  head_dim <= kMaxHeadDim && head_dim % kVectorValues == 0 &&
                  (dtype == DType::kFloat16 || dtype == DType::kBFloat16);
  return ok ? cudaSuccess : cudaErrorInvalidValue;
}

// run(T(), std::integral_constant<int, channels>()) for the dtype and the head dim.
template <class Run>
cudaError_t dispatch(DType dtype, int head_dim, const Run& run) {
  const auto with = [&](auto element) {
    using T = decltype(element);
    switch (compiled_channels(head_dim)) {
      case 64:
        return run(element, std::integral_constant<int, 64>());
      case 128:
        return run(element, std::integral_constant<int, 128>());
      default:
        return run(element, std::integral_constant<int, 256>());
    }
  };
  return dtype == DType::kFloat16 ? with(__half()) : with(__nv_bfloat16());
}

// Heads of a pass that a kernel is compiled for.
constexpr int compiled_heads(int heads) {
  return heads <= 2 ? std::max(heads, 1) : heads <= 4 ? 4 : heads <= 6 ? 6 : 8;
}

// The same with the query heads of a pass, std::integral_constant 1, 2, 4, 6 or 8: at most
// MostHeads()(channels) of the group's.
template <class MostHeads, class Run>
cudaError_t dispatch_heads(DType dtype, int head_dim, int group, MostHeads, const Run& run) {
  return dispatch(dtype, head_dim, [&](auto element, auto channels) {
    constexpr int kMost = MostHeads()(decltype(channels)::value);
    const int chunks = (group + kMost - 1) / kMost;
    switch (compiled_heads((group + chunks - 1) / chunks)) {
      case 1:
        return run(element, channels, std::integral_constant<int, 1>());
      case 2:
        return run(element, channels, std::integral_constant<int, 2>());
      case 4:
        return run(element, channels, std::integral_constant<int, 4>());
      case 6:
        return run(element, channels, std::integral_constant<int, std::min(6, kMost)>());
      default:
        return run(element, channels, std::integral_constant<int, kMost>());
    }
  });
}

}  // namespace mustafar::cuda
