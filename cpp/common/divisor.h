// Division by what the host knows beforehand: a product and a shift in place of the device's slow division. By Granlund
// and Montgomery, Division by invariant integers using multiplication (PLDI 1994).
#pragma once

#include "common/types.h"

namespace flash {

struct Divisor {
  uint32 value;
  uint32 factor, shift;
};

// Of 1 to 2^31.
static constexpr Divisor make_divisor(uint32 value) {
  uint32 shift = 0;
  while (uint64{1} << shift < value) ++shift;
  return {value, uint32((((uint64{1} << shift) - value) << 32) / value + 1), shift};
}

// n / divisor.value for n < 2^31.
static constexpr uint32 quotient(uint32 n, const Divisor& divisor) {
  return (uint32(uint64(n) * divisor.factor >> 32) + n) >> divisor.shift;
}

// One that nobody has prepared.
struct PlainDivisor {
  uint32 value;
};

static constexpr uint32 quotient(uint32 n, PlainDivisor divisor) {
  return n / divisor.value;
}

static_assert(quotient(0x7FFFFFFF, make_divisor(1)) == 0x7FFFFFFF && quotient(63, make_divisor(64)) == 0);
static_assert(quotient(0x7FFFFFFF, make_divisor(7)) == 306783378 && quotient(306783377, make_divisor(7)) == 43826196);
static_assert(quotient(0x7FFFFFFE, make_divisor(0x7FFFFFFF)) == 0 && quotient(3 * 683 - 1, make_divisor(683)) == 2);

}  // namespace flash
