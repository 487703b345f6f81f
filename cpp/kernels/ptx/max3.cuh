// The greatest of three integers: one instruction of compute capability 9.0 and 10.0, two elsewhere.
#pragma once

#include "common/types.h"

namespace flash::ptx {

__forceinline__ int32 max3(int32 a, int32 b, int32 c) {
  return __vimax3_s32(a, b, c);
}

}  // namespace flash::ptx
