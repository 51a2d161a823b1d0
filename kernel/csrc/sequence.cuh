// What a sequence's lengths, padding and sliding window leave to read, and how it is dealt to teams of warps.
#pragma once

#include <cstdint>

#include "../params.h"
#include "plan.cuh"
#include "rows.cuh"

namespace mustafar::cuda {

// What memory says of a sequence: asked for early, and used late.
struct Lengths {
  int32_t compressed, window, start;

  __device__ __forceinline__ Lengths(const DecodeAttentionParams& p, int64_t b)
      : compressed(load_global32(p.lengths + 2 * b)),
        window(load_global32(p.lengths + 2 * b + 1)),
        start(p.starts == nullptr ? 0 : load_global32(p.starts + b)) {}
};

// Positions of a sequence that can be seen.
struct Sequence {
  int32_t first_visible, compressed, total;  // positions
  int32_t first_slice, slices;               // with something visible
  int32_t first_chunk, chunks;               // 64 window tokens each, with something visible

  __device__ __forceinline__ Sequence(const DecodeAttentionParams& p, const Lengths& lengths) {
    compressed = max(0, min(uniform(lengths.compressed), p.slices * kSliceTokens));
    total = compressed + max(0, min(uniform(lengths.window), p.window_capacity));
    first_visible = max(0, uniform(lengths.start));
    if (p.sliding_window > 0) first_visible = max(first_visible, total - p.sliding_window);
    pieces(first_visible, compressed, &first_slice, &slices);
    pieces(max(0, first_visible - compressed), total - compressed, &first_chunk, &chunks);
  }

  __device__ __forceinline__ bool nothing_visible() const { return first_visible >= total; }

  // Whether token `token` of the window may be attended to.
  __device__ __forceinline__ bool in_window(int token) const {
    return token >= first_visible - compressed && token < total - compressed;
  }

  // Deals the window's chunks and then the slices, one after another, to `teams` teams: team `self` takes
  // chunks self, self + teams, ..., and then these slices.
  __device__ __forceinline__ Share deal(int self, int teams) const {
    int turns = 0;
#pragma unroll 1
    for (int i = self; i < chunks; i += teams) ++turns;
    return {first_slice + self + turns * teams - chunks, first_slice + slices, teams, first_visible,
            compressed};
  }

 private:
  static __device__ __forceinline__ int32_t uniform(int32_t x) {
    return __shfl_sync(kFullWarp, x, 0);  // so that the compiler knows it uniform
  }
  static __device__ __forceinline__ void pieces(int begin, int end, int32_t* first, int32_t* count) {
    *first = begin / kSliceTokens;
    *count = begin < end ? (end + kSliceTokens - 1) / kSliceTokens - *first : 0;
  }
};

// The dense window of one KV head.
struct DenseWindow {
  const char* rows;
  int64_t token_bytes;

  __device__ __forceinline__ DenseWindow(const void* window, int64_t b, int64_t batch_stride, int h,
                                         int64_t head_stride, int64_t token_stride)
      : rows(static_cast<const char*>(window) + (b * batch_stride + h * head_stride) * 2),
        token_bytes(token_stride * 2) {}

  __device__ __forceinline__ const char* row(int token) const { return rows + token * token_bytes; }
};

}  // namespace mustafar::cuda
