// One decoded token into a cache of fixed size, without the host: counters, then each layer.
#pragma once

#include <cuda_runtime.h>

#include "../window.h"

namespace mustafar::cuda {

// Both on `stream` of the current device. Nothing is allocated or synchronised, so that a graph may capture
// them. Where no pruning is due, window_append writes one row and ends.
cudaError_t window_advance(const WindowAdvanceParams& params, cudaStream_t stream);

// Any head_dim from 1 to 256, float16 and bfloat16, any alignment. Selection as in prune_compress: the
// largest magnitudes, ties to the lowest channel, NaN above infinity.
cudaError_t window_append(const WindowAppendParams& params, cudaStream_t stream);

}  // namespace mustafar::cuda
