// The ops on a CPU. Raw pointers in, no framework; arguments are checked by the caller.
//
// Every op is deterministic and its result does not depend on the number of threads: work is cut into chunks
// of fixed size, and partial results are combined in order.
#pragma once

#include <cstdint>

#include "../params.h"
#include "parallel.h"

namespace mustafar::cpu {

// Keeps the k largest magnitudes of each row; uniform layout. Every byte of the outputs is written.
struct PruneCompressParams {
  const void* x;     // [B, Hkv, T, D], last dim contiguous
  uint64_t* bitmap;  // [B, Hkv, S, 64, W] contiguous
  void* values;      // [B, Hkv, S, width / 8, 64, 8] contiguous
  int64_t tokens;    // T
  int64_t x_batch_stride, x_head_stride, x_token_stride;
  int32_t batch, kv_heads, head_dim, slices;
  int32_t k;      // values kept per row, 0 to D
  int32_t width;  // k rounded up to a multiple of 8
  DType dtype;
};
void prune_compress(const PruneCompressParams& params, const ParallelFor& parallel);

// Keeps x != 0 (NaN included); general layout in two passes, for the size of the values is only known after
// the first one. Between them the caller turns widths into offsets and allocates the values.
struct CompressParams {
  const void* x;           // [B, Hkv, T, D], last dim contiguous
  uint64_t* bitmap;        // [B, Hkv, S, 64, W] contiguous; written by pass 1, read by pass 2
  int32_t* widths;         // [B, Hkv, S] contiguous; written by pass 1, read by pass 2
  const int64_t* offsets;  // [B, Hkv, S] contiguous; pass 2 only: first value of each slice
  void* values;            // [N]; pass 2 only
  int64_t tokens;          // T
  int64_t x_batch_stride, x_head_stride, x_token_stride;
  int32_t batch, kv_heads, head_dim, slices;
  DType dtype;
};
void compress_count(const CompressParams& params, const ParallelFor& parallel);
void compress_fill(const CompressParams& params, const ParallelFor& parallel);

struct DecompressParams {
  CompressedView in;  // of T tokens
  void* out;          // [B, Hkv, T, D] contiguous
  int64_t tokens;     // T
  int32_t batch, kv_heads, head_dim, slices;
  DType dtype;
};
void decompress(const DecompressParams& params, const ParallelFor& parallel);

void key_scores(const KeyScoresParams& params, const ParallelFor& parallel);
void value_output(const ValueOutputParams& params, const ParallelFor& parallel);
void decode_attention(const DecodeAttentionParams& params, const ParallelFor& parallel);

// "avx512", "avx2" or "plain": the best this machine has, or less if the environment variable MUSTAFAR_SIMD
// names one of them. Read anew by every op. Throws std::invalid_argument on any other name.
const char* simd_level();

}  // namespace mustafar::cpu
