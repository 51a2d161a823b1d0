// Probabilities times compressed values: the second of the paper's two batched SpMVs.
#pragma once

#include <cuda_runtime.h>

#include "../params.h"

namespace mustafar::cuda {

// Bytes of ValueOutputParams::workspace for these shapes on the current device, -1 without one. 16-byte
// aligned.
int64_t value_output_workspace_bytes(int batch, int q_heads, int kv_heads, int head_dim, int slices);

// out[b, h, d] = sum over t of p[b, h, t] V[b, h / G, t, d], float32 sums in a fixed order, on `stream` of
// the current device. Nothing is allocated or synchronised. head_dim is a multiple of 8 up to 256.
cudaError_t value_output(const ValueOutputParams& params, cudaStream_t stream);

}  // namespace mustafar::cuda
