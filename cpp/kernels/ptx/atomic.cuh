// Reductions in global memory, and the release / acquire pair with which thread blocks take turns.
#pragma once

#include "common/types.h"

namespace flash::ptx {

__forceinline__ void red_add(float* p, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(p), "f"(x) : "memory");
}

// Four neighbours at once; p is a multiple of 16 bytes.
__forceinline__ void red_add_x4(float* p, float x, float y, float z, float w) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
#else
  red_add(p, x);
  red_add(p + 1, y);
  red_add(p + 2, z);
  red_add(p + 3, w);
#endif
}

__forceinline__ int32 ld_acquire(const int32* p) {
  int32 result;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(result) : "l"(p) : "memory");
  return result;
}

__forceinline__ void red_release_add(int32* p, int32 x) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}

// Returns what was there before.
__forceinline__ int32 atom_add(int32* p, int32 x) {
  int32 before;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(x) : "memory");
  return before;
}

}  // namespace flash::ptx
