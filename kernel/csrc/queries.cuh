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

  // Brings the queries to the table, by the whole block: asked for at once, so that what is asked for next
  // does not wait behind them.
  class Fill {
   public:
    __device__ __forceinline__ Fill(const T* queries, int64_t head_stride, int heads, int head_dim)
        : queries_(reinterpret_cast<const uint16_t*>(queries)),
          head_stride_(head_stride),
          heads_(heads),
          head_dim_(head_dim) {
      ask(threadIdx.x % kChannels);
    }

    // Ends with a barrier. Rows before and after the channels are zeros. A block that has fewer threads than
    // channels takes up to kPasses. (A loop as long as it needs made ptxas schedule the walks of some kernels
    // worse.)
    template <int kPasses>
    __device__ __forceinline__ void finish(uint32_t table) {
      constexpr int kGuardBytes = kGuardRows * kPitch;
      for (int i = threadIdx.x * 16; i < kGuardBytes + kSinkRows * kPitch; i += blockDim.x * 16)
        store_zeros(table + i + (i < kGuardBytes ? 0 : kChannels * kPitch));
      put(table, threadIdx.x % kChannels);
#pragma unroll
      for (int pass = 1; pass < kPasses; ++pass) {
        const int channel = threadIdx.x + pass * blockDim.x;
        if (channel >= kChannels) break;
        ask(channel);
        put(table, channel);
      }
      __syncthreads();
    }

   private:
    __device__ __forceinline__ void ask(int channel) {
#pragma unroll
      for (int h = 0; h < kHeads; ++h)
        bits_[h] =
            h < heads_ && channel < head_dim_ ? load_global16(queries_ + h * head_stride_ + channel) : 0;
    }
    // A channel has as many threads as there are for each, which take turns with the vectors of its row,
    // every channel from another on: stores of 8 neighbouring channels do not conflict.
    __device__ __forceinline__ void put(uint32_t table, int channel) const {
      constexpr int kVectors = kPitch / 16;  // of a row, with as many copies of the entry as fit
      const int parts = max(1, static_cast<int>(blockDim.x) / kChannels), part = threadIdx.x / kChannels;
      if (part >= parts) return;
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = word(i % kEntryWords);
      const uint32_t row = table + (kGuardRows + channel) * kPitch;
#pragma unroll 1
      for (int i = part; i < kVectors; i += parts)
        store(row + (i + channel * kPitch / 128) % kVectors * 16, words);
    }
    __device__ __forceinline__ uint32_t word(int i) const {
      if constexpr (kFloat) return __float_as_uint(Half<T>::low(bits_[i]));
      return 2 * i < kHeads ? bits_[2 * i] | bits_[(2 * i + 1) % kHeads] << 16 : 0;
    }

    const uint16_t* queries_;
    const int64_t head_stride_;
    const int heads_, head_dim_;
    uint32_t bits_[kHeads];  // of a channel
  };

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
  // Which of a lane's two rows is visited first: 1 %, by what ptxas makes of it.
  static constexpr bool kSecondRowFirst = kHeads == 1;
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
