// What the compiler is not to know, mostly without instructions.
#pragma once

#include "common/types.h"

namespace flash::ptx {

// x is computed here at the latest, and might be anything from here on, so that nothing that follows from it is
// computed earlier, say in front of a loop.
__forceinline__ void opaque(uint32& x) {
  asm volatile("" : "+r"(x));
}
__forceinline__ void opaque(float& x) {
  asm volatile("" : "+f"(x));
}

// x, which is never negative, is computed here and not later: with what it takes, the compiler would otherwise wait for
// products that it needs not. The instruction is never executed, but may be for all that the compiler knows.
__forceinline__ void compute_now(float x) {
  if (x < 0.0f) asm volatile("nanosleep.u32 0;");
}

// Before CUDA 12.9 ptxas runs all products one after the other (C7515) if the first may add to an accumulator that
// nothing has defined, whatever becomes of it.
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ < 1209
inline constexpr bool kAccumulatorsMustBeDefined = true;
#else
inline constexpr bool kAccumulatorsMustBeDefined = false;
#endif

}  // namespace flash::ptx
