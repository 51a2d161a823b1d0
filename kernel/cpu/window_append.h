// One decoded token into a cache of fixed size, on a CPU.
#pragma once

#include "../window.h"
#include "parallel.h"

namespace mustafar::cpu {

void window_advance(const WindowAdvanceParams& params);
void window_append(const WindowAppendParams& params, const ParallelFor& parallel);

}  // namespace mustafar::cpu
