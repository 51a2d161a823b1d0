// Blocks that run at the same time and write to each other's shared memory: thread block clusters, from sm_90
// on.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace mustafar::cuda {

constexpr int kPortableClusterBlocks = 8, kMostClusterBlocks = 16;  // 16 are what an H100 and an H200 take

__device__ __forceinline__ int floor_log2(int x) { return 31 - __clz(x); }

// A barrier of all threads of the cluster, in two halves. It orders nothing in memory: after the second,
// other blocks have passed the first.
__device__ __forceinline__ void arrive_at_cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_at_cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// An mbarrier in the shared memory of a block (8 bytes), over which the blocks of its cluster send it data:
// it waits for them, and nobody else does, where a barrier of the cluster waits until everybody's stores are
// seen everywhere.
struct Mailbox {
  const uint32_t barrier;

  // By one thread, before an arrival at a barrier of the cluster: so many bytes will come.
  __device__ __forceinline__ void open(int bytes) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
#endif
  }
  // After that barrier: floats to `address` of shared memory, but of block `rank`, whose mailbox is where
  // this block's is. At a multiple of 16 bytes, or of 8 or 4 where they come to no more.
  template <int kCount>
  __device__ __forceinline__ void send(uint32_t address, int rank, const float (&x)[kCount]) const {
#if __CUDA_ARCH__ >= 900
    uint32_t there, box;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(box) : "r"(barrier), "r"(rank));
    constexpr int kAtOnce = kCount % 4 == 0 ? 4 : kCount % 2 == 0 ? 2 : 1;
#pragma unroll
    for (int i = 0; i < kCount; i += kAtOnce) {
      const uint32_t to = there + i * 4;
      if constexpr (kAtOnce == 4)
        asm volatile(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];" ::
                "r"(to),
            "r"(box), "f"(x[i]), "f"(x[i + 1]), "f"(x[i + 2]), "f"(x[i + 3])
            : "memory");
      else if constexpr (kAtOnce == 2)
        asm volatile(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%2, %3}, [%1];" ::"r"(to),
            "r"(box), "f"(x[i]), "f"(x[i + 1])
            : "memory");
      else
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %2, [%1];" ::"r"(to),
                     "r"(box), "f"(x[i])
                     : "memory");
    }
#endif
  }
  // Until all of the bytes are here, for this thread to read. No block may end before: others write to it.
  __device__ __forceinline__ void wait() const {
#if __CUDA_ARCH__ >= 900
    uint32_t done = 0;
    while (!done)
      asm volatile(
          "{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0; selp.u32 %0, "
          "1, 0, p;}"
          : "=r"(done)
          : "r"(barrier)
          : "memory");
#endif
  }
};

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
