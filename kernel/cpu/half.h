// The element types, and conversions of single numbers without hardware support.
#pragma once

#include <cstdint>
#include <cstring>

namespace mustafar::cpu {
namespace {  // each instruction set compiles its own copy

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

// Exponent and mantissa are moved into place and the bias is corrected by a multiplication, which also
// normalises subnormals. Infinity and NaN get their exponent back.
inline float to_float(Half x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const float scaled = float_of(magnitude) * float_of(0x77800000);  // 2^112
  const uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
  return float_of(bits_of(scaled) | special | sign);
}

inline void from_float(float x, float* out) { *out = x; }

// Round to nearest even; a NaN stays one.
inline void from_float(float x, BFloat* out) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out->bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

inline void from_float(float x, Half* out) {
  const uint32_t bits = bits_of(x);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x47800000) {  // 2^16: too large
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: the addition rounds to the grid of the subnormals
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {  // may carry into the exponent, up to infinity
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>(half | sign);
}

}  // namespace
}  // namespace mustafar::cpu
