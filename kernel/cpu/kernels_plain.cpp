// The inner loops in plain C++, for any compiler and machine: fixed-size loops that an optimiser can
// vectorise.
#include "table.h"

namespace mustafar::cpu {
namespace {

struct Plain {
  static constexpr int kLanes = 8;
  struct Vec {
    float lane[kLanes];
  };

  template <class F>
  static Vec each(F f) {
    Vec out;
    for (int i = 0; i < kLanes; ++i) out.lane[i] = f(i);
    return out;
  }
  static Vec zero() { return set1(0.0f); }
  static Vec set1(float x) {
    return each([&](int) { return x; });
  }
  template <class T>
  static Vec load(const T* p) {
    return each([&](int i) { return cpu::to_float(p[i]); });
  }
  static void store(float* p, const Vec& a) { std::memcpy(p, a.lane, sizeof(a.lane)); }
  static Vec add(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Vec mul(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static Vec max(const Vec& a, const Vec& b) {  // b if either is NaN, as on x86
    return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Vec fma(const Vec& a, const Vec& b, const Vec& c) {
    return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  // In two steps, for 2^-150 is no float; unsigned, for the bits of a NaN mean nothing.
  static Vec exp2_scale(const Vec& p, const Vec& t) {
    return each([&](int i) {
      const uint32_t n = bits_of(t.lane[i]) - 0x4b400000;
      const uint32_t half = (n >> 1) | (n & 0x80000000);
      return p.lane[i] * float_of((half + 127) << 23) * float_of((n - half + 127) << 23);
    });
  }
  template <int R, int G>
  static void store_sums(const Vec* acc, float* scores, int64_t ld) {
    for (int g = 0; g < G; ++g) {
      for (int r = 0; r < R; ++r) {
        float sum = 0;
        for (const float lane : acc[g * R + r].lane) sum += lane;
        scores[g * ld + r] = sum;
      }
    }
  }

  template <class T>
  static void expand(const T* src, uint32_t mask, T* dst) {
    // Masked with arithmetic: which bits are set is as good as random, and a branch on them would be
    // mispredicted.
    using Bits = typename Keys<T>::Key;
    for (int c = 0; c < kGroup; ++c) {
      const uint32_t kept = mask >> c & 1;
      Bits bits;
      std::memcpy(&bits, src, sizeof(bits));
      bits &= static_cast<Bits>(0 - kept);
      std::memcpy(dst + c, &bits, sizeof(bits));
      src += kept;
    }
  }
  template <class T>
  static void compress(const T* src, uint32_t mask, T* dst) {
    for (int c = 0; c < kGroup; ++c) {
      *dst = src[c];
      dst += mask >> c & 1;
    }
  }
  template <class T>
  static void make_keys(const T* src, typename Keys<T>::Key* keys) {
    std::memcpy(keys, src, kGroup * sizeof(T));
    for (int c = 0; c < kGroup; ++c) {
      const auto key = static_cast<typename Keys<T>::Key>(keys[c] & Keys<T>::kMagnitude);
      keys[c] = key < Keys<T>::kNan ? key : Keys<T>::kNan;
    }
  }
  template <class Key>
  static uint32_t at_least(const Key* keys, Key bound) {
    uint32_t mask = 0;
    for (int c = 0; c < kGroup; ++c) mask |= static_cast<uint32_t>(keys[c] >= bound) << c;
    return mask;
  }
  template <class Key>
  static int count_at_least(const Key* keys, Key bound) {
    Key count = 0;
    for (int c = 0; c < kGroup; ++c) count += keys[c] >= bound;
    return static_cast<int>(count);
  }
  template <class T>
  static void from_float(const float* src, T* dst) {
    for (int c = 0; c < kGroup; ++c) cpu::from_float(src[c], dst + c);
  }
};

}  // namespace

constexpr Kernels kPlainKernels = make_kernels<Plain>("plain");

}  // namespace mustafar::cpu
