// float16 and bfloat16 to and from float32, by integer arithmetic that compilers vectorise for every processor.
#pragma once

#include <string.h>

#include "common/types.h"

namespace flash::cpu {
namespace {

inline float as_float(uint32 bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32 as_bits(float x) {
  uint32 bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

struct Float32 {
  using Storage = float;
  static float decode(float x) { return x; }
  static float encode(float x) { return x; }
};

struct BFloat16 {
  using Storage = uint16;
  static float decode(uint16 x) { return as_float(uint32{x} << 16); }
  static uint16 encode(float x) {  // to nearest even; a NaN stays one
    const uint32 bits = as_bits(x);
    const uint32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return uint16(x != x ? 0x7FC0u : rounded);
  }
};

struct Float16 {
  using Storage = uint16;
  static float decode(uint16 x) {
    const uint32 sign = uint32(x & 0x8000u) << 16, magnitude = uint32(x & 0x7FFFu) << 13;
    // Subnormals are multiples of 2^-24. They go by an integer, as XLA's threads treat subnormal floats as zero.
    const float subnormal = float(int32(x & 0x03FFu)) * 0x1p-24f;
    const uint32 normal = magnitude + 0x38000000u;  // exponent bias 127 in place of 15
    const uint32 finite = magnitude < 0x00800000u ? as_bits(subnormal) : normal;
    return as_float((magnitude >= 0x0F800000u ? magnitude | 0x7F800000u : finite) | sign);
  }
  static uint16 encode(float x) {  // to nearest even
    const uint32 bits = as_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    const uint32 normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14 a half has a fixed step of 2^-24: adding 0.5 leaves the rounded multiple in the low mantissa bits.
    const uint32 subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3F000000u;
    const uint32 finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32 overflow = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    return uint16(sign | (magnitude >= 0x477FF000u ? overflow : finite));
  }
};

}  // namespace
}  // namespace flash::cpu
