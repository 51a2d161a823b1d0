// Runs the CPU kernels at every level this machine has on generated problems whose arrays are exactly as
// large as they must be, for builds with AddressSanitizer and UndefinedBehaviorSanitizer: `fuzz_cpu <cases>
// [first]`.
//
// Results are checked too: what pruning keeps, round trips, and attention against a plain loop in double.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../cpu/half.h"
#include "../cpu/ops.h"

namespace {

using namespace mustafar;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

// A few ranges in any order, as threads may take them.
void parallel(int64_t n, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t middle = n / 2;
  if (middle < n) body(middle, n);
  if (middle > 0) body(0, middle);
}

// Exactly `size` bytes of the heap, off by `shift` elements from how allocations are aligned.
class Bytes {
 public:
  explicit Bytes(int64_t size) : data_(static_cast<size_t>(size)) { data_.shrink_to_fit(); }
  char* get() { return data_.data(); }

 private:
  std::vector<char> data_;
};

float value_at(const void* data, int64_t i, DType dtype) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return dtype == DType::kFloat16 ? cpu::to_float(cpu::Half{bits}) : cpu::to_float(cpu::BFloat{bits});
}

void set_value(void* data, int64_t i, float x, DType dtype) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[i] = x;
  } else if (dtype == DType::kFloat16) {
    cpu::from_float(x, static_cast<cpu::Half*>(data) + i);
  } else {
    cpu::from_float(x, static_cast<cpu::BFloat*>(data) + i);
  }
}

class Case {
 public:
  explicit Case(uint64_t seed) : random_(seed) {
    dtype_ = static_cast<DType>(pick(0, 2));
    bytes_ = dtype_ == DType::kFloat32 ? 4 : 2;
    const int usual[] = {64, 80, 128, 256};
    dim_ = pick(0, 1) ? usual[pick(0, 3)] : pick(1, 256);
    batch_ = pick(1, 2), kv_heads_ = pick(1, 2), group_ = pick(1, 9), tokens_ = pick(1, 200);
    slices_ = (tokens_ + 63) / 64, words_ = (dim_ + 63) / 64;
  }

  void run() {
    const int64_t rows = int64_t{batch_} * kv_heads_ * tokens_;
    Bytes x(rows * dim_ * bytes_);
    fill(x.get(), rows * dim_, pick(0, 3) == 0 ? 0.7f : 0.0f);
    Packed uniform = prune(x.get()), general = compress(x.get());
    round_trip(x.get(), general);
    multiply(uniform, general);
    attend(uniform, general);
    attend(general, uniform);
    corrupt(uniform);
  }

 private:
  struct Packed {
    Bytes bitmap{0}, values{0}, offsets{0}, widths{0};
    CompressedView view{};
  };

  int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }

  void fill(void* data, int64_t count, float zeros) {
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> uniform;
    for (int64_t i = 0; i < count; ++i) {
      const float x = uniform(random_) < zeros ? 0.0f : normal(random_);
      set_value(data, i, x, dtype_);
    }
  }

  int64_t bitmap_count() const { return int64_t{batch_} * kv_heads_ * slices_ * 64 * words_; }

  template <class Params>
  void describe(Params* p, const void* x, Packed* out) {
    p->x = x;
    p->bitmap = reinterpret_cast<uint64_t*>(out->bitmap.get());
    p->tokens = tokens_;
    p->x_token_stride = dim_, p->x_head_stride = int64_t{tokens_} * dim_;
    p->x_batch_stride = kv_heads_ * p->x_head_stride;
    p->batch = batch_, p->kv_heads = kv_heads_, p->head_dim = dim_, p->slices = slices_, p->dtype = dtype_;
  }

  void describe_bitmap(Packed* out) {
    out->view.bitmap = reinterpret_cast<const uint64_t*>(out->bitmap.get());
    out->view.bitmap_head_stride = int64_t{slices_} * 64 * words_;
    out->view.bitmap_batch_stride = kv_heads_ * out->view.bitmap_head_stride;
    out->view.values = out->values.get();
  }

  Packed prune(const void* x) {
    Packed out;
    const int k = pick(1, dim_), width = (k + 7) / 8 * 8;
    out.bitmap = Bytes(bitmap_count() * 8);
    const int64_t per_head = int64_t{slices_} * 64 * width;
    out.values = Bytes(per_head * batch_ * kv_heads_ * bytes_);
    cpu::PruneCompressParams p{};
    describe(&p, x, &out);
    p.values = out.values.get(), p.k = k, p.width = width;
    cpu::prune_compress(p, parallel);
    for (int64_t i = 0; i < bitmap_count() / words_; ++i) {
      int bits = 0;
      for (int w = 0; w < words_; ++w) bits += __builtin_popcountll(p.bitmap[i * words_ + w]);
      if (bits != (i % (slices_ * 64) < tokens_ ? k : 0)) fail("prune_compress: set bits of a row");
    }
    describe_bitmap(&out);
    out.view.width = width;
    out.view.values_head_stride = per_head, out.view.values_batch_stride = kv_heads_ * per_head;
    return out;
  }

  Packed compress(const void* x) {
    Packed out;
    const int64_t count = int64_t{batch_} * kv_heads_ * slices_;
    out.bitmap = Bytes(bitmap_count() * 8);
    out.widths = Bytes(count * 4), out.offsets = Bytes(count * 8);
    cpu::CompressParams p{};
    describe(&p, x, &out);
    p.widths = reinterpret_cast<int32_t*>(out.widths.get());
    cpu::compress_count(p, parallel);
    auto* offsets = reinterpret_cast<int64_t*>(out.offsets.get());
    int64_t total = 0;
    for (int64_t i = 0; i < count; total += int64_t{p.widths[i++]} * 64) offsets[i] = total;
    out.values = Bytes(total * bytes_);
    p.offsets = offsets, p.values = out.values.get();
    cpu::compress_fill(p, parallel);
    describe_bitmap(&out);
    out.view.offsets = offsets, out.view.widths = p.widths;
    out.view.offsets_head_stride = out.view.widths_head_stride = slices_;
    out.view.offsets_batch_stride = out.view.widths_batch_stride = int64_t{kv_heads_} * slices_;
    return out;
  }

  Bytes decompress(const Packed& packed) {
    const int64_t rows = int64_t{batch_} * kv_heads_ * tokens_;
    Bytes out(rows * dim_ * bytes_);
    cpu::DecompressParams p{packed.view, out.get(), tokens_, batch_, kv_heads_, dim_, slices_, dtype_};
    cpu::decompress(p, parallel);
    return out;
  }

  void round_trip(const char* x, const Packed& general) {
    Bytes again = decompress(general);
    const int64_t count = int64_t{batch_} * kv_heads_ * tokens_ * dim_;
    for (int64_t i = 0; i < count; ++i) {
      if (value_at(x, i, dtype_) != value_at(again.get(), i, dtype_)) fail("compress, decompress: a value");
    }
  }

  void multiply(const Packed& key, const Packed& value) {
    const int64_t heads = int64_t{batch_} * kv_heads_ * group_;
    Bytes q(heads * dim_ * bytes_), scores(heads * tokens_ * bytes_);
    fill(q.get(), heads * dim_, 0);
    const int32_t q_heads = kv_heads_ * group_;
    cpu::key_scores({q.get(), scores.get(), key.view, tokens_, int64_t{q_heads} * dim_, dim_,
                     int64_t{q_heads} * tokens_, tokens_, batch_, q_heads, kv_heads_, dim_, slices_, dtype_},
                    parallel);
    cpu::value_output(
        {scores.get(), q.get(), value.view, nullptr, tokens_, int64_t{q_heads} * tokens_, tokens_,
         int64_t{q_heads} * dim_, dim_, batch_, q_heads, kv_heads_, dim_, slices_, dtype_},
        parallel);
  }

  void attend(const Packed& key, const Packed& value) {
    const int32_t q_heads = kv_heads_ * group_, capacity = pick(0, 1) ? pick(0, 300) : 0;
    const int64_t heads = int64_t{batch_} * q_heads, window = int64_t{batch_} * kv_heads_ * capacity * dim_;
    Bytes q(heads * dim_ * bytes_), out(heads * dim_ * bytes_);
    Bytes k_window(window * bytes_), v_window(window * bytes_);
    fill(q.get(), heads * dim_, 0), fill(k_window.get(), window, 0), fill(v_window.get(), window, 0);
    std::vector<int32_t> lengths, starts;
    for (int b = 0; b < batch_; ++b) {
      lengths.push_back(pick(0, tokens_)), lengths.push_back(pick(0, capacity));
      starts.push_back(pick(0, lengths[2 * b] + lengths[2 * b + 1]));
    }
    DecodeAttentionParams p{};
    p.q = q.get(), p.out = out.get(), p.key = key.view, p.value = value.view;
    p.k_window = k_window.get(), p.v_window = v_window.get();
    p.lengths = lengths.data(), p.starts = pick(0, 1) ? starts.data() : nullptr;
    p.q_head_stride = p.out_head_stride = dim_;
    p.q_batch_stride = p.out_batch_stride = int64_t{q_heads} * dim_;
    p.k_window_token_stride = p.v_window_token_stride = dim_;
    p.k_window_head_stride = p.v_window_head_stride = int64_t{capacity} * dim_;
    p.k_window_batch_stride = p.v_window_batch_stride = kv_heads_ * p.k_window_head_stride;
    p.batch = batch_, p.q_heads = q_heads, p.kv_heads = kv_heads_, p.head_dim = dim_;
    p.slices = slices_, p.window_capacity = capacity, p.sliding_window = pick(0, 1) ? pick(1, 300) : 0;
    p.scale = 1 / std::sqrt(static_cast<float>(dim_)), p.dtype = dtype_;
    cpu::decode_attention(p, parallel);
    if (checked_) check(p, key, value);
  }

  // One query head, in double.
  void check(const DecodeAttentionParams& p, const Packed& key, const Packed& value) {
    Bytes k = decompress(key), v = decompress(value);
    const int b = pick(0, batch_ - 1), head = pick(0, p.q_heads - 1), kv = head / group_;
    const int packed = p.lengths[2 * b], total = packed + p.lengths[2 * b + 1];
    int first = p.starts != nullptr ? p.starts[b] : 0;
    if (p.sliding_window > 0) first = std::max(first, total - p.sliding_window);
    const auto at = [&](char* dense, const void* window, int t, int c) -> double {
      const int64_t plane = int64_t{b} * kv_heads_ + kv;
      return t < packed ? value_at(dense, (plane * tokens_ + t) * dim_ + c, dtype_)
                        : value_at(window, (plane * p.window_capacity + t - packed) * dim_ + c, dtype_);
    };
    std::vector<double> weights, expected(dim_);
    double largest = -std::numeric_limits<double>::infinity(), sum = 0, scale = 1e-3;
    const int64_t q_row = (int64_t{b} * p.q_heads + head) * dim_;
    for (int t = first; t < total; ++t) {
      double dot = 0;
      for (int c = 0; c < dim_; ++c) dot += value_at(p.q, q_row + c, dtype_) * at(k.get(), p.k_window, t, c);
      weights.push_back(dot * p.scale);
      largest = std::max(largest, weights.back());
    }
    for (double& w : weights) sum += w = std::exp(w - largest);
    for (int t = first; t < total; ++t) {
      for (int c = 0; c < dim_; ++c) expected[c] += weights[t - first] / sum * at(v.get(), p.v_window, t, c);
    }
    for (const double x : expected) scale = std::max(scale, std::abs(x));
    const double tolerance = dtype_ == DType::kFloat32 ? 1e-4 : dtype_ == DType::kFloat16 ? 2e-3 : 1.6e-2;
    for (int c = 0; c < dim_; ++c) {
      if (!(std::abs(value_at(p.out, q_row + c, dtype_) - expected[c]) <= tolerance * scale)) {
        fail("decode_attention: a value");
      }
    }
  }

  // Bitmaps with more bits than there are slots give wrong numbers, and read nothing that is not theirs.
  void corrupt(Packed& packed) {
    auto* words = reinterpret_cast<uint64_t*>(packed.bitmap.get());
    for (int64_t i = 0; i < bitmap_count(); ++i) words[i] = pick(0, 1) ? ~uint64_t{0} : random_();
    decompress(packed);
    multiply(packed, packed);
    checked_ = false;
    attend(packed, packed);
    checked_ = true;
  }

  std::mt19937_64 random_;
  bool checked_ = true;
  DType dtype_;
  int64_t bytes_;
  int32_t dim_, batch_, kv_heads_, group_, tokens_, slices_, words_;
};

}  // namespace

int main(int count, char** arguments) {
  const long cases = count > 1 ? std::atol(arguments[1]) : 100,
             first = count > 2 ? std::atol(arguments[2]) : 0;
  for (const char* level : {"avx512bf16", "avx512", "avx2", "plain"}) {
    setenv("MUSTAFAR_SIMD", level, 1);
    if (std::strcmp(cpu::simd_level(), level) != 0) {
      std::printf("%s: not on this machine\n", level);
      continue;
    }
    for (long i = first; i < first + cases; ++i) {
      std::fprintf(stderr, "\r%s %ld ", level, i);  // the last line of a crash names the case
      Case(static_cast<uint64_t>(i)).run();
    }
    std::printf("%s: %ld cases\n", level, cases);
  }
}
