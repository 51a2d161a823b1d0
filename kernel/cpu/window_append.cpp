// The device's part is done by two ops that exist: rows are selected and packed by prune_compress, straight
// into the slices of the cache; of the rows that stay in the window only the bitmaps are taken.
#include "window_append.h"

#include <cstring>
#include <vector>

#include "ops.h"
#include "packed.h"

namespace mustafar::cpu {
namespace {

void alone(int64_t n, const std::function<void(int64_t, int64_t)>& body) { body(0, n); }

// Keys or values of one KV head.
class Head {
 public:
  Head(const WindowAppendParams& p, const WindowSide& side, int64_t b, int64_t h)
      : p_(p),
        side_(side),
        words_(words_for(p.head_dim)),
        window_(at(side.window, b * side.window_batch_stride + h * side.window_head_stride, p.dtype)),
        x_(at(side.x, b * side.x_batch_stride + h * side.x_head_stride, p.dtype)),
        bitmap_(side.bitmap + b * side.bitmap_batch_stride + h * side.bitmap_head_stride),
        values_(at(side.values, b * side.values_batch_stride + h * side.values_head_stride, p.dtype)) {}

  void step() {
    if (p_.state[kPruneRows] > 0) flush();
    const int32_t slot = p_.state[kSlot];
    if (slot >= 0 && slot < p_.window_capacity) std::memcpy(row(slot), x_, row_bytes());
  }

 private:
  char* row(int64_t r) const {
    return at(static_cast<void*>(window_), r * side_.window_token_stride, p_.dtype);
  }
  int64_t row_bytes() const { return p_.head_dim * element_size(p_.dtype); }

  void pack(int64_t first, int64_t rows, uint64_t* bitmap, void* values) const {
    PruneCompressParams c{};
    c.x = row(first), c.bitmap = bitmap, c.values = values;
    c.tokens = rows;
    c.x_token_stride = side_.window_token_stride;
    c.batch = c.kv_heads = 1;
    c.head_dim = p_.head_dim;
    c.slices = static_cast<int32_t>((rows + kSliceTokens - 1) / kSliceTokens);
    c.k = side_.kept, c.width = side_.width;
    c.dtype = p_.dtype;
    prune_compress(c, alone);
  }

  void flush() const {
    const int64_t flushed = p_.state[kFlushRows], last = p_.state[kPruneRows], held = p_.state[kOldWindow];
    if (flushed > 0) {
      const int64_t slice = (p_.state[kPacked] - flushed) / kSliceTokens;
      pack(0, flushed, bitmap_ + slice * kSliceTokens * words_,
           at(static_cast<void*>(values_), slice * kSliceTokens * side_.width, p_.dtype));
    }
    if (last > flushed) zero_pruned(flushed, last - flushed);
    for (int64_t r = flushed; flushed > 0 && r < held; ++r) {
      std::memmove(row(r - flushed), row(r), row_bytes());
    }
  }

  // Fewer rows than a slice has.
  void zero_pruned(int64_t first, int64_t rows) const {
    std::vector<uint64_t> bitmap(static_cast<size_t>(kSliceTokens) * words_);
    std::vector<char> values(static_cast<size_t>(kSliceTokens) * side_.width * element_size(p_.dtype));
    pack(first, rows, bitmap.data(), values.data());
    for (int64_t r = 0; r < rows; ++r) {
      for (int channel = 0; channel < p_.head_dim; ++channel) {
        if (bitmap[r * words_ + channel / 64] >> (channel % 64) & 1) continue;
        std::memset(row(first + r) + channel * element_size(p_.dtype), 0, element_size(p_.dtype));
      }
    }
  }

  const WindowAppendParams& p_;
  const WindowSide& side_;
  int64_t words_;
  char* window_;
  const char* x_;
  uint64_t* bitmap_;
  char* values_;
};

}  // namespace

void window_advance(const WindowAdvanceParams& p) {
  const WindowStep step = next_window_step(p);
  store_window_step(p, step);
  for (int64_t b = 0; b < p.batch; ++b) {
    p.lengths[2 * b] = step.packed;
    p.lengths[2 * b + 1] = step.window;
  }
}

void window_append(const WindowAppendParams& p, const ParallelFor& parallel) {
  parallel(2 * int64_t{p.batch} * p.kv_heads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Head(p, i % 2 == 0 ? p.key : p.value, i / 2 / p.kv_heads, i / 2 % p.kv_heads).step();
    }
  });
}

}  // namespace mustafar::cpu
