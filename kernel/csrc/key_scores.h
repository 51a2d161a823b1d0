// Query times compressed keys: the first of the paper's two batched SpMVs.
#pragma once

#include <cuda_runtime.h>

#include "../params.h"

namespace mustafar::cuda {

// scores[b, h, t] = q[b, h] . K[b, h / G, t], float32 sums, on `stream` of the current device. Nothing is
// allocated or synchronised. head_dim is a multiple of 8 up to 256.
cudaError_t key_scores(const KeyScoresParams& params, cudaStream_t stream);

}  // namespace mustafar::cuda
