// The dense tile of a slice in shared memory, and the tensor-core product with it: "load compressed, compute
// dense". A warp owns its tile, so nothing here synchronises more than a warp.
//
// Layout: one row of 128 bytes a channel, [channel][32 words]; word l holds token l (low half) and token l +
// 32 (high half). Lane l scatters its two tokens' values into column l, so the bank of a store depends on the
// lane alone and no scatter ever conflicts, whatever the channels are. The reading side pays for it: rows are
// 128 bytes apart, so a plain fragment load would be an 8-way conflict, and the product below reads skewed.
#pragma once

#include <cstdint>

#include "half.cuh"
#include "rows.cuh"
#include "shared.cuh"

namespace mustafar::cuda {

constexpr int kTilePitch = kWarpSize * 4;  // bytes a channel
constexpr int kMmaRows = 16, kMmaDepth = 16, kMmaColumns = 8;

__host__ __device__ constexpr int tile_bytes(int channels) { return table_bytes(channels, kTilePitch); }

// Lane l's column of the tile whose channel 0 is at `tile`.
__device__ __forceinline__ uint32_t tile_column(uint32_t tile, int lane) { return tile + lane * 4; }

// Stores one value: the visit of a walk over tile_column(), with the two rows 2 bytes apart.
struct Scatter {
  __device__ __forceinline__ void operator()(int /*row*/, uint32_t address, uint32_t pair, bool high) const {
    store16(address, high ? pair >> 16 : pair);
  }
};
template <int kWords>
using TileWalk = Walk<kWords, kTilePitch, 2>;

// Stores 8 channels of a lane's two tokens, from the column of the first.
__device__ __forceinline__ void store_column(uint32_t column, const uint4& first, const uint4& second) {
  const uint32_t a[4] = {first.x, first.y, first.z, first.w}, b[4] = {second.x, second.y, second.z, second.w};
#pragma unroll
  for (int i = 0; i < kVectorValues; ++i)
    store32(column + i * kTilePitch, __byte_perm(a[i / 2], b[i / 2], i % 2 == 0 ? 0x5410 : 0x7632));
}

// Weights of a slice: for each head 32 words, the weights of tokens l and l + 32, in the order in which
// ValueProduct loads them, and once more with neighbours swapped. Odd heads have the two vectors of 16 bytes
// of each thread the other way round, so that two heads' rows lie on different banks.
constexpr int kWeightsPitch = 2 * 128;
__host__ __device__ constexpr int weights_bytes(int heads) { return heads * kWeightsPitch; }
// Where lane l's word lies in the first copy. Thread q loads words (4q, 4q + 16, 4q + 1, 4q + 17) as one
// vector and (4q + 2, 4q + 18, 4q + 3, 4q + 19) as the next.
__device__ __forceinline__ uint32_t weight_column(int lane) {
  return (lane % 16 / 4 * 8 + lane % 4 / 2 * 4 + lane % 2 * 2 + lane / 16) * 4;
}
__device__ __forceinline__ void store_weight(uint32_t weights, int head, uint32_t pair, int lane) {
  const uint32_t row = weights + head * kWeightsPitch, column = weight_column(lane) ^ (head % 2 * 16);
  store32(row + column, pair);
  store32(row + 128 + (column ^ 4), pair);
}

// sum[head][channel] += over the slice's tokens of weights[head][token] * tile[channel][token].
//
// mma rows are heads, columns are channels, and the depth runs over tokens, two per tile word. Thread
// (g = lane / 4, q = lane % 4) must feed channel g with the words of q. It loads 16 bytes, words 4q..4q+3 of
// one half of the row; to avoid conflicts odd channels load the upper half of the row when even channels load
// the lower. So odd channels see the tokens in another order than even ones. Instead of swapping registers,
// the weights come in both orders: rows 0-7 of the mma are the heads in the order of even channels, rows 8-15
// the same heads in the order of odd channels, and each channel keeps the rows that fit it.
template <class T, int kChannels, int kHeads>
struct ValueProduct {
  static constexpr int kBlocks = kChannels / kMmaColumns;
  float sum[kBlocks][4];  // of head g: [0] channel 8 block + 2q, [3] the next; [1] and [2] mean nothing

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[block][i] = 0.f;
  }

  // The head whose sums this thread holds, if there are as many.
  static __device__ __forceinline__ int head(int lane) { return lane / 4; }

  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) sum[block][0] *= factor, sum[block][3] *= factor;
  }

  // Leaves the tile all zeros. The caller puts a __syncwarp() before and after.
  __device__ __forceinline__ void add(uint32_t tile, uint32_t weights, int head_dim, int lane) {
    const int g = lane / 4, q = lane % 4;
    // Operand a of the four steps, each the four registers in a row that the mma wants: even channels' words
    // (lower half of the row first) in [0] and [2], odd channels' (upper half first) in [1] and [3].
    uint32_t a[4][4];
#pragma unroll
    for (int step = 0; step < 4; ++step)
      load(weights + g % kHeads * kWeightsPitch + step / 2 * 128 + q * 32 + (step % 2 ^ g % kHeads % 2) * 16,
           a[step]);
    const uint32_t first_half = tile + g * kTilePitch + g % 2 * 64 + q * 16;
    const uint32_t second_half = tile + g * kTilePitch + (1 - g % 2) * 64 + q * 16;
    constexpr int kAtOnce =
        kChannels == 256 ? 2 : 4;  // blocks whose products are independent: hides the latency of the mma
#pragma unroll
    for (int block = 0; block < kBlocks; block += kAtOnce) {
      if (block * kMmaColumns >= head_dim) break;
      uint32_t x[kAtOnce][4], y[kAtOnce][4];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const uint32_t row = (block + j) * kMmaColumns * kTilePitch;
        load(first_half + row, x[j]);
        load(second_half + row, y[j]);
        store_zeros(first_half + row);
        store_zeros(second_half + row);
      }
#pragma unroll
      for (int step = 0; step < 4; ++step)
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const uint32_t (&words)[4] = step < 2 ? x[j] : y[j];
          Half<T>::mma(sum[block + j], a[step][0], a[step][1], a[step][2], a[step][3], words[step % 2 * 2],
                       words[step % 2 * 2 + 1]);
        }
    }
  }

  // out[head][kChannels]
  __device__ __forceinline__ void store(float* out, int lane) const {
    const int g = lane / 4, q = lane % 4;
    if (g >= kHeads) return;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      out[g * kChannels + block * kMmaColumns + 2 * q] = sum[block][0];
      out[g * kChannels + block * kMmaColumns + 2 * q + 1] = sum[block][3];
    }
  }
};

}  // namespace mustafar::cuda
