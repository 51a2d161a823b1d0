// The dense rows of a compressed tensor.
#pragma once

#include <cuda_runtime.h>

#include "../params.h"

namespace mustafar::cuda {

struct DecompressParams {
  CompressedView in;  // of T tokens or more, either layout; values aligned to 16 bytes
  void* out;          // [B, Hkv, T, D] contiguous, aligned to 16 bytes
  int64_t tokens;     // T
  int32_t batch, kv_heads, head_dim;
  DType dtype;
};

// On `stream` of the current device. Nothing is allocated or synchronised; every byte of the output is
// written. Any head_dim from 1 to 256, float16 and bfloat16.
cudaError_t decompress(const DecompressParams& params, cudaStream_t stream);

}  // namespace mustafar::cuda
