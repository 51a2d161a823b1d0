// Blocks that run at the same time and write to each other's shared memory: thread block clusters, from sm_90
// on.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace mustafar::cuda {

constexpr int kPortableClusterBlocks = 8, kMostClusterBlocks = 16;  // 16 are what an H100 and an H200 take

__device__ __forceinline__ int floor_log2(int x) { return 31 - __clz(x); }

// A barrier of all threads of the cluster, in two halves: what they wrote to shared memory before the first
// can be read after the second.
__device__ __forceinline__ void arrive_at_cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
// The same where nothing written before is read after: what comes after is only not to come sooner. It does
// not wait until this thread's stores are seen.
__device__ __forceinline__ void arrive_relaxed_at_cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_at_cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_barrier() {
  arrive_at_cluster_barrier();
  wait_at_cluster_barrier();
}

// Stores floats at `address` of shared memory, but of block `rank` of the cluster: at a multiple of 16 bytes,
// or of 8 where they come to no more.
template <int kCount>
__device__ __forceinline__ void store_of_block(uint32_t address, int rank, const float (&x)[kCount]) {
#if __CUDA_ARCH__ >= 900
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  constexpr int kAtOnce = kCount % 4 == 0 ? 4 : kCount % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int i = 0; i < kCount; i += kAtOnce) {
    if constexpr (kAtOnce == 4)
      asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(there + i * 4), "f"(x[i]),
                   "f"(x[i + 1]), "f"(x[i + 2]), "f"(x[i + 3])
                   : "memory");
    else if constexpr (kAtOnce == 2)
      asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(there + i * 4), "f"(x[i]), "f"(x[i + 1])
                   : "memory");
    else
      asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there + i * 4), "f"(x[i]) : "memory");
  }
#endif
}

// What a launch in clusters of `blocks` needs.
struct ClusterLaunch {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  ClusterLaunch(dim3 grid, unsigned blocks, unsigned threads, size_t shared_bytes, cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {blocks, 1, 1};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
};

// So many clusters of `blocks` blocks of the kernel `device`, the current one, holds at once: none before
// sm_90, or where it does not take clusters of this size. `threads` and `shared_bytes` are always the same
// for a kernel and device: the answer takes some microseconds, and is kept.
template <auto kKernel>
int resident_clusters(int device, int blocks, int threads, int shared_bytes) {
  constexpr int kDevices = 16;
  static std::atomic<int32_t> known[kDevices][kMostClusterBlocks + 1];  // answers plus one
  int major;
  if (blocks > kMostClusterBlocks) return 0;
  std::atomic<int32_t>* const answer = device < kDevices ? &known[device][blocks] : nullptr;
  if (answer != nullptr && answer->load(std::memory_order_relaxed) > 0)
    return answer->load(std::memory_order_relaxed) - 1;
  int clusters = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      major >= 9) {
    const ClusterLaunch launch(dim3(blocks), blocks, threads, shared_bytes, nullptr);
    if (cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes) !=
            cudaSuccess ||
        cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess ||
        cudaOccupancyMaxActiveClusters(&clusters, kKernel, &launch.config) != cudaSuccess) {
      cudaGetLastError();  // a size that the device does not take is no error of the caller's
      clusters = 0;
    }
  }
  if (answer != nullptr) answer->store(clusters + 1, std::memory_order_relaxed);
  return clusters;
}

}  // namespace mustafar::cuda
