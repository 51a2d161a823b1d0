// Compressed rows: where the rows of a slice lie, and the walk over their values in channel order. A warp
// takes the 64 rows of a slice, every lane two of them. feed.cuh brings them to shared memory; nothing else
// reads the format.
#pragma once

#include <cstdint>

#include "../params.h"
#include "half.cuh"
#include "shared.cuh"

namespace mustafar::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kRowsPerLane = kSliceTokens / kWarpSize;  // lane l owns tokens l and l + 32

constexpr int kSliceVectorBytes = kSliceTokens * 16;  // a vector of every row of a slice

// Tables in shared memory that are indexed by channel have one row before and eight rows after the channels
// that the walk may touch but nobody reads: see Scan.
constexpr int kGuardRows = 1;
constexpr int kSinkRows = kVectorValues;
__host__ __device__ constexpr int table_bytes(int channels, int pitch) {
  return (kGuardRows + channels + kSinkRows) * pitch;
}

// Some slices of a sequence: first, first + stride, ... below end, of which the tokens from first_visible to
// end_visible are to be seen.
struct Share {
  int32_t first, end, stride;
  int32_t first_visible, end_visible;
};

// What one team of warps reads of the keys or values of a KV head. Uniform across a warp.
struct Slices : Share {
  const char* values;      // of the head; in the general layout of the tensor
  const uint64_t* bitmap;  // of the head
  const int64_t* offsets;  // of the head; null in the uniform layout
  const int32_t* widths;
  int32_t vectors;  // of each row, in the uniform layout
  int32_t words;    // 64-bit words of a row's bitmap

  __device__ __forceinline__ Slices(const CompressedView& view, int64_t b, int h, int bitmap_words,
                                    const Share& share)
      : Share(share),
        values(static_cast<const char*>(view.values)),
        bitmap(view.bitmap + b * view.bitmap_batch_stride + h * view.bitmap_head_stride),
        offsets(view.offsets),
        vectors(view.width / kVectorValues),
        words(bitmap_words) {
    if (offsets == nullptr) {
      values += (b * view.values_batch_stride + h * view.values_head_stride) * 2;
    } else {
      offsets += b * view.offsets_batch_stride + h * view.offsets_head_stride;
      widths = view.widths + b * view.widths_batch_stride + h * view.widths_head_stride;
    }
  }

  // Vector 0 of row 0 of a slice, and how many each row has.
  __device__ __forceinline__ const char* locate(int slice, int* count) const {
    if (offsets == nullptr) {
      *count = vectors;
      return values + int64_t{slice} * (vectors * kSliceVectorBytes);
    }
    *count = general_count(slice);
    return values + __ldg(offsets + slice) * 2;
  }
  __device__ __forceinline__ int count(int slice) const {
    return offsets == nullptr ? vectors : general_count(slice);
  }

  // By way of a shuffle, so that the compiler knows it uniform.
  __device__ __forceinline__ int general_count(int slice) const {
    return __shfl_sync(kFullWarp, __ldg(widths + slice), 0) / kVectorValues;
  }

  __device__ __forceinline__ bool whole(int slice) const {
    return slice * kSliceTokens >= first_visible && (slice + 1) * kSliceTokens <= end_visible;
  }
  __device__ __forceinline__ bool visible(int slice, int token) const {
    const int position = slice * kSliceTokens + token;
    return position >= first_visible && position < end_visible;
  }
};

// One row's bitmap, left-aligned: the next channel is the top bit of bits[0]. Bits from head_dim on are ones
// ("sentinels"), and ones are shifted in behind them: a row that has run out of kept channels goes on to
// channels head_dim, head_dim + 1, ..., the sink rows of the tables, so the loop needs no test per value.
// A run of 32 zeros, and an empty row, stalls the scan: step() then repeats the last channel, or the guard
// row, and bits[0] stays 0 until the end of the row, where Feed::finish() notices. Unless skip_zeros() is
// called before every step.
template <int kWords, int kPitch>
struct Scan {
  uint32_t bits[kWords];
  // Address in the table of the channel before the one that bits[0] starts with, less kPitch for each step
  // since the last advance(): so an address costs one multiply-add, and the steps go into the offset of the
  // access.
  uint32_t at;

  // Sink rows are kSinkRows: called before each vector.
  __device__ __forceinline__ void clamp(uint32_t sink) { at = min(at, sink); }

  // Consumes channels up to and including the next kept one, and returns its address in the table. The i-th
  // call, from 0, since advance(). `ones` is all ones, kLive the words that may still hold a bitmap's bits.
  template <int kLive>
  __device__ __forceinline__ uint32_t step(int i, uint32_t ones) {
    const uint32_t zeros = leading_zeros(bits[0]), shift = zeros + 1;
    at += zeros * kPitch;
#pragma unroll
    for (int w = 0; w < kLive; ++w)
      bits[w] = __funnelshift_lc(w + 1 < kLive ? bits[w + 1] : ones, bits[w], shift);
    return at + (i + 1) * kPitch;
  }

  __device__ __forceinline__ void advance(int steps) { at += steps * kPitch; }

  __device__ __forceinline__ bool stalled() const { return bits[0] == 0; }

  // Goes past one word of zeros, if there is one.
  __device__ __forceinline__ void skip_zeros(uint32_t ones) {
    const bool empty = stalled();
#pragma unroll
    for (int w = 0; w < kWords; ++w) bits[w] = empty ? w + 1 < kWords ? bits[w + 1] : ones : bits[w];
    at += empty ? 32 * kPitch : 0;
  }
};

// Whether a row of so many vectors is walked without a thought for runs of 32 zeros: at random 28 % of the
// channels they come once in 40,000 values, and then cost a second walk.
template <int kWords>
__device__ __forceinline__ bool is_dense(int vectors) {
  return vectors * kVectorValues * 7 >= kWords * 32 * 2;
}

// A lane's two rows on their way through a table of kPitch bytes a channel, channel 0 of row r at table + r *
// kRowBytes. Visit: visit(row, address, pair, high) with the address of the value's channel in the table, and
// the value in the low or high half of `pair`. Slots without a channel land in the sink rows.
template <int kBitmapWords, int kTablePitch, int kRowBytes>
struct Walk {
  static constexpr int kWords = kBitmapWords, kPitch = kTablePitch;
  const uint32_t before, sink;  // the guard row and the last channel's row of row 0's table
  const uint32_t ones;
  Scan<kWords, kPitch> scan[kRowsPerLane];
  uint32_t pairs[kRowsPerLane][4];  // the vector at work

  __device__ __forceinline__ Walk(uint32_t table, int head_dim)
      : before(table - kPitch), sink(before + head_dim * kPitch), ones(opaque_ones()) {}

  // The rows' bitmaps, least significant bit first.
  __device__ __forceinline__ void start(const uint32_t (&words)[kRowsPerLane][kWords], int head_dim) {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) scan[r].bits[i] = __brev(words[r][i]);
      scan[r].at = before + r * kRowBytes;
    }
    if (head_dim < kWords * 32) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int channels = head_dim - 32 * i;  // of this word
        const uint32_t sentinels = channels >= 32 ? 0 : channels <= 0 ? ~0u : ~0u >> channels;
#pragma unroll
        for (int r = 0; r < kRowsPerLane; ++r) scan[r].bits[i] |= sentinels;
      }
    }
  }

  // The values of row r go to the sink rows.
  __device__ __forceinline__ void park(int r) {
    scan[r].at = sink + r * kRowBytes;
#pragma unroll
    for (int i = 0; i < kWords; ++i) scan[r].bits[i] = ~0u;
  }

  __device__ __forceinline__ void clamp() {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) scan[r].clamp(sink + r * kRowBytes);
  }

  template <int kLive, class Visit>
  __device__ __forceinline__ void visit_value(int i, Visit& visit) {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r)
      visit(r, scan[r].template step<kLive>(i, ones), pairs[r][i / 2], i % 2 == 1);
  }

  __device__ __forceinline__ void skip_zeros() {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) scan[r].skip_zeros(ones);
  }

  __device__ __forceinline__ void advance(int steps) {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) scan[r].advance(steps);
  }

  __device__ __forceinline__ bool stalled() const { return scan[0].stalled() || scan[1].stalled(); }
};

}  // namespace mustafar::cuda
