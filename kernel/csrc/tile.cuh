// The dense tile of a slice in shared memory, and the tensor-core products with it: "load compressed, compute
// dense". A warp owns its tile, so nothing here synchronises more than a warp.
//
// Layout: one row of 128 bytes a channel, [channel][32 words]; word l holds token l (low half) and token l +
// 32 (high half). Lane l scatters its two tokens' values into column l, so the bank of a store depends on the
// lane alone and no scatter ever conflicts, whatever the channels are. The reading side pays for it: rows are
// 128 bytes apart, so a plain fragment load would be an 8-way conflict, and the products below read skewed.
#pragma once

#include <cstdint>

#include "half.cuh"
#include "rows.cuh"
#include "shared.cuh"

namespace mustafar::cuda {

constexpr int kTilePitch = kWarpSize * 4;  // bytes a channel
constexpr int kMmaRows = 16, kMmaDepth = 16, kMmaColumns = 8;

__host__ __device__ constexpr int tile_bytes(int channels) { return table_bytes(channels, kTilePitch); }

// Heads of one mma with the tile of values: half its columns, see ValueProduct.
constexpr int kHeadsPerTile = 4;

// Lane l's column of the tile whose channel 0 is at `tile`.
__device__ __forceinline__ uint32_t tile_column(uint32_t tile, int lane) { return tile + lane * 4; }

// Stores one value: the visit of walk() over tile_column(), with the rows 2 bytes apart.
__device__ __forceinline__ void scatter(int /*row*/, uint32_t address, uint32_t pair, bool high) {
  store16(address, high ? pair >> 16 : pair);
}

// Weights of a slice: [heads][32 words], word l = the weights of tokens l and l + 32. 192 bytes a head
// instead of 128 put the rows of two neighbouring heads on different banks.
constexpr int kWeightsPitch = 192;
__host__ __device__ constexpr int weights_bytes(int heads) { return heads * kWeightsPitch; }
__device__ __forceinline__ void store_weight(uint32_t weights, int head, uint32_t pair, int lane) {
  store32(weights + head * kWeightsPitch + lane * 4, pair);
}

// sum[channel][head] += over the slice's tokens of tile[channel][token] * weights[head][token].
//
// mma rows are channels, columns are heads, and the depth runs over tokens, two per tile word. Thread
// (g = lane / 4, q = lane % 4) must feed channel g with the words of q. It loads 16 bytes, words 4q..4q+3 of
// one half of the row; to avoid conflicts odd channels load the upper half of the row when even channels load
// the lower. So odd channels see the tokens in another order than even ones. Instead of swapping registers,
// the weights come in both orders: columns 0-3 hold up to 4 heads in the order of even channels, columns 4-7
// the same heads in the order of odd channels, and each channel keeps the columns that fit it.
template <class T, int kChannels, int kTiles>  // kTiles x 4 heads
struct ValueProduct {
  static constexpr int kBlocks = kChannels / kMmaRows;
  float sum[kBlocks][kTiles][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[block][t][i] = 0.f;
  }

  // The heads that this thread's columns hold: first_head and the next, of each kTiles.
  static __device__ __forceinline__ int first_head(int lane) { return lane % 2 * 2; }

  __device__ __forceinline__ void scale(const float (&factors)[kTiles][2]) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[block][t][i] *= factors[t][i % 2];
  }

  // Leaves the tile all zeros. The caller puts a __syncwarp() before and after.
  __device__ __forceinline__ void add(uint32_t tile, uint32_t weights, int head_dim, int lane) {
    const int g = lane / 4, q = lane % 4;
    uint32_t lower[kTiles][4], upper[kTiles][4];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const uint32_t head = weights + (t * kHeadsPerTile + g % kHeadsPerTile) * kWeightsPitch + q * 16;
      const uint32_t first = g < kHeadsPerTile ? 0 : 64;
      load(head + first, lower[t]);
      load(head + (64 - first), upper[t]);
    }
    const uint32_t lower_half = tile + g * kTilePitch + (g % 2) * 64 + q * 16;
    const uint32_t upper_half = tile + g * kTilePitch + (1 - g % 2) * 64 + q * 16;
    constexpr int kAtOnce = 2;  // blocks whose products are independent: hides the latency of the mma
#pragma unroll
    for (int first = 0; first < kBlocks; first += kAtOnce) {
      if (first * kMmaRows >= head_dim) break;
      uint32_t a[kAtOnce][4][4];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // a0, a1: channels g and g + 8 of the first half, a2, a3 of the second
          const uint32_t from =
              (i < 2 ? lower_half : upper_half) + ((first + j) * kMmaRows + i % 2 * 8) * kTilePitch;
          load(from, a[j][i]);
          store_zeros(from);
        }
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
          for (int t = 0; t < kTiles; ++t)
            Half<T>::mma(sum[first + j][t], a[j][0][k], a[j][1][k], a[j][2][k], a[j][3][k], lower[t][k],
                         upper[t][k]);
    }
  }

  // out[head][kChannels], kTiles x 4 heads.
  __device__ __forceinline__ void store(float* out, int lane) const {
    const int g = lane / 4, q = lane % 4;
    if (q / 2 != g % 2) return;  // columns in the other order
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int head = t * kHeadsPerTile + first_head(lane) + i % 2;
          out[head * kChannels + block * kMmaRows + g + i / 2 * 8] = sum[block][t][i];
        }
  }
};

// scores[token][head] = over channels, tile[channel][token] * queries[head][channel].
//
// mma rows are tokens, columns are heads, the depth runs over channels. Thread (g, q) must feed tokens of row
// g with the channels of q: 4 threads would read one bank. So at load i thread q reads the words of token
// block (q + i) % 4 (tokens 8 block + g), all 32 words of a row at once, and the four blocks are rotated into
// place.
template <class T, int kChannels>
struct KeyProduct {
  static constexpr int kSteps = kChannels / kMmaDepth;
  static constexpr int kTokenBlocks = 4;
  uint32_t queries[kSteps][2];    // head g, channels 16 step + 4 q + 0..3
  float scores[kTokenBlocks][4];  // [block][i]: token 8 block + g + 32 (i / 2), head 2 q + i % 2

  // q of head g; null for a column without a head. Rows are aligned to 8 bytes.
  __device__ __forceinline__ void load_queries(const T* head, int head_dim, int lane) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int channel = step * kMmaDepth + lane % 4 * 4;
      const bool held = head != nullptr && channel < head_dim;
      const uint2 words = held ? __ldg(reinterpret_cast<const uint2*>(head + channel)) : make_uint2(0, 0);
      queries[step][0] = words.x, queries[step][1] = words.y;
    }
  }

  // The caller puts a __syncwarp() before and after, and clears the tile.
  __device__ __forceinline__ void multiply(uint32_t tile, int head_dim, int lane) {
    const int g = lane / 4, q = lane % 4;
    uint32_t from[kTokenBlocks];
#pragma unroll
    for (int i = 0; i < kTokenBlocks; ++i) {
      from[i] = tile + q * 4 * kTilePitch + ((q + i) % kTokenBlocks * 8 + g) * 4;
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[i][j] = 0.f;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step * kMmaDepth >= head_dim) break;
      uint32_t words[4][kTokenBlocks];  // [channel][load]
#pragma unroll
      for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int i = 0; i < kTokenBlocks; ++i) {
          uint32_t word[1];
          load(from[i] + (step * kMmaDepth + c) * kTilePitch, word);
          words[c][i] = word[0];
        }
        rotate(words[c], q);
      }
#pragma unroll
      for (int i = 0; i < kTokenBlocks; ++i)
        Half<T>::mma(scores[i], low_pair(words[0][i], words[1][i]), high_pair(words[0][i], words[1][i]),
                     low_pair(words[2][i], words[3][i]), high_pair(words[2][i], words[3][i]),
                     queries[step][0], queries[step][1]);
    }
  }

 private:
  static __device__ __forceinline__ uint32_t low_pair(uint32_t a, uint32_t b) {
    return __byte_perm(a, b, 0x5410);
  }
  static __device__ __forceinline__ uint32_t high_pair(uint32_t a, uint32_t b) {
    return __byte_perm(a, b, 0x7632);
  }
  // to[block] = words[(block - q) % 4]
  static __device__ __forceinline__ void rotate(uint32_t (&words)[4], int q) {
    const bool one = q & 1, two = q & 2;
    const uint32_t a = one ? words[3] : words[0], b = one ? words[0] : words[1];
    const uint32_t c = one ? words[1] : words[2], d = one ? words[2] : words[3];
    words[0] = two ? c : a, words[1] = two ? d : b, words[2] = two ? a : c, words[3] = two ? b : d;
  }
};

}  // namespace mustafar::cuda
