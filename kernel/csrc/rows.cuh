// Compressed rows: where the rows of a slice lie, and the walk over their values in channel order. A warp
// takes the 64 rows of a slice, every lane two of them. feed.cuh and staged_feed.cuh bring them to it;
// nothing else reads the format.
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

// Tables in shared memory that are indexed by channel have rows before and after the channels that the walk
// may touch but nobody reads: see Scan. After them as many as values are visited between two checks.
constexpr int kGuardRows = 1;
constexpr int kSinkRows = kVectorValues, kFewSinkRows = kVectorValues / 2;
__host__ __device__ constexpr int table_bytes(int channels, int pitch, int sink_rows) {
  return (kGuardRows + channels + sink_rows) * pitch;
}

// Some slices of a sequence: first, first + stride, ... below end, of which the tokens from first_visible to
// end_visible are to be seen.
struct Share {
  int32_t first, end, stride;
  int32_t first_visible, end_visible;
};

// Where the keys or values of a KV head lie. Uniform across a warp.
struct Stored {
  const char* values;      // of the head; in the general layout of the tensor
  const uint64_t* bitmap;  // of the head
  const int64_t* offsets;  // of the head; null in the uniform layout
  const int32_t* widths;
  int32_t vectors;  // of each row, in the uniform layout
  int32_t words;    // 64-bit words of a row's bitmap

  __device__ __forceinline__ Stored(const CompressedView& view, int64_t b, uint32_t h, int bitmap_words)
      : values(static_cast<const char*>(view.values)),
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
};

// What one team of warps reads of them.
struct Slices : Share, Stored {
  __device__ __forceinline__ Slices(const Stored& stored, const Share& share)
      : Share(share), Stored(stored) {}

  __device__ __forceinline__ bool general() const { return offsets != nullptr; }
  // Vector 0 of row 0 of a slice.
  __device__ __forceinline__ const char* uniform_values(int slice) const {
    return values + int64_t{slice} * (vectors * kSliceVectorBytes);
  }
  __device__ __forceinline__ const char* general_values(int slice) const {
    return values + __ldg(offsets + slice) * 2;
  }
  __device__ __forceinline__ const char* first_vector(int slice) const {
    return general() ? general_values(slice) : uniform_values(slice);
  }
  // What the general layout has to look up, in time for vectors_of().
  __device__ __forceinline__ int32_t width(int slice) const { return general() ? __ldg(widths + slice) : 0; }
  // By way of a shuffle, so that the compiler knows it uniform.
  __device__ __forceinline__ int vectors_of(int32_t width) const {
    return general() ? __shfl_sync(kFullWarp, width, 0) / kVectorValues : vectors;
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
//
// It takes bits[0] != 0: a row with a run of 32 zeros (Walk::has_gap) needs skip_zeros() before every step.
template <int kWords, int kPitch>
struct Scan {
  // A step subtracts the place of the first one, 31 - zeros, where it should add zeros + 1: this many
  // channels more, and they go into the offsets of the accesses.
  static constexpr uint32_t kChannelsPerStep = 32;
  static constexpr uint32_t kBias = kVectorValues * kChannelsPerStep * kPitch;
  uint32_t bits[kWords];
  uint32_t at;  // address in the table of the channel before the one that bits[0] starts with, plus kBias

  __device__ __forceinline__ void go_to(uint32_t address) { at = address + kBias; }

  // Consumes channels up to and including the next kept one, and returns its address in the table. The i-th
  // call, from 0, since advance(). `ones` is all ones.
  template <int kLive>
  __device__ __forceinline__ uint32_t step(int i, uint32_t ones) {
    const uint32_t place = highest_one(bits[0]);
    at -= place * kPitch;
#pragma unroll
    for (int w = 0; w < kLive; ++w)  // by zeros + 1 to the left
      bits[w] = __funnelshift_r(w + 1 < kLive ? bits[w + 1] : ones, bits[w], place);
    return at + (i + 1) * kChannelsPerStep * kPitch - kBias;
  }

  // After half of them: no further than the last channel, where sink rows are few.
  __device__ __forceinline__ void halfway(uint32_t sink) {
    at = min(at, sink + kBias - kVectorValues / 2 * kChannelsPerStep * kPitch);
  }
  // After the kVectorValues steps of a vector. Not beyond the last channel, because sink rows are as many.
  __device__ __forceinline__ void advance(uint32_t sink) {
    at = min(at + kVectorValues * kChannelsPerStep * kPitch, sink + kBias);
  }

  __device__ __forceinline__ bool stalled() const { return bits[0] == 0; }

  // Goes past one word of zeros, if there is one.
  __device__ __forceinline__ void skip_zeros(uint32_t ones) {
    const bool empty = stalled();
#pragma unroll
    for (int w = 0; w < kWords; ++w) bits[w] = empty ? w + 1 < kWords ? bits[w + 1] : ones : bits[w];
    at += empty ? 32 * kPitch : 0;
  }
};

// A lane's two rows on their way through a table of kPitch bytes a channel, channel 0 of row r at table + r *
// kRowBytes, with kSinkRows_ rows after them. Visit: visit(row, address, pair, high) with the address of the
// value's channel in the table, and the value in the low or high half of `pair`. Slots without a channel land
// in the sink rows.
template <int kBitmapWords, int kTablePitch, int kRowBytes, int kSinkRows_>
struct Walk {
  static constexpr int kWords = kBitmapWords, kPitch = kTablePitch;
  const uint32_t before, sink;  // the guard row and the last channel's row of row 0's table
  const uint32_t ones;
  Scan<kWords, kPitch> scan[kRowsPerLane];
  bool has_gap;  // whether a row has a run of 32 zeros

  __device__ __forceinline__ Walk(uint32_t table, int head_dim)
      : before(table - kPitch), sink(before + head_dim * kPitch), ones(opaque_ones()) {}

  // The rows' bitmaps, least significant bit first.
  __device__ __forceinline__ void start(uint32_t (&words)[kRowsPerLane][kWords], int head_dim) {
    has_gap = false;
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        if (i >= kWords / 2 || kWords == 2) words[r][i] |= sentinels(i, head_dim);
        scan[r].bits[i] = __brev(words[r][i]);
      }
      // 32 zeros in a row are the end of one word and the start of the next (or all of one of them): the
      // float is 2 to the power of 31 - zeros, or up to twice as much. So 31 zeros may count, too.
#pragma unroll
      for (int i = 0; i + 1 < kWords; ++i)
        has_gap |= __uint2float_rz(words[r][i]) * __uint2float_rz(scan[r].bits[i + 1]) < 4294967296.f;
      scan[r].go_to(before + r * kRowBytes);
    }
  }

  // The values of row r go to the sink rows.
  __device__ __forceinline__ void park(int r) {
    scan[r].go_to(sink + r * kRowBytes);
#pragma unroll
    for (int i = 0; i < kWords; ++i) scan[r].bits[i] = ~0u;
  }

  // Value i of the vector of row r, which is a half of `pair`.
  template <int kLive, class Visit>
  __device__ __forceinline__ void visit_value(int r, int i, uint32_t pair, Visit& visit) {
    visit(r, scan[r].template step<kLive>(i, ones), pair, i % 2 == 1);
  }

  __device__ __forceinline__ void skip_zeros() {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) scan[r].skip_zeros(ones);
  }

  // After half of the values of a vector.
  __device__ __forceinline__ void halfway() {
    if constexpr (kSinkRows_ == kFewSinkRows) {
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r) scan[r].halfway(sink + r * kRowBytes);
    }
  }

  __device__ __forceinline__ void advance() {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) scan[r].advance(sink + r * kRowBytes);
  }

  // Zero if a row is stalled: a minimum, where a test per row would be a chain of predicates.
  __device__ __forceinline__ uint32_t least() const { return min(scan[0].bits[0], scan[1].bits[0]); }

 private:
  // Ones for what is not a channel in word i of the upper half: head_dim is more than half of the channels
  // that the kernel is compiled for, unless those are 64.
  static __device__ __forceinline__ uint32_t sentinels(int i, int head_dim) {
    const int channels = head_dim - 32 * i;  // of this word
    return channels >= 32 ? 0 : channels <= 0 ? ~0u : ~0u << channels;
  }
};

}  // namespace mustafar::cuda
