// How a launch is cut into blocks, and a block's way back to its problem.
#pragma once

#include <cstdint>

namespace mustafar::cuda {

// Kernels are compiled for 64, 128 and 256 channels; other head dims (multiples of 8) use the next larger
// one.
__host__ __device__ constexpr int compiled_channels(int head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
}
__host__ __device__ constexpr int bitmap_words(int head_dim) { return (head_dim + 63) / 64; }
__host__ __device__ constexpr int64_t slices_of(int64_t tokens) { return (tokens + 63) / 64; }

// `batch * kv_heads * chunks` independent problems, each split over `splits` blocks.
struct Plan {
  int32_t chunks;           // of the query heads of a KV head
  int32_t heads_per_chunk;  // at most
  int32_t splits;
  bool clustered;  // the splits of a problem are a cluster, and merge without a second kernel
  int64_t blocks;
};

// What block `index` works on. Blocks of one problem are neighbours, then its chunks: what they share stays
// in L2.
struct Place {
  int64_t b;
  int32_t kv_head, first_head, heads, split;  // query heads first_head .. first_head + heads - 1

  __device__ __forceinline__ Place(const Plan& plan, uint32_t index, uint32_t q_heads, uint32_t kv_heads) {
    const int group = q_heads / kv_heads;
    split = index % plan.splits;
    index /= plan.splits;
    const int chunk = index % plan.chunks;
    index /= plan.chunks;
    kv_head = index % kv_heads;
    b = index / kv_heads;
    first_head = kv_head * group + chunk * plan.heads_per_chunk;
    heads = min(plan.heads_per_chunk, group - chunk * plan.heads_per_chunk);
  }
};

}  // namespace mustafar::cuda
