// Scalar names shared by host and device code. This directory includes nothing but itself, so that g++ and NVRTC
// read the same text. Functions here are `static`: each translation unit keeps its own copy, which matters where the
// same header is compiled for several instruction sets.
#pragma once

namespace flash {

using int32 = int;
using int64 = long long;
using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;

static_assert(sizeof(int32) == 4 && sizeof(int64) == 8);

enum class DType : int32 { kF32 = 0, kBF16 = 1, kF16 = 2 };

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
inline constexpr float kInfinity = __builtin_bit_cast(float, 0x7F800000u);

template <class T>
static constexpr T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
static constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}
template <class T>
static constexpr T clamp_to(T x, T lo, T hi) {
  return max_of(lo, min_of(x, hi));
}
static constexpr int64 ceil_div(int64 a, int64 b) {
  return (a + b - 1) / b;
}
static constexpr int64 round_up(int64 a, int64 b) {
  return ceil_div(a, b) * b;
}

}  // namespace flash
