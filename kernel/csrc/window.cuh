// The dense window on tensor cores, 64 tokens at a time: scores of its keys, and its values added to the sums
// of a ValueProduct. A warp's own work, with the memory of its tile as scratch.
#pragma once

#include <cstdint>

#include "half.cuh"
#include "queries.cuh"
#include "rows.cuh"
#include "sequence.cuh"
#include "shared.cuh"
#include "tile.cuh"

namespace mustafar::cuda {

// What scores() needs.
__host__ __device__ constexpr int window_scores_bytes(int heads) { return kSliceTokens * heads * 4; }

template <class T, int kChannels, int kHeads>
class Window {
  using Queries = QueryTable<T, kChannels, kHeads>;
  static constexpr int kVectors = kChannels / kVectorValues;  // of a row
  static constexpr int kRowBytes = kChannels * 2;
  static constexpr int kSpans = kChannels / 32;  // of 32 channels: two steps of the mma

 public:
  // `table` of the queries, `tile` of at least kSliceTokens rows; `first` is the window token that row 0 is.
  __device__ __forceinline__ Window(const Sequence& sequence, const DenseWindow& keys,
                                    const DenseWindow& values, int first, int head_dim, uint32_t table,
                                    uint32_t tile, int lane)
      : sequence_(sequence),
        keys_(keys),
        values_(values),
        first_(first),
        vectors_(head_dim / kVectorValues),
        table_(table),
        tile_(tile),
        lane_(lane) {}

  // Starts the copies of the values to the tile.
  __device__ __forceinline__ void fetch_values() const {
    constexpr int kAtOnce = kWarpSize / kVectors;  // tokens
    const int vector = lane_ % kVectors;
    const char* from = values_.row(first_ + lane_ / kVectors) + vector * 16;
#pragma unroll 4
    for (int token = lane_ / kVectors; token < kSliceTokens; token += kAtOnce) {
      const bool held = vector < vectors_ && sequence_.in_window(first_ + token);
      copy_async_or_zeros(at(token, vector), held ? from : values_.rows, held);
      from += kAtOnce * values_.token_bytes;
    }
    commit_copies();
  }

  // Scores with every head, not scaled, to shared memory as float [kSliceTokens][kHeads]. mma rows are
  // tokens, columns heads, the depth runs over channels: a thread takes 8 neighbouring channels of every 32,
  // of keys and queries alike.
  __device__ __forceinline__ void scores(uint32_t to) const {
    const int g = lane_ / 4, q = lane_ % 4;
    uint32_t queries[kSpans][4];
#pragma unroll
    for (int span = 0; span < kSpans; ++span)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        queries[span][i] = Queries::pair(table_, q, 32 * span + kVectorValues * q + 2 * i, g % kHeads);
    const char* row = keys_.row(first_ + g) + q * 16;
#pragma unroll 2
    for (int tokens = 0; tokens < kSliceTokens; tokens += kMmaRows) {
      const bool held[2] = {sequence_.in_window(first_ + tokens + g),
                            sequence_.in_window(first_ + tokens + g + 8)};
      const char* const rows[2] = {row, row + 8 * keys_.token_bytes};
      uint4 low[kSpans], high[kSpans];  // tokens g and g + 8
#pragma unroll
      for (int span = 0; span < kSpans; ++span) {
        const bool channels = 4 * span + q < vectors_;
        low[span] = load_or_zeros(rows[0] + span * 64, held[0] && channels);
        high[span] = load_or_zeros(rows[1] + span * 64, held[1] && channels);
      }
      row += kMmaRows * keys_.token_bytes;
      float sums[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int span = 0; span < kSpans; ++span) {
        Half<T>::mma(sums, low[span].x, high[span].x, low[span].y, high[span].y, queries[span][0],
                     queries[span][1]);
        Half<T>::mma(sums, low[span].z, high[span].z, low[span].w, high[span].w, queries[span][2],
                     queries[span][3]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int head = 2 * q + i % 2, token = tokens + g + i / 2 * 8;
        if (head < kHeads) store32(to + (token * kHeads + head) * 4, __float_as_uint(sums[i]));
      }
    }
  }

  // Adds the values, whose copies are waited for, times the weights. The tile holds anything afterwards.
  __device__ __forceinline__ void add_values(ValueProduct<T, kChannels, kHeads>& output,
                                             uint32_t weights) const {
    wait_copies<0>();
    __syncwarp();
    const int g = lane_ / 4, q = lane_ % 4;
    // ldmatrix transposes 8 x 8 values: rows of the second matrix are other channels, those of the third and
    // fourth other tokens. Row i is a token of the word of weights i / 2: see store_weight().
    const int matrix = lane_ / 8, row = lane_ % 8;
    const int token = matrix / 2 * 4 + row / 2 + row % 2 * kWarpSize;
#pragma unroll
    for (int step = 0; step < 4; ++step) {  // of 8 words: 16 tokens
      uint32_t w[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        load(weights + (g % 4 + (kHeads > 4 ? g / 4 * 4 : 0)) % kHeads * kWeightsPitch +
                 (8 * step + 4 * i + q) * 4,
             w[i]);
#pragma unroll
      for (int block = 0; block < ValueProduct<T, kChannels, kHeads>::kBlocks; ++block) {
        uint32_t a[4];
        load_transposed(at(token + 8 * step, 2 * block + matrix % 2), a);
#pragma unroll
        for (int order = 0; order < ValueProduct<T, kChannels, kHeads>::kOrders; ++order)
          Half<T>::mma(output.sum[block][order], a[0], a[1], a[2], a[3], w[0], w[1]);
      }
    }
    __syncwarp();
  }

 private:
  // Where a vector of a token's values lies in the tile: so that neither 8 vectors of a row nor one vector of
  // the 8 tokens of an ldmatrix, 4 neighbours and those 32 further, share banks.
  __device__ __forceinline__ uint32_t at(int token, int vector) const {
    return tile_ + token * kRowBytes + (vector ^ (token % 4 + token / kWarpSize * 4)) * 16;
  }
  static __device__ __forceinline__ uint4 load_or_zeros(const char* from, bool held) {
    return held ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
  }

  const Sequence& sequence_;
  const DenseWindow &keys_, &values_;
  const int first_, vectors_;
  const uint32_t table_, tile_;
  const int lane_;
};

}  // namespace mustafar::cuda
