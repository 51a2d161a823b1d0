// The inner loops, once per instruction set, behind a table of functions chosen at run time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "../params.h"

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define MUSTAFAR_X86 1
#else
#define MUSTAFAR_X86 0
#endif
// Compilers that know the instructions: GCC 10, clang 9.
#if MUSTAFAR_X86 && ((defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 10))
#define MUSTAFAR_AVX512BF16 1
#else
#define MUSTAFAR_AVX512BF16 0
#endif

namespace mustafar::cpu {

// Rows worked on at a time: float rows of up to 256 channels then stay in a first-level cache of 32 KB.
constexpr int kTileRows = 16;
// Channels handled at a time; rows of a tile are padded to a multiple of it.
constexpr int kGroup = 32;

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Rows of one slice.
struct PackedRows {
  const uint64_t* bitmap;  // of the first row; the next row is `words` further
  const void* values;      // slot 0 of the first row; slot i of row r is at [i / 8 * 64 + r][i % 8]
  int32_t words;
  int32_t width;
  int32_t rows;
  int32_t groups;  // of channels: D / kGroup rounded up
};

// One slice of a dense tensor.
struct DenseRows {
  const void* x;         // first row
  int64_t token_stride;  // elements
  int32_t rows;          // rows there are, up to 64
  int32_t head_dim;
};

// Tables of three are indexed by DType.
struct Kernels {
  const char* name;

  // Packed rows -> zero-filled dense rows `pitch` apart.
  void (*expand[3])(const PackedRows& rows, void* out, int64_t pitch);

  // scores[g * ld + r] = row r . q row g; q rows are groups * kGroup apart. Up to kTileRows - 1 scores that
  // follow are overwritten.
  void (*score[3])(const PackedRows& rows, const float* q, int heads, float* scores, int64_t ld);
  // acc row g += sum over r of p[g * ld + r] * row r; acc rows are groups * kGroup apart.
  void (*weigh[3])(const PackedRows& rows, const float* p, int64_t ld, int heads, float* acc);

  // n elements; what follows them is not touched.
  void (*to_float[3])(const void* src, float* dst, int64_t n);
  void (*from_float[3])(const float* src, void* dst, int64_t n);

  // scores[g * ld + r] = tile row r . q row g for all kTileRows rows of a tile; tile and q rows `pitch`
  // apart.
  void (*dot[3])(const void* tile, int64_t pitch, const float* q, int heads, float* scores, int64_t ld);
  // acc row g += sum over r < rows of p[g * ld + r] * tile row r; tile and acc rows `pitch` apart.
  void (*accumulate[3])(const void* tile, int64_t pitch, int rows, const float* p, int64_t ld, int heads,
                        float* acc);
  // Scores become exp(scale * score - max); n is padded to whole tiles by the caller's buffer, which is
  // overwritten. A row of only -inf gives max -inf and zeros.
  void (*softmax)(float* scores, int64_t n, float scale, float* max, float* sum);

  // Bitmaps of 64 rows (empty past `rows`): the k largest magnitudes, or all that are not zero, and then the
  // largest number of bits of a row.
  void (*top_bitmap[3])(const DenseRows& rows, int k, uint64_t* bitmap);
  int (*nonzero_bitmap[3])(const DenseRows& rows, uint64_t* bitmap);
  // Values of a slice in [width / 8][64][8] order by its bitmaps, zeros in unused slots.
  void (*pack[3])(const DenseRows& rows, const uint64_t* bitmap, int width, void* values);
};

extern const Kernels kPlainKernels;
#if MUSTAFAR_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif
#if MUSTAFAR_AVX512BF16
Kernels avx512bf16_kernels();  // built on kAvx512Kernels
#endif

// The table of simd_level().
const Kernels& kernels();

constexpr int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline const char* at(const void* base, int64_t index, DType dtype) {
  return static_cast<const char*>(base) + index * element_size(dtype);
}
inline char* at(void* base, int64_t index, DType dtype) {
  return static_cast<char*>(base) + index * element_size(dtype);
}

// Floats on a cache line boundary, not initialised.
class FloatBuffer {
 public:
  explicit FloatBuffer(int64_t size)
      : data_(static_cast<float*>(::operator new[](static_cast<size_t>(size) * sizeof(float), kAlign))) {}
  float* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, kAlign); }
  };
  std::unique_ptr<float[], Free> data_;
};

// A buffer of at least `size` floats that the calling thread keeps: memory fresh from the system costs a
// fault a page, a tenth of a decode step. One user at a time.
inline float* kept_floats(int64_t size) {
  thread_local FloatBuffer buffer(0);
  thread_local int64_t held = 0;
  if (held < size) {
    buffer = FloatBuffer(size);
    held = size;
  }
  return buffer.get();
}

}  // namespace mustafar::cpu
