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

// Lane l's column of the tile whose channel 0 is at `tile`.
__device__ __forceinline__ uint32_t tile_column(uint32_t tile, int lane) { return tile + lane * 4; }

// Stores one value: the visit of a walk over tile_column(), with the two rows 2 bytes apart.
struct Scatter {
  __device__ __forceinline__ void operator()(int /*row*/, uint32_t address, uint32_t pair, bool high) const {
    store16(address, high ? pair >> 16 : pair);
  }
};
template <class Rows>
using TileWalk = Walk<kTilePitch, 2, Rows>;

// Scatters a slice to the tile, which is all zeros. The copies of rows.begin() have been waited for.
template <class Rows>
__device__ __forceinline__ void expand(const Rows& rows, uint32_t tile, int head_dim, int bitmap_words,
                                       int lane) {
  TileWalk<Rows> walk(rows, tile_column(tile, lane), head_dim, bitmap_words);
  Scatter scatter;
  walk_from(0, 0, walk, scatter);
  walk.finish([] {}, scatter);
}

// Weights of a slice: for each head 32 words, the weights of tokens l and l + 32, in the order in which
// ValueProduct loads them, and once more with neighbours swapped. 16 bytes more keep two heads' rows on
// different banks.
constexpr int kWeightsPitch = 2 * 128 + 16;
__host__ __device__ constexpr int weights_bytes(int heads) { return heads * kWeightsPitch; }
// Where lane l's word lies in the first copy. Thread q loads words (4q, 4q + 16, 4q + 1, 4q + 17) as one
// vector and (4q + 2, 4q + 18, 4q + 3, 4q + 19) as the next.
__device__ __forceinline__ uint32_t weight_column(int lane) {
  return (lane % 16 / 4 * 8 + lane % 4 / 2 * 4 + lane % 2 * 2 + lane / 16) * 4;
}
__device__ __forceinline__ void store_weight(uint32_t weights, int head, uint32_t pair, int lane) {
  const uint32_t row = weights + head * kWeightsPitch;
  store32(row + weight_column(lane), pair);
  store32(row + 128 + (weight_column(lane) ^ 4), pair);
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
      load(weights + g % kHeads * kWeightsPitch + step / 2 * 128 + q * 32 + step % 2 * 16, a[step]);
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
          load(from[i] + (step * kMmaDepth + c) * kTilePitch, words[c][i]);
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
