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

// `batch * kv_heads * chunks` independent problems, each split over `splits` blocks: a grid of splits *
// chunks, kv_heads, batch, so that blocks need no divisions to find their problem. Blocks of one problem are
// neighbours, then its chunks: what they share stays in L2.
struct Plan {
  int32_t batch, kv_heads;
  int32_t group;            // query heads of a KV head
  int32_t chunks;           // of a group
  int32_t heads_per_chunk;  // at most
  int32_t splits;
  bool clustered;  // the splits of a problem are a cluster, and merge without a second kernel
};

// What a block works on.
struct Place {
  int64_t b;
  int32_t kv_head, first_head, heads, split;  // query heads first_head .. first_head + heads - 1

  __device__ __forceinline__ explicit Place(const Plan& plan) : b(blockIdx.z), kv_head(blockIdx.y) {
    int chunk = 0;
    split = blockIdx.x;
    if (plan.chunks > 1) chunk = split / plan.splits, split %= plan.splits;
    first_head = kv_head * plan.group + chunk * plan.heads_per_chunk;
    heads = min(plan.heads_per_chunk, plan.group - chunk * plan.heads_per_chunk);
  }
};

}  // namespace mustafar::cuda
