// prune_compress and compress (in two passes): one work item is one slice.
#include <algorithm>

#include "ops.h"
#include "packed.h"
#include "simd.h"

namespace mustafar::cpu {
namespace {

// The tokens of slice i of [B, Hkv, S]; both structs of compression have these fields.
template <class Params>
DenseRows slice_rows(const Params& p, int64_t i) {
  const int64_t s = i % p.slices, h = i / p.slices % p.kv_heads, b = i / p.slices / p.kv_heads;
  const int64_t first = s * kSliceTokens;
  const int64_t start = b * p.x_batch_stride + h * p.x_head_stride + first * p.x_token_stride;
  const int64_t rows = std::min<int64_t>(kSliceTokens, p.tokens - first);
  return {at(p.x, start, p.dtype), p.x_token_stride, static_cast<int32_t>(rows), p.head_dim};
}

template <class Params>
int64_t slice_count(const Params& p) {
  return static_cast<int64_t>(p.batch) * p.kv_heads * p.slices;
}

}  // namespace

void prune_compress(const PruneCompressParams& p, const ParallelFor& parallel) {
  const Kernels& kernel = kernels();
  const int dtype = static_cast<int>(p.dtype);
  const int64_t words = words_for(p.head_dim);
  parallel(slice_count(p), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const DenseRows rows = slice_rows(p, i);
      uint64_t* bitmap = p.bitmap + i * kSliceTokens * words;
      kernel.top_bitmap[dtype](rows, p.k, bitmap);
      kernel.pack[dtype](rows, bitmap, p.width, at(p.values, i * kSliceTokens * p.width, p.dtype));
    }
  });
}

void compress_count(const CompressParams& p, const ParallelFor& parallel) {
  const Kernels& kernel = kernels();
  const int64_t words = words_for(p.head_dim);
  parallel(slice_count(p), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      uint64_t* bitmap = p.bitmap + i * kSliceTokens * words;
      const int fullest = kernel.nonzero_bitmap[static_cast<int>(p.dtype)](slice_rows(p, i), bitmap);
      p.widths[i] = static_cast<int32_t>(round_up(fullest, kVectorValues));
    }
  });
}

void compress_fill(const CompressParams& p, const ParallelFor& parallel) {
  const Kernels& kernel = kernels();
  const int64_t words = words_for(p.head_dim);
  parallel(slice_count(p), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (p.widths[i] == 0) continue;
      kernel.pack[static_cast<int>(p.dtype)](slice_rows(p, i), p.bitmap + i * kSliceTokens * words,
                                             p.widths[i], at(p.values, p.offsets[i], p.dtype));
    }
  });
}

}  // namespace mustafar::cpu
