// Packing the non-zeros of any pattern, in two passes and a scan between them.
#pragma once

#include <cuda_runtime.h>

#include "../params.h"

namespace mustafar::cuda {

// Keeps x != 0 (NaN included); general layout. The size of the values is known after the first call only.
struct CompressParams {
  const void* x;     // [B, Hkv, T, D], last dim contiguous, any alignment
  uint64_t* bitmap;  // [B, Hkv, S, 64, W] contiguous; written by count, read by fill
  int32_t* widths;   // [B, Hkv, S] contiguous; written by count, read by fill
  int64_t* offsets;  // [B, Hkv, S] contiguous and one entry more, the size of the values; likewise
  void* values;      // [N], aligned to 16 bytes; fill only
  int64_t tokens;    // T
  int64_t x_batch_stride, x_head_stride, x_token_stride;
  int32_t batch, kv_heads, head_dim, slices;
  DType dtype;
};

// On `stream` of the current device. Nothing is allocated or synchronised; every byte of the outputs is
// written. Any head_dim from 1 to 256, float16 and bfloat16.
cudaError_t compress_count(const CompressParams& params, cudaStream_t stream);
cudaError_t compress_fill(const CompressParams& params, cudaStream_t stream);

}  // namespace mustafar::cuda
