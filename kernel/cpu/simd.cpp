#include "simd.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace mustafar::cpu {
namespace {

struct Level {
  const char* name;
  const Kernels& (*kernels)();  // null where the compiler did not know the instructions
  bool (*supported)();          // by this machine
};

const Kernels& plain() { return kPlainKernels; }
#if MUSTAFAR_X86
const Kernels& avx2() { return kAvx2Kernels; }
// Every CPU with AVX2 has F16C, which not all compilers can ask for.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
const Kernels& avx512() { return kAvx512Kernels; }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi2");
}
#endif
#if MUSTAFAR_AVX512BF16
const Kernels& avx512bf16() {
  static const Kernels kernels = avx512bf16_kernels();
  return kernels;
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// Best first.
const Level kLevels[] = {
#if MUSTAFAR_AVX512BF16
    {"avx512bf16", avx512bf16, has_avx512bf16},
#else
    {"avx512bf16", nullptr, nullptr},
#endif
#if MUSTAFAR_X86
    {"avx512", avx512, has_avx512},
    {"avx2", avx2, has_avx2},
#else
    {"avx512", nullptr, nullptr},
    {"avx2", nullptr, nullptr},
#endif
    {"plain", plain, [] { return true; }},
};

}  // namespace

const Kernels& kernels() {
  const char* limit = std::getenv("MUSTAFAR_SIMD");
  bool below_limit = limit == nullptr || *limit == '\0';
  for (const Level& level : kLevels) {
    below_limit = below_limit || std::strcmp(level.name, limit) == 0;
    if (below_limit && level.kernels != nullptr && level.supported()) return level.kernels();
  }
  throw std::invalid_argument("MUSTAFAR_SIMD: expected avx512bf16, avx512, avx2 or plain, got " +
                              std::string(limit));
}

const char* simd_level() { return kernels().name; }

}  // namespace mustafar::cpu
