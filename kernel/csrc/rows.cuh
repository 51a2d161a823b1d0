// Walking compressed rows: a warp takes the 64 rows of a slice, every lane two of them, and visits their
// values in channel order with nothing but registers. Everything that reads the format is here.
#pragma once

#include <cstdint>

#include "../params.h"
#include "half.cuh"

namespace mustafar::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kRowsPerLane = kSliceTokens / kWarpSize;  // lane l owns tokens l and l + 32
// Vectors of a row that are on their way from memory while one is worked on. Two rows of two vectors in
// flight for each of keys and values are 4 KB a warp; 8 warps on an SM hide about twice the latency of HBM.
constexpr int kRing = 2;

// Tables in shared memory that are indexed by channel have one row before and eight rows after the channels
// that the walk may touch but nobody reads: see Scan.
constexpr int kGuardRows = 1;
constexpr int kSinkRows = kVectorValues;
__host__ __device__ constexpr int table_bytes(int channels, int pitch) {
  return (kGuardRows + channels + kSinkRows) * pitch;
}

// Which values belong to a slice. In the general layout both come from memory: located one slice ahead, and
// nothing waits for them before RowPair::begin() does.
struct Location {
  int64_t first;  // value of the tensor
  int32_t width;  // value slots of each row
};

__device__ __forceinline__ Location locate(const CompressedView& view, int64_t b, int h, int slice) {
  if (view.offsets == nullptr)
    return {b * view.values_batch_stride + h * view.values_head_stride +
                int64_t{slice} * view.width * kSliceTokens,
            view.width};
  return {__ldg(view.offsets + b * view.offsets_batch_stride + h * view.offsets_head_stride + slice),
          __ldg(view.widths + b * view.widths_batch_stride + h * view.widths_head_stride + slice)};
}

// The 64 rows of a slice. Uniform across the warp.
struct RowSource {
  const uint64_t* bitmap;  // of row 0; null if every row holds every channel (the dense window)
  const uint4* values;     // vector 0 of row 0
  int32_t vectors;         // of each row
  int32_t row_pitch;       // vectors from a row to the next
  int32_t vector_pitch;    // vectors from one vector of a row to its next
};

__device__ __forceinline__ RowSource slice_rows(const CompressedView& view, const Location& location,
                                                int64_t b, int h, int slice, int bitmap_words) {
  return {view.bitmap + b * view.bitmap_batch_stride + h * view.bitmap_head_stride +
              int64_t{slice} * (kSliceTokens * bitmap_words),
          static_cast<const uint4*>(view.values) + location.first / kVectorValues,
          location.width / kVectorValues, 1, kSliceTokens};
}

__device__ __forceinline__ uint32_t pair_of(const uint4& vector, int i) {
  return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

// One row's bitmap, left-aligned: the next channel is the top bit of bits[0]. Bits from head_dim on are ones
// ("sentinels"), and ones are shifted in behind them: a row that has run out of kept channels goes on to
// channels head_dim, head_dim + 1, ..., the sink rows of the tables, so the loop needs no test per value.
// A run of 32 zeros stalls the scan (step() then repeats the last channel, or the guard row): bits[0] stays 0
// until the end of the row, where walk() notices and walks again with skip_zeros().
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
  // call, from 0, since advance().
  __device__ __forceinline__ uint32_t step(int i) {
    const uint32_t zeros = leading_zeros(bits[0]), shift = zeros + 1;
    at += zeros * kPitch;
#pragma unroll
    for (int i = 0; i + 1 < kWords; ++i) bits[i] = __funnelshift_lc(bits[i + 1], bits[i], shift);
    bits[kWords - 1] = __funnelshift_lc(~0u, bits[kWords - 1], shift);
    return at + (i + 1) * kPitch;
  }

  __device__ __forceinline__ void advance(int steps) { at += steps * kPitch; }

  __device__ __forceinline__ bool stalled() const { return bits[0] == 0; }

  __device__ __forceinline__ void skip_zeros() {
    while (bits[0] == 0) {
#pragma unroll
      for (int i = 0; i + 1 < kWords; ++i) bits[i] = bits[i + 1];
      bits[kWords - 1] = ~0u;
      at += 32 * kPitch;
    }
  }
};

// A lane's two rows of a slice. begin() starts the loads, walk() uses them.
template <int kWords>  // 32-bit words of a row's bitmap, rounded up to what the kernel is compiled for
struct RowPair {
  const uint64_t* bitmap;
  const char* row[kRowsPerLane];  // vector 0
  int32_t vectors;
  uint32_t vector_bytes;  // from a vector to the next
  bool visible[kRowsPerLane];
  uint32_t words[kRowsPerLane][kWords];  // as stored: least significant bit first
  uint4 ring[kRing][kRowsPerLane];

  // Rows that are not visible are never read from memory that may not exist, and count as empty.
  __device__ __forceinline__ void begin(const RowSource& source, const bool (&rows_visible)[kRowsPerLane],
                                        int bitmap_words, int lane) {
    bitmap = source.bitmap;
    vectors = source.vectors;
    vector_bytes = source.vector_pitch * sizeof(uint4);
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) {
      visible[r] = rows_visible[r];
      const int token = visible[r] ? lane + r * kWarpSize : 0;
      row[r] = reinterpret_cast<const char*>(source.values + int64_t{token} * source.row_pitch);
    }
    load_words(bitmap_words, lane);
    load_ring();
  }

  __device__ __forceinline__ void load_ring() {
#pragma unroll
    for (int slot = 0; slot < kRing; ++slot)
      if (slot < vectors) load(slot, slot);
  }

  __device__ __forceinline__ void load(int slot, uint32_t vector) {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r)
      ring[slot][r] = __ldg(reinterpret_cast<const uint4*>(row[r] + uint64_t{vector} * vector_bytes));
  }

  __device__ __forceinline__ void load_words(int bitmap_words, int lane) {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) {
      if (bitmap == nullptr) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) words[r][i] = ~0u;
        continue;
      }
      const uint64_t* from = bitmap + (lane + r * kWarpSize) * bitmap_words;
      if constexpr (kWords == 4) {
        const uint4 all = __ldg(reinterpret_cast<const uint4*>(from));
        words[r][0] = all.x, words[r][1] = all.y, words[r][2] = all.z, words[r][3] = all.w;
      } else {
#pragma unroll
        for (int i = 0; i < kWords / 2; ++i) {
          const uint2 word =
              i < bitmap_words ? __ldg(reinterpret_cast<const uint2*>(from + i)) : make_uint2(0, 0);
          words[r][2 * i] = word.x, words[r][2 * i + 1] = word.y;
        }
      }
    }
  }

  // `before` and `sink`: addresses of the guard row and of the row before the sink rows, of row 0's table.
  template <int kPitch, int kRowBytes>
  __device__ __forceinline__ void start(Scan<kWords, kPitch> (&scan)[kRowsPerLane], uint32_t before,
                                        uint32_t sink, int head_dim) const {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) {
      uint32_t any = 0;
#pragma unroll
      for (int i = 0; i < kWords; ++i) any |= words[r][i];
      const bool empty = !visible[r] || any == 0;
      scan[r].at = (empty ? sink : before) + r * kRowBytes;
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int channels = head_dim - 32 * i;  // of this word
        const uint32_t sentinels = channels >= 32 ? 0 : channels <= 0 ? ~0u : ~0u >> channels;
        scan[r].bits[i] = empty ? ~0u : __brev(words[r][i]) | sentinels;
      }
    }
  }
};

// Visits every value slot of a lane's two rows: visit(row, address, pair, high) with the address of the
// value's channel in the table of `kPitch` bytes a channel that starts at `table`, and the value in the low
// or high half of `pair`. Slots without a channel land in the sink rows. restart() comes before visits are
// repeated from the first value on, which happens for rows with a run of 32 zeros.
template <int kPitch, int kRowBytes, int kWords, class Restart, class Visit>
__device__ __forceinline__ void walk(RowPair<kWords>& rows, uint32_t table, int head_dim, int bitmap_words,
                                     int lane, Restart restart, Visit visit) {
  const uint32_t before = table - kPitch, sink = before + head_dim * kPitch;
  Scan<kWords, kPitch> scan[kRowsPerLane];
  rows.template start<kPitch, kRowBytes>(scan, before, sink, head_dim);
#pragma unroll 1
  for (int first = 0; first < rows.vectors; first += kRing) {
#pragma unroll
    for (int slot = 0; slot < kRing; ++slot) {
      if (first + slot >= rows.vectors) break;
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r) scan[r].clamp(sink + r * kRowBytes);
#pragma unroll
      for (int i = 0; i < kVectorValues; ++i)
#pragma unroll
        for (int r = 0; r < kRowsPerLane; ++r)
          visit(r, scan[r].step(i), pair_of(rows.ring[slot][r], i / 2), i % 2 == 1);
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r) scan[r].advance(kVectorValues);
      // Into the registers just used: a load into others would be copied, and the copy would wait for it.
      if (first + slot + kRing < rows.vectors) rows.load(slot, first + slot + kRing);
    }
  }
  if (!__any_sync(kFullWarp, scan[0].stalled() || scan[1].stalled())) return;

  restart();
  rows.load_words(bitmap_words, lane);
  rows.template start<kPitch, kRowBytes>(scan, before, sink, head_dim);
#pragma unroll 1
  for (int vector = 0; vector < rows.vectors; ++vector) {
    rows.load(0, vector);
#pragma unroll 1
    for (int i = 0; i < kVectorValues; ++i) {
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r) {
        if (i == 0) scan[r].clamp(sink + r * kRowBytes);
        scan[r].skip_zeros();
        uint4& v = rows.ring[0][r];
        visit(r, scan[r].step(0), v.x, false);
        scan[r].advance(1);
        v.x = v.x >> 16 | v.y << 16, v.y = v.y >> 16 | v.z << 16, v.z = v.z >> 16 | v.w << 16, v.w >>= 16;
      }
    }
  }
}

}  // namespace mustafar::cuda
