// Reductions over the lanes of a warp, in one instruction.
#pragma once

#include "common/types.h"

namespace flash::ptx {

__forceinline__ int32 reduce_min(int32 x) {
  int32 result;
  asm volatile("redux.sync.min.s32 %0, %1, 0xffffffff;" : "=r"(result) : "r"(x));
  return result;
}

__forceinline__ int32 reduce_max(int32 x) {
  int32 result;
  asm volatile("redux.sync.max.s32 %0, %1, 0xffffffff;" : "=r"(result) : "r"(x));
  return result;
}

}  // namespace flash::ptx
