// Query . key on the non-zeros: every kept value of a key fetches its channel of all queries of the group
// from a table in shared memory. Work is proportional to the values kept, products and sums are float32.
#pragma once

#include <cstdint>

#include "half.cuh"
#include "rows.cuh"

namespace mustafar::cuda {

// The table has a row of kPitch bytes a channel: an entry (the channel in all kHeads queries) as often as
// fits. Each lane reads its own copy, so a gather conflicts at no choice of channels: 128 bytes are 16 copies
// of 4 heads, and a half-warp is what loads 8 bytes a lane at once. 256 channels get half the copies to leave
// room for tiles. One head is stored as float32, which saves the conversion and costs no bandwidth.
template <class T, int kChannels, int kHeads>
struct QueryTable {
  static constexpr int kPitch = kChannels == 256 ? 64 : 128;
  static constexpr int kBytes = table_bytes(kChannels, kPitch);
  static constexpr int kEntryWords = kHeads == 1 ? 1 : kHeads / 2;
  static constexpr int kEntryBytes = 4 * kEntryWords;

  // By the whole block, without barriers: rows before and after the channels are zeros.
  static __device__ __forceinline__ void fill(char* shared, const T* queries, int64_t head_stride, int heads,
                                              int head_dim) {
    constexpr int kRowWords = kPitch / 4;
    constexpr int kRows = kBytes / kPitch;
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(queries);
    uint32_t* table = reinterpret_cast<uint32_t*>(shared);
#pragma unroll 8
    for (int i = threadIdx.x; i < kRows * kRowWords; i += blockDim.x) {
      const int channel = i / kRowWords - kGuardRows, head = i % kEntryWords * 2;
      uint32_t word = 0;
      if (channel >= 0 && channel < head_dim) {
        if (head < heads) word = __ldg(bits + head * head_stride + channel);
        if (head + 1 < heads) word |= uint32_t{__ldg(bits + (head + 1) * head_stride + channel)} << 16;
        if constexpr (kHeads == 1) word = __float_as_uint(Half<T>::low(word));
      }
      table[i] = word;
    }
  }

  // This lane's copy of channel 0.
  static __device__ __forceinline__ uint32_t column(int lane) {
    return kGuardRows * kPitch + lane % (kPitch / kEntryBytes) * kEntryBytes;
  }

  // sums[head] += query[head][channel at offset] * key
  static __device__ __forceinline__ void add(float (&sums)[kHeads], const char* shared, uint32_t offset,
                                             float key) {
    if constexpr (kHeads == 1) {
      sums[0] = fmaf(*reinterpret_cast<const float*>(shared + offset), key, sums[0]);
    } else {
      const Entry entry = *reinterpret_cast<const Entry*>(shared + offset);
#pragma unroll
      for (int i = 0; i < kEntryWords; ++i) {
        sums[2 * i] = fmaf(Half<T>::low(entry.words[i]), key, sums[2 * i]);
        sums[2 * i + 1] = fmaf(Half<T>::high(entry.words[i]), key, sums[2 * i + 1]);
      }
    }
  }

 private:
  struct alignas(kEntryBytes) Entry {
    uint32_t words[kEntryWords];
  };
};

}  // namespace mustafar::cuda
