// CUDA implementations of window_advance and window_append. Compiled only where torch has CUDA.
#include "../../kernel/csrc/window_append.h"
#include "checks_window.h"
#include "launch.h"

namespace mustafar {
namespace {

void window_advance(const at::Tensor& state, const at::Tensor& lengths, const at::Tensor& total,
                    int64_t residual, int64_t flush_every, int64_t max_length) {
  const c10::cuda::CUDAGuard guard(state.device());
  const auto p = window_advance_params(state, lengths, total, residual, flush_every, max_length);
  check_launch(cuda::window_advance(p, at::cuda::getCurrentCUDAStream()), "window_advance");
}

void window_append(const at::Tensor& k, const at::Tensor& v, const at::Tensor& k_bitmap,
                   const at::Tensor& k_values, const at::Tensor& v_bitmap, const at::Tensor& v_values,
                   const at::Tensor& k_window, const at::Tensor& v_window, const at::Tensor& state,
                   int64_t k_kept, int64_t v_kept) {
  const c10::cuda::CUDAGuard guard(k.device());
  const auto p = window_append_params(k, v, k_bitmap, k_values, v_bitmap, v_values, k_window, v_window, state,
                                      k_kept, v_kept);
  check_launch(cuda::window_append(p, at::cuda::getCurrentCUDAStream()), "window_append");
}

}  // namespace

TORCH_LIBRARY_IMPL(mustafar, CUDA, m) {
  m.impl("window_advance", &window_advance);
  m.impl("window_append", &window_append);
}

}  // namespace mustafar
