// What the CUDA implementations of the ops share.
#pragma once

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

namespace mustafar {

// Raises what a kernel's host function returned.
inline void check_launch(cudaError_t error, const char* op) {
  TORCH_CHECK(error == cudaSuccess, "mustafar::", op, ": ", cudaGetErrorString(error));
}

}  // namespace mustafar
