// Query . key on the non-zeros: every kept value of a key fetches its channel of all queries of the group
// from a table in shared memory. Work is proportional to the values kept, products and sums are float32.
#pragma once

#include <cstdint>

#include "half.cuh"
#include "rows.cuh"
#include "shared.cuh"

namespace mustafar::cuda {

// The table has a row of kPitch bytes a channel: an entry (the channel in all kHeads queries) as often as
// fits. Each lane reads its own copy, so a gather conflicts at no choice of channels: 128 bytes are 8 copies
// of 4 heads in float32, and a quarter-warp is what loads 16 bytes a lane at once. 8 heads stay in half
// precision, for twice the bandwidth costs more than the conversions. 256 channels get half the copies, to
// leave room for tiles.
template <class T, int kChannels, int kHeads>
struct QueryTable {
  static constexpr int kPitch = kChannels == 256 ? 64 : 128;
  static constexpr int kBytes = table_bytes(kChannels, kPitch);
  static constexpr bool kFloat = kHeads <= 4;
  static constexpr int kEntryWords = kFloat ? kHeads : kHeads / 2;
  static constexpr int kEntryBytes = 4 * kEntryWords;

  // By the whole block; ends with a barrier. `scratch` is room for kHeads x head_dim words. Rows before and
  // after the channels are zeros.
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

}  // namespace mustafar::cuda
