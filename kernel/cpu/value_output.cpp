#include <algorithm>

#include "chunk.h"
#include "ops.h"
#include "simd.h"

namespace mustafar::cpu {

void value_output(const ValueOutputParams& p, const ParallelFor& parallel) {
  const Kernels& kernel = kernels();
  const int dtype = static_cast<int>(p.dtype);
  const ChunkReader values(kernel, p.value, {}, p.head_dim, p.dtype);
  const int64_t pitch = values.pitch();
  const int group = p.q_heads / p.kv_heads;

  const Plan plan = Plan::over_tokens(p.batch, p.kv_heads, p.tokens);
  float* const sums = kept_floats(plan.count() * group * pitch);  // [chunks, G, pitch]
  const auto work = [&](int64_t i, const ChunkScratch& scratch) {
    const Chunk& chunk = plan.chunks[i];
    for (int64_t g = 0; g < group; ++g) {
      const int64_t start =
          chunk.b * p.p_batch_stride + (chunk.h * group + g) * p.p_head_stride + chunk.begin;
      kernel.to_float[dtype](at(p.p, start, p.dtype), scratch.scores.get() + g * kScoresPitch,
                             chunk.end - chunk.begin);
    }
    values.weigh(chunk, scratch.scores.get(), group, scratch.tile.get(), sums + i * group * pitch);
  };
  const auto add_up = [&](int64_t head, const ChunkScratch& scratch) {
    float* const total = scratch.result.get();
    std::fill_n(total, group * pitch, 0.0f);
    for (int64_t i = plan.first[head]; i < plan.first[head + 1]; ++i) {
      const float* part = sums + i * group * pitch;
      for (int64_t c = 0; c < group * pitch; ++c) total[c] += part[c];
    }
    for (int64_t g = 0; g < group; ++g) {
      const int64_t start =
          head / p.kv_heads * p.out_batch_stride + (head % p.kv_heads * group + g) * p.out_head_stride;
      kernel.from_float[dtype](total + g * pitch, at(p.out, start, p.dtype), p.head_dim);
    }
  };
  for_each_chunk(plan, group, pitch, parallel, work, add_up);
}

}  // namespace mustafar::cpu
