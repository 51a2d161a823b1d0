#include <vector>

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

  std::vector<Chunk> chunks;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.kv_heads; ++h) append_chunks(chunks, b, h, 0, p.tokens, false);
  }
  const FloatBuffer sums(static_cast<int64_t>(chunks.size()) * group * pitch);  // [chunks, G, pitch]
  parallel(static_cast<int64_t>(chunks.size()), [&](int64_t begin, int64_t end) {
    const ChunkScratch scratch(group, pitch);
    for (int64_t i = begin; i < end; ++i) {
      const Chunk& chunk = chunks[i];
      for (int64_t g = 0; g < group; ++g) {
        const int64_t start =
            chunk.b * p.p_batch_stride + (chunk.h * group + g) * p.p_head_stride + chunk.begin;
        kernel.to_float[dtype](at(p.p, start, p.dtype), scratch.scores.get() + g * kScoresPitch,
                               chunk.end - chunk.begin);
      }
      values.weigh(chunk, scratch.scores.get(), group, scratch.tile.get(), sums.get() + i * group * pitch);
    }
  });

  const int64_t per_head = (p.tokens + kChunkTokens - 1) / kChunkTokens;
  parallel(static_cast<int64_t>(p.batch) * p.kv_heads, [&](int64_t begin, int64_t end) {
    std::vector<float> total(group * pitch);
    for (int64_t i = begin; i < end; ++i) {
      std::fill(total.begin(), total.end(), 0.0f);
      for (int64_t chunk = i * per_head; chunk < (i + 1) * per_head; ++chunk) {
        const float* part = sums.get() + chunk * group * pitch;
        for (int64_t c = 0; c < group * pitch; ++c) total[c] += part[c];
      }
      for (int64_t g = 0; g < group; ++g) {
        const int64_t head = i % p.kv_heads * group + g;
        const int64_t start = i / p.kv_heads * p.out_batch_stride + head * p.out_head_stride;
        kernel.from_float[dtype](total.data() + g * pitch, at(p.out, start, p.dtype), p.head_dim);
      }
    }
  });
}

}  // namespace mustafar::cpu
