// decompress: one work item is one slice.
#include <algorithm>
#include <cstring>

#include "ops.h"
#include "packed.h"
#include "simd.h"

namespace mustafar::cpu {

void decompress(const DecompressParams& p, const ParallelFor& parallel) {
  const Kernels& kernel = kernels();
  const auto expand = kernel.expand[static_cast<int>(p.dtype)];
  const PackedReader reader(p.in, p.head_dim, p.dtype);
  const int64_t row_bytes = p.head_dim * element_size(p.dtype);
  parallel(static_cast<int64_t>(p.batch) * p.kv_heads * p.slices, [&](int64_t begin, int64_t end) {
    FloatBuffer padded(kTileRows * reader.pitch());  // rows that do not end with a group of channels
    for (int64_t i = begin; i < end; ++i) {
      const int64_t s = i % p.slices, head = i / p.slices;
      const int64_t first = s * kSliceTokens, last = std::min(first + kSliceTokens, p.tokens);
      for (int64_t token = first; token < last; token += kTileRows) {
        const int rows = static_cast<int>(std::min<int64_t>(kTileRows, last - token));
        const PackedRows in = reader.rows(head / p.kv_heads, head % p.kv_heads, token, rows);
        char* out = at(p.out, (head * p.tokens + token) * p.head_dim, p.dtype);
        if (reader.pitch() == p.head_dim) {
          expand(in, out, p.head_dim);
          continue;
        }
        expand(in, padded.get(), reader.pitch());
        for (int r = 0; r < rows; ++r) {
          std::memcpy(out + r * row_bytes, at(padded.get(), r * reader.pitch(), p.dtype), row_bytes);
        }
      }
    }
  });
}

}  // namespace mustafar::cpu
