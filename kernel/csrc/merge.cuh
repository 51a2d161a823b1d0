// Putting together what warps, and then the splits of a problem, have summed up. Sums are float
// [kChannels][kHeads]: a thread takes a channel, all heads at once.
#pragma once

#include <cfloat>
#include <cstdint>

#include "cluster.cuh"
#include "half.cuh"
#include "shared.cuh"

namespace mustafar::cuda {

// Softmax over part of the tokens: sums of exp2(score - maximum), and the output's sums belong to it.
struct Partial {
  float maximum, sum;
};
constexpr float kNoMaximum = -FLT_MAX;  // yet: finite, so that a score of -inf less the maximum is -inf

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
// Partial of every head. `factors` is kFactorBytes of shared memory.
template <int kHeads, int kWarpBytes, int kPartialsAt>
struct WarpMerge {
  static constexpr int kMostWarps = 16;
  static constexpr int kFactorBytes = (2 * kMostWarps + 1) * kHeads * 4;
  const uint32_t of_warps, factors;
  const int warps;

  // By the whole block, between barriers.
  __device__ __forceinline__ void find_factors() const {
    const int head = threadIdx.x % kHeads, warp = threadIdx.x / kHeads;
    if (warp >= warps) return;
    float maximum = kNoMaximum;
#pragma unroll 4
    for (int w = 0; w < warps; ++w) maximum = fmaxf(maximum, partial(w, head).maximum);
    const Partial own = partial(warp, head);
    const float factor = rescale(own.maximum, maximum);
    store32(factors + (2 * warp * kHeads + head) * 4, __float_as_uint(factor));
    store32(factors + ((2 * warp + 1) * kHeads + head) * 4, __float_as_uint(own.sum * factor));
    if (warp == 0) store32(maxima() + head * 4, __float_as_uint(maximum));
  }
  // Sums of a channel and weights, relative to maximum().
  __device__ __forceinline__ void add(int channel, float (&sums)[kHeads], float (&weights)[kHeads]) const {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) sums[h] = weights[h] = 0.f;
#pragma unroll 4
    for (int w = 0; w < warps; ++w) {
      float of_warp[kHeads], factor[kHeads], weight[kHeads];
      load_floats(of_warps + w * kWarpBytes + channel * kHeads * 4, of_warp);
      load_floats(factors + 2 * w * kHeads * 4, factor);
      load_floats(factors + (2 * w + 1) * kHeads * 4, weight);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) sums[h] += of_warp[h] * factor[h], weights[h] += weight[h];
    }
  }
  __device__ __forceinline__ float maximum(int head) const {
    uint32_t bits;
    load(maxima() + head * 4, bits);
    return __uint_as_float(bits);
  }

 private:
  __device__ __forceinline__ uint32_t maxima() const { return factors + 2 * kMostWarps * kHeads * 4; }
  __device__ __forceinline__ Partial partial(int warp, int head) const {
    float of_warp[2];
    load_floats(of_warps + warp * kWarpBytes + kPartialsAt + head * 8, of_warp);
    return {of_warp[0], of_warp[1]};
  }
};

// What the splits of a problem, a cluster, send each other: block r of them gets the channels from r * share
// on from all. `memory` is kBytes that no block uses for anything else from the barrier before until it is
// done.
template <int kChannels, int kHeads>
struct Exchange {
  static constexpr int kRowBytes = kHeads * 4;
  static constexpr int kPartialsAt = (kChannels + kMostClusterBlocks) * kRowBytes;
  static constexpr int kBytes = kPartialsAt + kMostClusterBlocks * kHeads * 8;
  const uint32_t memory;
  const int splits, self, share;

  __device__ __forceinline__ Exchange(uint32_t memory_, int splits_, int self_)
      : memory(memory_), splits(splits_), self(self_), share((kChannels + splits_ - 1) / splits_) {}

  __device__ __forceinline__ void send(int channel, const float (&sums)[kHeads]) const {
    const int owner = channel / share;
    store_of_block(memory + (self * share + channel - owner * share) * kRowBytes, owner, sums);
  }
  __device__ __forceinline__ void send_partial(int to, int head, const Partial& partial) const {
    const float of_head[2] = {partial.maximum, partial.sum};
    store_of_block(memory + kPartialsAt + (self * kHeads + head) * 8, to, of_head);
  }

  // After another barrier: what split `s` sent of channel `self * share + i`.
  __device__ __forceinline__ float sum(int s, int i, int head) const {
    float x[1];
    load_floats(memory + (s * share + i) * kRowBytes + head * 4, x);
    return x[0];
  }
  __device__ __forceinline__ Partial partial(int s, int head) const {
    float of_head[2];
    load_floats(memory + kPartialsAt + (s * kHeads + head) * 8, of_head);
    return {of_head[0], of_head[1]};
  }
};

}  // namespace mustafar::cuda
