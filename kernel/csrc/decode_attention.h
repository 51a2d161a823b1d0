// One decode step of attention over a compressed cache and a dense window, in one pass.
#pragma once

#include <cuda_runtime.h>

#include "../params.h"

namespace mustafar::cuda {

// Bytes of DecodeAttentionParams::workspace for these shapes on the current device, -1 without one.
// 16-byte aligned; its contents need no initialisation and are left undefined.
int64_t decode_attention_workspace_bytes(int batch, int q_heads, int kv_heads, int head_dim, int slices,
                                         int window_capacity);

// out = softmax(scale q K^T) V over the visible tokens of every sequence (params.h), on `stream` of the
// current device. float32 softmax and sums, the same bits on every run. Nothing is allocated or synchronised,
// and lengths and starts are read on the device, so that a captured graph follows them. head_dim is a
// multiple of 8 up to 256; window rows are aligned to 16 bytes.
cudaError_t decode_attention(const DecodeAttentionParams& params, cudaStream_t stream);

}  // namespace mustafar::cuda
