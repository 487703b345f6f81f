// Conversions between float32 and pairs of 16-bit floats, and the approximate functions of the special-function unit.
#pragma once

#include "common/types.h"

namespace flash::ptx {

// Two floats as one register; `low` in the lower half, as memory has the element with the smaller index.
template <DType kDType>
__forceinline__ uint32 pack(float low, float high) {
  uint32 packed;
  if constexpr (kDType == DType::kBF16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <DType kDType>
__forceinline__ float unpack(uint16 x) {
  float result;
  if constexpr (kDType == DType::kBF16)
    result = __uint_as_float(uint32(x) << 16);
  else
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x));
  return result;
}

// 2^x
__forceinline__ float ex2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// log2(x)
__forceinline__ float lg2_approx(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Relative error 2^-11.
__forceinline__ float tanh_approx(float x) {
  float result;
  asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace flash::ptx
