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

__host__ __device__ constexpr int tile_bytes(int channels) {
  return table_bytes(channels, kTilePitch, kFewSinkRows);
}

// Lane l's column of the tile whose channel 0 is at `tile`.
__device__ __forceinline__ uint32_t tile_column(uint32_t tile, int lane) { return tile + lane * 4; }

// Stores one value: the visit of a walk over tile_column(), with the two rows 2 bytes apart.
struct Scatter {
  static constexpr bool kSecondRowFirst = false;  // see Scores
  __device__ __forceinline__ void operator()(int /*row*/, uint32_t address, uint32_t pair, bool high) const {
    if (high)
      store_high16(address, pair);
    else
      store16(address, pair);
  }
};
template <int kWords>
using TileWalk = Walk<kWords, kTilePitch, 2, kFewSinkRows>;

// Weights of a slice: for each head 32 words, word l the weights of tokens l and l + 32. Rows are one and a
// half times as far apart, so that 16-byte loads from neighbouring heads lie on different banks.
constexpr int kWeightsPitch = 128 + 64;
__host__ __device__ constexpr int weights_bytes(int heads) { return heads * kWeightsPitch; }
__device__ __forceinline__ void store_weight(uint32_t weights, int head, uint32_t pair, int lane) {
  store32(weights + head * kWeightsPitch + lane * 4, pair);
}

// sum[head][channel] += over the slice's tokens of weights[head][token] * tile[channel][token].
//
// mma rows are channels, columns are heads, and the depth runs over tokens, two per tile word. Thread
// (g = lane / 4, q = lane % 4) must feed channels g and g + 8 of 16 with the words of q. It loads 16 bytes,
// words 4q..4q+3 of one half of the row; to avoid conflicts odd channels load the upper half of the row when
// even channels load the lower. So odd channels see the tokens in another order than even ones. Instead of
// swapping registers, the weights come in both orders: up to 4 heads are columns 0-3 of the mma in the order
// of even channels, and columns 4-7 in the order of odd ones; with 8 heads there is an mma for either. Each
// channel keeps the columns that fit it.
template <class T, int kChannels, int kHeads>
struct ValueProduct {
  static constexpr int kBlocks = kChannels / kMmaRows;
  static constexpr int kOrders = kHeads <= 4 ? 1 : 2;  // mma for each order
  static_assert(kHeads <= kMmaColumns);
  // Channels 16 block + g in [0] and [1], + 8 in [2] and [3]; columns 2q in [0] and [2], 2q + 1 in [1] and
  // [3].
  float sum[kBlocks][kOrders][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int order = 0; order < kOrders; ++order)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[block][order][i] = 0.f;
  }

  // The first of the two heads in this thread's columns.
  static __device__ __forceinline__ int head(int lane) { return kOrders == 1 ? lane % 2 * 2 : lane % 4 * 2; }

  __device__ __forceinline__ void scale(float first, float second) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int order = 0; order < kOrders; ++order)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[block][order][i] *= i % 2 == 0 ? first : second;
  }

  // Leaves the tile all zeros. The caller puts a __syncwarp() before and after.
  __device__ __forceinline__ void add(uint32_t tile, uint32_t weights, int lane) {
    const int g = lane / 4, q = lane % 4;
    // Operand b of the four steps: words 4q + i of the half of the row that comes first in this column's
    // order, and of the other half.
    uint32_t b[kOrders][2][4];
#pragma unroll
    for (int order = 0; order < kOrders; ++order) {
      const int upper_first = kOrders == 1 ? g / 4 : order, head = kOrders == 1 ? g % 4 : g;
      const uint32_t row = weights + head % kHeads * kWeightsPitch + q * 16;
      load(row + upper_first * 64, b[order][0]);
      load(row + (1 - upper_first) * 64, b[order][1]);
    }
    const uint32_t halves[2] = {tile + g * kTilePitch + g % 2 * 64 + q * 16,
                                tile + g * kTilePitch + (1 - g % 2) * 64 + q * 16};
    constexpr int kAtOnce = kChannels == 256 ? 2 : 4;  // loaded before the first mma waits
#pragma unroll
    for (int block = 0; block < kBlocks; block += kAtOnce) {
      uint32_t low[kAtOnce][2][4], high[kAtOnce][2][4];  // channels g and g + 8: [block][half][word]
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t row = halves[half] + (block + j) * kMmaRows * kTilePitch;
          load(row, low[j][half]);
          load(row + 8 * kTilePitch, high[j][half]);
          store_zeros(row);
          store_zeros(row + 8 * kTilePitch);
        }
#pragma unroll
      for (int step = 0; step < 4; ++step)
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
          for (int order = 0; order < kOrders; ++order) {
            const uint32_t (&x)[4] = low[j][step / 2], (&y)[4] = high[j][step / 2],
                           (&w)[4] = b[order][step / 2];
            const int i = step % 2;  // words i and i + 2: half of them are where the mma wants them
            Half<T>::mma(sum[block + j][order], x[2 * i], y[2 * i], x[2 * i + 1], y[2 * i + 1], w[2 * i],
                         w[2 * i + 1]);
          }
    }
  }

  // float [kChannels][kHeads] in shared memory.
  __device__ __forceinline__ void store(uint32_t to, int lane) const {
    const int g = lane / 4, q = lane % 4;
    if (kOrders == 1 && g % 2 != q / 2) return;  // columns of the other order
    if (head(lane) >= kHeads) return;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t two[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          two[i] = __float_as_uint(kOrders == 1 || g % 2 == 0 ? sum[block][0][2 * half + i]
                                                              : sum[block][kOrders - 1][2 * half + i]);
        const uint32_t at = to + ((block * kMmaRows + g + half * 8) * kHeads + head(lane)) * 4;
        if constexpr (kHeads == 1)
          store32(at, two[0]);
        else
          cuda::store(at, two);
      }
  }
};

}  // namespace mustafar::cuda
