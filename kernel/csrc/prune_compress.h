// Per-token magnitude pruning and packing in one pass.
#pragma once

#include <cuda_runtime.h>

#include "../params.h"

namespace mustafar::cuda {

// Keeps the k largest magnitudes of each row, ties to the lowest channel, NaN above infinity; uniform layout.
struct PruneCompressParams {
  const void* x;     // [B, Hkv, T, D], last dim contiguous, any alignment
  uint64_t* bitmap;  // [B, Hkv, S, 64, W] contiguous
  void* values;      // [B, Hkv, S, width / 8, 64, 8] contiguous, aligned to 16 bytes
  int64_t tokens;    // T
  int64_t x_batch_stride, x_head_stride, x_token_stride;
  int32_t batch, kv_heads, head_dim, slices;
  int32_t k;      // values kept per row, 1 to D
  int32_t width;  // k rounded up to a multiple of 8
  DType dtype;
};

// On `stream` of the current device. Nothing is allocated or synchronised; every byte of the outputs is
// written. Any head_dim from 1 to 256, float16 and bfloat16.
cudaError_t prune_compress(const PruneCompressParams& params, cudaStream_t stream);

}  // namespace mustafar::cuda
