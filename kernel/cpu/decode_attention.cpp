#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "chunk.h"
#include "ops.h"
#include "simd.h"

namespace mustafar::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Softmax over one chunk alone. Weights are exp(score - max) before the division by their sum.
struct Partial {
  float max, sum;
};

// The visible tokens of every sequence.
Plan visible_tokens(const DecodeAttentionParams& p) {
  Plan plan;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t packed = p.lengths[2 * b], recent = p.lengths[2 * b + 1], total = packed + recent;
    const int64_t capacity = int64_t{p.slices} * kSliceTokens;
    if (packed < 0 || packed > capacity || recent < 0 || recent > p.window_capacity) {
      throw std::out_of_range("lengths[" + std::to_string(b) + "]: expected at most " +
                              std::to_string(capacity) + " compressed and " +
                              std::to_string(p.window_capacity) + " window tokens, got " +
                              std::to_string(packed) + " and " + std::to_string(recent));
    }
    int64_t start = p.starts != nullptr ? std::max<int64_t>(p.starts[b], 0) : 0;
    if (p.sliding_window > 0) start = std::max(start, total - p.sliding_window);
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      plan.add(b, h, start, packed, false);
      plan.add(b, h, std::max<int64_t>(start - packed, 0), recent, true);
      plan.close_head();
    }
  }
  return plan;
}

// Weighted sums of the values of one query head over several chunks: one softmax over all of them.
// parts and sums are `stride` and `stride * pitch` apart from chunk to chunk.
void combine(const Partial* parts, const float* sums, int64_t chunks, int64_t stride, int64_t pitch,
             float* out) {
  std::fill_n(out, pitch, 0.0f);
  if (chunks == 0) return;  // nothing visible
  float max = -kInf;
  for (int64_t i = 0; i < chunks; ++i) max = std::max(max, parts[i * stride].max);
  // Only -inf: their weights are 0 and the division below makes NaN of them, as a softmax does.
  if (max == -kInf) max = 0;
  float sum = 0;
  for (int64_t i = 0; i < chunks; ++i) {
    const float weight = std::exp(parts[i * stride].max - max);
    sum += weight * parts[i * stride].sum;
    const float* part = sums + i * stride * pitch;
    for (int64_t c = 0; c < pitch; ++c) out[c] += weight * part[c];
  }
  const float scale = 1 / sum;
  for (int64_t c = 0; c < pitch; ++c) out[c] *= scale;
}

}  // namespace

void decode_attention(const DecodeAttentionParams& p, const ParallelFor& parallel) {
  const Kernels& kernel = kernels();
  const WindowView k_window{p.k_window, p.k_window_batch_stride, p.k_window_head_stride,
                            p.k_window_token_stride};
  const WindowView v_window{p.v_window, p.v_window_batch_stride, p.v_window_head_stride,
                            p.v_window_token_stride};
  const ChunkReader keys(kernel, p.key, k_window, p.head_dim, p.dtype);
  const ChunkReader values(kernel, p.value, v_window, p.head_dim, p.dtype);
  const int64_t pitch = keys.pitch();
  const int group = p.q_heads / p.kv_heads;

  const Plan plan = visible_tokens(p);
  std::vector<Partial> parts(plan.count() * group);               // [chunks, G]
  float* const sums = kept_floats(plan.count() * group * pitch);  // [chunks, G, pitch]
  const auto attend = [&](int64_t i, const ChunkScratch& scratch) {
    const Chunk& chunk = plan.chunks[i];
    float* const scores = scratch.scores.get();
    load_queries(kernel, at(p.q, chunk.b * p.q_batch_stride + chunk.h * group * p.q_head_stride, p.dtype),
                 p.q_head_stride, group, p.head_dim, pitch, p.dtype, scratch.queries.get());
    keys.score(chunk, scratch.queries.get(), group, scratch.tile.get(), scores);
    for (int64_t g = 0; g < group; ++g) {
      Partial& part = parts[i * group + g];
      kernel.softmax(scores + g * kScoresPitch, chunk.end - chunk.begin, p.scale, &part.max, &part.sum);
    }
    values.weigh(chunk, scores, group, scratch.tile.get(), sums + i * group * pitch);
  };
  const auto combine_head = [&](int64_t head, const ChunkScratch& scratch) {
    const int64_t first = plan.first[head], chunks = plan.first[head + 1] - first;
    float* const out = scratch.result.get();
    for (int64_t g = 0; g < group; ++g) {
      combine(parts.data() + first * group + g, sums + (first * group + g) * pitch, chunks, group, pitch,
              out);
      const int64_t start =
          head / p.kv_heads * p.out_batch_stride + (head % p.kv_heads * group + g) * p.out_head_stride;
      kernel.from_float[static_cast<int>(p.dtype)](out, at(p.out, start, p.dtype), p.head_dim);
    }
  };
  for_each_chunk(plan, group, pitch, parallel, attend, combine_head);
}

}  // namespace mustafar::cpu
