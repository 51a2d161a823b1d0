// Putting together what warps, and then the splits of a problem, have summed up. Sums are float
// [kChannels][kHeads]: a thread takes a channel, all heads at once.
#pragma once

#include <cfloat>
#include <cstdint>

#include "cluster.cuh"
#include "half.cuh"
#include "rows.cuh"
#include "shared.cuh"

namespace mustafar::cuda {

// Softmax over part of the tokens: sums of exp2(score - maximum), and the output's sums belong to it.
struct Partial {
  float maximum, sum;
};
constexpr float kNoMaximum = -FLT_MAX;  // yet: finite, so that a score of -inf less the maximum is -inf

// From shared memory.
__device__ __forceinline__ Partial load_partial(uint32_t address) {
  float x[2];
  load_floats(address, x);
  return {x[0], x[1]};
}

// Factor that brings sums relative to `from` to those relative to `to`.
__device__ __forceinline__ float rescale(float from, float to) {
  return from == to ? 1.f : exp2_fast(from - to);
}

// The sum and the weights of one output over the splits: partial(s) is a Partial, sum(s) a float. In order.
template <class PartialOf, class SumOf>
__device__ __forceinline__ float2 merge_splits(int splits, const PartialOf& partial, const SumOf& sum) {
  float maximum = kNoMaximum;
#pragma unroll 4
  for (int s = 0; s < splits; ++s) maximum = fmaxf(maximum, partial(s).maximum);
  float2 merged{0.f, 0.f};
#pragma unroll 4
  for (int s = 0; s < splits; ++s) {
    const Partial of_split = partial(s);
    const float factor = rescale(of_split.maximum, maximum);
    merged.x += sum(s) * factor;
    merged.y += of_split.sum * factor;
  }
  return merged;
}

// The warps of a block, each with its sums at of_warps + warp * kWarpBytes and, kPartialsAt further, a
// Partial of every head. `memory` is kBytes of shared memory. Short code: it comes from memory once a block.
template <int kHeads, int kWarpBytes, int kPartialsAt>
struct WarpMerge {
  static constexpr int kMostWarps = 16;
  static constexpr int kFactorBytes = kMostWarps * kHeads * 4, kBytes = kFactorBytes + kHeads * 8;
  const uint32_t of_warps, memory;
  const int warps;

  // By the whole block, between barriers: the Partial of the block, and the factor of each warp's sums, so
  // that they add up to the block's, or with `divide` to those divided by its weights. A lane has a warp.
  __device__ __forceinline__ void find_factors(bool divide) const {
    // Not the caller's lane and warp: what lives through the walks takes a register from them.
    const int lane = threadIdx.x % kWarpSize;
    for (int head = threadIdx.x / kWarpSize; head < kHeads; head += warps) {
      const Partial own = lane < warps ? load_partial(of_warps + lane * kWarpBytes + kPartialsAt + head * 8)
                                       : Partial{kNoMaximum, 0.f};
      float maximum = own.maximum;
#pragma unroll
      for (int distance = kMostWarps / 2; distance > 0; distance /= 2)
        maximum = fmaxf(maximum, __shfl_xor_sync(kFullWarp, maximum, distance));
      const float factor = rescale(own.maximum, maximum);
      float sum = own.sum * factor;
#pragma unroll
      for (int distance = kMostWarps / 2; distance > 0; distance /= 2)
        sum += __shfl_xor_sync(kFullWarp, sum, distance);
      if (lane < warps)
        store32(memory + (lane * kHeads + head) * 4,
                __float_as_uint(divide ? __fdividef(factor, sum) : factor));
      if (lane == 0)
        store(memory + kFactorBytes + head * 8, {__float_as_uint(maximum), __float_as_uint(sum)});
    }
  }
  __device__ __forceinline__ Partial partial(int head) const {
    return load_partial(memory + kFactorBytes + head * 8);
  }
  __device__ __forceinline__ void add(int channel, float (&sums)[kHeads]) const {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) sums[h] = 0.f;
#pragma unroll 4
    for (int w = 0; w < warps; ++w) {
      float of_warp[kHeads], factor[kHeads];
      load_floats(of_warps + w * kWarpBytes + channel * kHeads * 4, of_warp);
      load_floats(memory + w * kHeads * 4, factor);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) sums[h] += of_warp[h] * factor[h];
    }
  }
};

// What the splits of a problem, a cluster, send each other: block r of them gets the channels from r * share
// on from all; the share is a power of two, so that the last blocks may get none. `memory` is kBytes that no
// block uses for anything else from open() until it is done.
template <int kChannels, int kHeads>
struct Exchange {
  static constexpr int kRowBytes = kHeads * 4;
  static constexpr int kPartialsAt = 2 * kChannels * kRowBytes;
  static constexpr int kMailboxAt = kPartialsAt + kMostClusterBlocks * kHeads * 8;
  static constexpr int kBytes = kMailboxAt + 16;
  const uint32_t memory;
  const int splits, self, log2_share, share;

  __device__ __forceinline__ Exchange(uint32_t memory_, int splits_, int self_)
      : memory(memory_),
        splits(splits_),
        self(self_),
        log2_share(floor_log2(kChannels) - floor_log2(splits_)),
        share(1 << log2_share) {}

  // By the whole block, after a barrier. `partials`: these are sent, too.
  __device__ __forceinline__ void open(bool partials) const {
    const int channels = max(0, min(share, kChannels - self * share));
    if (threadIdx.x == 0) mailbox().open(splits * (channels * kRowBytes + (partials ? kHeads * 8 : 0)));
    arrive_at_cluster_barrier();
  }
  // Until the others have opened theirs.
  static __device__ __forceinline__ void wait_open() { wait_at_cluster_barrier(); }

  __device__ __forceinline__ void send(int channel, const float (&sums)[kHeads]) const {
    mailbox().send(memory + (self * share + (channel & (share - 1))) * kRowBytes, channel >> log2_share,
                   sums);
  }
  __device__ __forceinline__ void send_partial(int to, int head, const Partial& partial) const {
    const float of_head[2] = {partial.maximum, partial.sum};
    mailbox().send(memory + kPartialsAt + (self * kHeads + head) * 8, to, of_head);
  }
  // Until everything is here.
  __device__ __forceinline__ void receive() const { mailbox().wait(); }

  // Then: what split `s` sent of channel `self * share + i`.
  __device__ __forceinline__ float sum(int s, int i, int head) const {
    float x[1];
    load_floats(memory + (s * share + i) * kRowBytes + head * 4, x);
    return x[0];
  }
  __device__ __forceinline__ Partial partial(int s, int head) const {
    return load_partial(memory + kPartialsAt + (s * kHeads + head) * 8);
  }

 private:
  __device__ __forceinline__ Mailbox mailbox() const { return {memory + kMailboxAt}; }
};

}  // namespace mustafar::cuda
