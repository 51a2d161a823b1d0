// How the ops spread work over threads: the caller brings the loop.
//
// The binding passes at::parallel_for, which follows torch.set_num_threads; a test may pass a plain call.
#pragma once

#include <cstdint>
#include <functional>

namespace mustafar::cpu {

// Calls the body on ranges that together cover [0, n) once, on any threads, and returns when all are done.
// No result depends on how the range is cut.
using ParallelFor =
    std::function<void(int64_t n, const std::function<void(int64_t begin, int64_t end)>& body)>;

}  // namespace mustafar::cpu
