// Query . key on the non-zeros: every kept value of a key fetches its channel of all queries of the group
// from a table in shared memory. Work is proportional to the values kept, products and sums are float32.
#pragma once

#include <cstdint>

#include "feed.cuh"
#include "half.cuh"
#include "rows.cuh"
#include "shared.cuh"

namespace mustafar::cuda {

// The table has a row of kPitch bytes a channel: an entry (the channel in all kHeads queries) as often as
// fits. Each lane reads its own copy, so a gather conflicts at no choice of channels: 128 bytes are 8 copies
// of 4 heads in float32, and a quarter-warp is what loads 16 bytes a lane at once. 6 and 8 heads stay in half
// precision, for twice the bandwidth costs more than the conversions. 256 channels get half the copies, to
// leave room for tiles.
template <class T, int kChannels, int kHeads>
struct QueryTable {
  using Element = T;
  static constexpr int kPitch = kChannels == 256 ? 64 : 128;
  static constexpr int kBytes = table_bytes(kChannels, kPitch, kSinkRows);
  static constexpr bool kFloat = kHeads <= 4;
  static constexpr int kEntryWords = kFloat ? kHeads : 4;  // 6 heads leave one unused
  static constexpr int kEntryBytes = 4 * kEntryWords;
  static constexpr int kScratchBytes = kEntryBytes * kChannels;  // for fill()

  // By the whole block; ends with a barrier. Rows before and after the channels are zeros.
  static __device__ __forceinline__ void fill(uint32_t table, uint32_t scratch, const T* queries,
                                              int64_t head_stride, int heads, int head_dim) {
    // Every query value is read once, so that the block waits for one trip to memory, not for one each.
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(queries);
    for (int channel = threadIdx.x; channel < head_dim; channel += blockDim.x) {
      uint32_t entry[kEntryWords];
#pragma unroll
      for (int i = 0; i < kEntryWords; ++i) {
        const int head = kFloat ? i : 2 * i;
        entry[i] = head < heads ? __ldg(bits + head * head_stride + channel) : 0;
        if constexpr (!kFloat)
          entry[i] |= head + 1 < heads ? uint32_t{__ldg(bits + (head + 1) * head_stride + channel)} << 16 : 0;
      }
#pragma unroll
      for (int i = 0; i < kEntryWords; ++i)
        store32(scratch + (channel * kEntryWords + i) * 4,
                kFloat ? __float_as_uint(Half<T>::low(entry[i])) : entry[i]);
    }
    __syncthreads();
    constexpr int kRowWords = kPitch / 4, kRows = kBytes / kPitch;
    const int word = threadIdx.x % kRowWords;
#pragma unroll 4
    for (int row = threadIdx.x / kRowWords; row < kRows; row += blockDim.x / kRowWords) {
      const int channel = row - kGuardRows;
      uint32_t entry = 0;
      if (channel >= 0 && channel < head_dim)
        load(scratch + (channel * kEntryWords + word % kEntryWords) * 4, entry);
      store32(table + (row * kRowWords + word) * 4, entry);
    }
    __syncthreads();
  }

  // Where this lane's copy of channel 0 lies from the start of the table.
  static __device__ __forceinline__ uint32_t column(int lane) {
    return kGuardRows * kPitch + lane % (kPitch / kEntryBytes) * kEntryBytes;
  }

  // query[head] of `channel` and the one after it, from copy `copy`.
  static __device__ __forceinline__ uint32_t pair(uint32_t table, int copy, int channel, int head) {
    const uint32_t at = table + column(copy) + channel * kPitch + head * (kFloat ? 4 : 2);
    uint32_t first, second;
    if constexpr (kFloat) {
      load(at, first);
      load(at + kPitch, second);
      return Half<T>::pack(__uint_as_float(first), __uint_as_float(second));
    } else {
      load16(at, first);
      load16(at + kPitch, second);
      return first | second << 16;
    }
  }

  // sums[head] += query[head][channel at address] * key
  static __device__ __forceinline__ void add(float (&sums)[kHeads], uint32_t address, float key) {
    uint32_t entry[kEntryWords];
    load(address, entry);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float query = kFloat       ? __uint_as_float(entry[h])
                          : h % 2 == 0 ? Half<T>::low(entry[h / 2])
                                       : Half<T>::high(entry[h / 2]);
      sums[h] = fmaf(query, key, sums[h]);
    }
  }
};

// Scores of a lane's two tokens with every head: the visit of a walk over a query table.
template <class Queries, int kHeads>
struct Scores {
  using T = typename Queries::Element;
  float of[kRowsPerLane][kHeads];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r)
#pragma unroll
      for (int h = 0; h < kHeads; ++h) of[r][h] = 0.f;
  }
  // From shared memory, as float [kSliceTokens][kHeads].
  __device__ __forceinline__ void load(uint32_t from, int lane) {
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r)
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        uint32_t bits;
        cuda::load(from + ((lane + r * kWarpSize) * kHeads + h) * 4, bits);
        of[r][h] = __uint_as_float(bits);
      }
    __syncwarp();
  }
  __device__ __forceinline__ void operator()(int row, uint32_t address, uint32_t pair, bool high) {
    Queries::add(of[row], address, high ? Half<T>::high(pair) : Half<T>::low(pair));
  }
};
template <class Queries, int kWords>
using QueryWalk = Walk<kWords, Queries::kPitch, 0, kSinkRows>;

}  // namespace mustafar::cuda
