// A tile of token rows in shared memory, one warp's own: what compressing and decompressing have in common.
//
// A lane owns a whole row, or 128 channels of one at more than 128 channels, so that counting and ranking
// its values needs no exchange between lanes. Global memory is read and written in 16-byte pieces by
// neighbouring lanes.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../params.h"

namespace mustafar::cuda {

// Shared memory by 32-bit address: one instruction an access. Volatile, so that accesses stay in order.
struct SharedWord4 {
  uint32_t words[4];
};
__device__ __forceinline__ SharedWord4 load_shared(uint32_t address) {
  SharedWord4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "r"(address));
  return v;
}
__device__ __forceinline__ void store_shared(uint32_t address, const SharedWord4& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.words[0]), "r"(v.words[1]),
               "r"(v.words[2]), "r"(v.words[3]));
}

// Brings the first `count` (0 to 8) of 8 values to shared memory, the others as zeros. An asynchronous copy
// of 16 bytes where rows are aligned to that, single values elsewhere.
__device__ __forceinline__ void copy_vector(uint32_t address, const uint16_t* from, int count) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(2 * count));
}
__device__ __forceinline__ void copy_values(uint32_t address, const uint16_t* from, int count) {
  for (int i = 0; i < kVectorValues; ++i) {
    const uint16_t value = i < count ? from[i] : uint16_t{0};
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address + 2 * i), "h"(value));
  }
}
__device__ __forceinline__ void wait_staged() {
  asm volatile("cp.async.wait_all;");
  __syncwarp();
}

// Stores those of 8 values whose bit of `keep` is set one after the other, and moves `to` past them.
__device__ __forceinline__ void append(uint32_t& to, const uint32_t* pairs, uint32_t keep) {
  asm volatile(
      "{\n .reg .pred p<8>;\n .reg .b32 t<8>;\n .reg .b16 v<8>;\n"
      " and.b32 t0, %5, 1;\n and.b32 t1, %5, 2;\n and.b32 t2, %5, 4;\n and.b32 t3, %5, 8;\n"
      " and.b32 t4, %5, 16;\n and.b32 t5, %5, 32;\n and.b32 t6, %5, 64;\n and.b32 t7, %5, 128;\n"
      " setp.ne.u32 p0, t0, 0;\n setp.ne.u32 p1, t1, 0;\n setp.ne.u32 p2, t2, 0;\n"
      " setp.ne.u32 p3, t3, 0;\n setp.ne.u32 p4, t4, 0;\n setp.ne.u32 p5, t5, 0;\n"
      " setp.ne.u32 p6, t6, 0;\n setp.ne.u32 p7, t7, 0;\n"
      " mov.b32 {v0, v1}, %1;\n mov.b32 {v2, v3}, %2;\n mov.b32 {v4, v5}, %3;\n mov.b32 {v6, v7}, %4;\n"
      " @p0 st.shared.u16 [%0], v0;\n @p0 add.u32 %0, %0, 2;\n"
      " @p1 st.shared.u16 [%0], v1;\n @p1 add.u32 %0, %0, 2;\n"
      " @p2 st.shared.u16 [%0], v2;\n @p2 add.u32 %0, %0, 2;\n"
      " @p3 st.shared.u16 [%0], v3;\n @p3 add.u32 %0, %0, 2;\n"
      " @p4 st.shared.u16 [%0], v4;\n @p4 add.u32 %0, %0, 2;\n"
      " @p5 st.shared.u16 [%0], v5;\n @p5 add.u32 %0, %0, 2;\n"
      " @p6 st.shared.u16 [%0], v6;\n @p6 add.u32 %0, %0, 2;\n"
      " @p7 st.shared.u16 [%0], v7;\n @p7 add.u32 %0, %0, 2;\n}"
      : "+r"(to)
      : "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3]), "r"(keep));
}

// A pair of values: the next one at `from` where its bit of `keep` is set, zero elsewhere. Moves `from` on.
__device__ __forceinline__ uint32_t take(uint32_t& from, uint32_t keep) {
  uint32_t pair;
  asm volatile(
      "{\n .reg .pred p<2>;\n .reg .b32 t<2>;\n .reg .b16 v<2>;\n"
      " and.b32 t0, %2, 1;\n and.b32 t1, %2, 2;\n"
      " setp.ne.u32 p0, t0, 0;\n setp.ne.u32 p1, t1, 0;\n mov.b16 v0, 0;\n mov.b16 v1, 0;\n"
      " @p0 ld.shared.u16 v0, [%1];\n @p0 add.u32 %1, %1, 2;\n"
      " @p1 ld.shared.u16 v1, [%1];\n @p1 add.u32 %1, %1, 2;\n"
      " mov.b32 %0, {v0, v1};\n}"
      : "=r"(pair), "+r"(from)
      : "r"(keep));
  return pair;
}

// Which slice a block works on, in the order of a contiguous [B, Hkv, S].
struct SliceIndex {
  int64_t number, batch, head, slice;
  __device__ __forceinline__ SliceIndex(uint32_t block, uint32_t kv_heads, uint32_t slices) : number(block) {
    const uint32_t sequence = block / slices;
    slice = block % slices;
    batch = sequence / kv_heads;
    head = sequence % kv_heads;
  }
  __device__ __forceinline__ int64_t token() const { return slice * kSliceTokens; }
  // Tokens of the slice, of `tokens` in the sequence; negative or 0 if it lies behind them.
  __device__ __forceinline__ int rows(int64_t tokens) const {
    return static_cast<int>(min(tokens - token(), int64_t{kSliceTokens}));
  }
};

// The tile of one warp. A block is the warps of one slice, so row numbers are those of the slice.
template <int kChannels>
struct RowTile {
  static constexpr int kRowLanes = kChannels > 128 ? 2 : 1;
  static constexpr int kRows = 32 / kRowLanes;
  static constexpr int kWords = kChannels / kRowLanes / 32;  // bitmap words of 32 bits a lane owns
  static constexpr int kThreads = kSliceTokens * kRowLanes;
  // An odd number of 16-byte units, so that lanes reading 16 bytes each of their own rows hit all banks.
  static constexpr int kPitch = 2 * kChannels + 16;
  static constexpr int kVectors = kChannels / kVectorValues;  // of a dense row
  static constexpr int kRowsAtOnce = 32 / kVectors;           // when a lane takes one vector of a dense row
  static constexpr int kWideWords = (kWords + 1) / 2;         // bitmap words of 64 bits a lane owns

  uint32_t base;  // of the warp's rows in shared memory
  int first_row;  // of the warp, in the slice
  int lane;
  int row;         // the lane's row in the slice
  int part;        // which 128 channels of it
  uint32_t start;  // of the lane's row

  __device__ __forceinline__ explicit RowTile(uint32_t shared) {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    // Neighbouring lanes own neighbouring rows: a half warp shares its part, for the sake of the banks.
    part = lane / kRows;
    first_row = warp * kRows;
    row = first_row + lane % kRows;
    base = shared + first_row * kPitch;
    start = shared + row * kPitch;
  }
  static constexpr int kSharedBytes = kSliceTokens * kPitch;

  // Starts to bring in the dense rows of the slice at x; zeros past head_dim and past `rows`.
  __device__ __forceinline__ void stage_rows(const uint16_t* x, int64_t token_stride, int rows,
                                             int head_dim) const {
    const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && token_stride % kVectorValues == 0;
    if (lane >= kVectors * kRowsAtOnce) return;  // 96 channels: 2 rows of 12 lanes
    const int vector = lane % kVectors;
    const int values = min(max(head_dim - kVectorValues * vector, 0), kVectorValues);
    const int first = first_row + lane / kVectors;
    const uint16_t* from = x + first * token_stride + kVectorValues * vector;
    const uint32_t to = base + lane / kVectors * kPitch + 16 * vector;
    // Rows past the end are never dereferenced: their count is 0.
    const auto stage = [&](int i, const auto& copy) {
      const int at = i * kRowsAtOnce;
      copy(to + at * kPitch, from + at * token_stride, first + at < rows ? values : 0);
    };
    if (aligned) {
#pragma unroll
      for (int i = 0; i < kRows / kRowsAtOnce; ++i) stage(i, copy_vector);
    } else {
#pragma unroll 1
      for (int i = 0; i < kRows / kRowsAtOnce; ++i) stage(i, copy_values);
    }
  }

  // Writes the dense rows of the tile, the inverse of stage_rows. All lanes' rows must be complete.
  __device__ __forceinline__ void write_rows(uint16_t* out, int rows, int head_dim) const {
    if (lane >= kVectors * kRowsAtOnce) return;
    const int vector = lane % kVectors;
    const int values = min(head_dim - kVectorValues * vector, kVectorValues);
#pragma unroll 4
    for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
      const int at = i * kRowsAtOnce + lane / kVectors;
      if (first_row + at >= rows || values <= 0) continue;
      uint16_t* to = out + int64_t{first_row + at} * head_dim + kVectorValues * vector;
      const SharedWord4 v = load_shared(base + at * kPitch + 16 * vector);
      if (head_dim % kVectorValues == 0) {
        *reinterpret_cast<uint4*>(to) = make_uint4(v.words[0], v.words[1], v.words[2], v.words[3]);
      } else {
#pragma unroll
        for (int j = 0; j < kVectorValues; ++j)
          if (j < values) to[j] = static_cast<uint16_t>(v.words[j / 2] >> 16 * (j % 2));
      }
    }
  }

  // The 32 channels of word w of the lane's part: channel c in half c % 2 of pairs[c / 2].
  __device__ __forceinline__ void read_word(int w, uint32_t (&pairs)[16]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const SharedWord4 v = load_shared(start + 256 * part + 64 * w + 16 * i);
#pragma unroll
      for (int j = 0; j < 4; ++j) pairs[4 * i + j] = v.words[j];
    }
  }

  // The sum of `count` over the lanes of the row.
  __device__ __forceinline__ int row_sum(int count) const {
    return kRowLanes == 1 ? count : count + __shfl_xor_sync(~0u, count, kRows);
  }

  // How many bits of the row's bitmap lie below each of the lane's words.
  __device__ __forceinline__ void ranks(const uint32_t (&bits)[kWords], int (&rank)[kWords]) const {
    int count = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      rank[w] = count;
      count += __popc(bits[w]);
    }
    if constexpr (kRowLanes == 2) {
      const int before = __shfl_xor_sync(~0u, count, kRows);
#pragma unroll
      for (int w = 0; w < kWords; ++w) rank[w] += part * before;
    }
  }

  // Moves the values of the lane's row whose bits are set to the row's start, in order. In place.
  __device__ __forceinline__ void compact(const uint32_t (&keep)[kWords]) const {
    uint32_t pairs[kWords][16];
#pragma unroll
    for (int w = 0; w < kWords; ++w) read_word(w, pairs[w]);
    int rank[kWords];
    ranks(keep, rank);
    __syncwarp();  // the other part of the row has been read too
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      uint32_t to = start + 2 * rank[w];
#pragma unroll
      for (int c = 0; c < 32; c += 8) append(to, pairs[w] + c / 2, keep[w] >> c);
    }
    __syncwarp();
  }

  // Writes the row's first `vectors` vectors to the slice at `values`; zeros from slot `count` on.
  __device__ __forceinline__ void write_slots(uint16_t* values, int count, int vectors) const {
#pragma unroll 4
    for (int i = part; i < vectors; i += kRowLanes) {
      SharedWord4 v = load_shared(start + 16 * i);
      const int valid = count - kVectorValues * i;
      if (valid < kVectorValues) {
#pragma unroll
        for (int j = 0; j < 4; ++j) v.words[j] &= valid > 2 * j + 1 ? ~0u : valid > 2 * j ? 0xffffu : 0u;
      }
      reinterpret_cast<uint4*>(values)[i * kSliceTokens + row] =
          make_uint4(v.words[0], v.words[1], v.words[2], v.words[3]);
    }
  }

  // Starts to bring in the row's first `vectors` vectors of the slice at `values`, the inverse of
  // write_slots.
  __device__ __forceinline__ void stage_slots(const uint16_t* values, int vectors) const {
    const bool aligned = reinterpret_cast<uintptr_t>(values) % 16 == 0;
    for (int i = part; i < vectors; i += kRowLanes) {
      const uint16_t* from = values + (i * kSliceTokens + row) * kVectorValues;
      if (aligned)
        copy_vector(start + 16 * i, from, kVectorValues);
      else
        copy_values(start + 16 * i, from, kVectorValues);
    }
  }

  // Moves the values at the row's start to the channels whose bits are set, zeros to the others; the inverse
  // of compact.
  __device__ __forceinline__ void expand(const uint32_t (&keep)[kWords]) const {
    uint32_t pairs[kWords][16];
    int rank[kWords];
    ranks(keep, rank);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      uint32_t from = start + 2 * rank[w];
#pragma unroll
      for (int c = 0; c < 32; c += 2) pairs[w][c / 2] = take(from, keep[w] >> c);
    }
    __syncwarp();  // the other part of the row has been read too
#pragma unroll
    for (int w = 0; w < kWords; ++w)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        store_shared(start + 256 * part + 64 * w + 16 * i,
                     {pairs[w][4 * i], pairs[w][4 * i + 1], pairs[w][4 * i + 2], pairs[w][4 * i + 3]});
    __syncwarp();
  }

  // The lane's words of the row's bitmap, at `bitmap` of the slice with `words` words of 64 bits a row.
  __device__ __forceinline__ void write_bits(uint64_t* bitmap, const uint32_t (&bits)[kWords],
                                             int words) const {
    const int first = part * kWideWords;
    uint64_t* to = bitmap + row * words + first;
#pragma unroll
    for (int w = 0; w < kWideWords; ++w) {
      const uint64_t high = 2 * w + 1 < kWords ? bits[2 * w + 1] : 0;
      if (first + w < words) to[w] = high << 32 | bits[2 * w];
    }
  }
  __device__ __forceinline__ void read_bits(const uint64_t* bitmap, uint32_t (&bits)[kWords],
                                            int words) const {
    const int first = part * kWideWords;
    const uint64_t* from = bitmap + row * words + first;
#pragma unroll
    for (int w = 0; w < kWideWords; ++w) {
      const uint64_t both = first + w < words ? from[w] : 0;
      bits[2 * w] = static_cast<uint32_t>(both);
      if (2 * w + 1 < kWords) bits[2 * w + 1] = static_cast<uint32_t>(both >> 32);
    }
  }

  // Channels below head_dim among the lane's, as bits.
  __device__ __forceinline__ void existing(int head_dim, uint32_t (&bits)[kWords]) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int channels = head_dim - 128 * part - 32 * w;
      bits[w] = channels >= 32 ? ~0u : channels <= 0 ? 0u : (1u << channels) - 1;
    }
  }
};

// run(std::integral_constant<int, channels>()) with the compiled number of channels that holds head_dim.
template <class Run>
void with_channels(int head_dim, const Run& run) {
  if (head_dim <= 64) return run(std::integral_constant<int, 64>());
  if (head_dim <= 96) return run(std::integral_constant<int, 96>());
  if (head_dim <= 128) return run(std::integral_constant<int, 128>());
  return run(std::integral_constant<int, 256>());
}

}  // namespace mustafar::cuda
