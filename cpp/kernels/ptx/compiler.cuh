// No instructions: what the compiler is not to know.
#pragma once

#include "common/types.h"

namespace flash::ptx {

// x might be anything from here on, so that nothing that follows from it is computed earlier, say in front of a loop.
__forceinline__ void opaque(uint32& x) {
  asm volatile("" : "+r"(x));
}

}  // namespace flash::ptx
