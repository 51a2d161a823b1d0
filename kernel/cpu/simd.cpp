#include "simd.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace mustafar::cpu {
namespace {

// Best first.
const Kernels* const kLevels[] = {
#if MUSTAFAR_X86
    &kAvx512Kernels,
    &kAvx2Kernels,
#endif
    &kPlainKernels,
};

bool supported(const Kernels* level) {
#if MUSTAFAR_X86
  if (level == &kAvx512Kernels) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi2");
  }
  // Every CPU with AVX2 has F16C, which not all compilers can ask for.
  if (level == &kAvx2Kernels) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return level == &kPlainKernels;
}

}  // namespace

const Kernels& kernels() {
  const char* limit = std::getenv("MUSTAFAR_SIMD");
  bool below_limit = limit == nullptr || *limit == '\0';
  for (const Kernels* level : kLevels) {
    below_limit = below_limit || std::strcmp(level->name, limit) == 0;
    if (below_limit && supported(level)) return *level;
  }
  // Names of levels that this build does not have are no error: they limit nothing.
  if (std::strcmp(limit, "avx512") == 0 || std::strcmp(limit, "avx2") == 0) return kPlainKernels;
  throw std::invalid_argument("MUSTAFAR_SIMD: expected avx512, avx2 or plain, got " + std::string(limit));
}

const char* simd_level() { return kernels().name; }

}  // namespace mustafar::cpu
