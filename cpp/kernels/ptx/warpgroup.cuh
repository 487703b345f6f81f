// Warps that have different roles: registers handed from one to the other, and barriers of some of them.
#pragma once

#include "common/types.h"

namespace flash::ptx {

// Registers per thread of the executing warpgroup, a multiple of 8: fewer, or more once others have given theirs.
template <int32 kRegisters>
__forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int32 kRegisters>
__forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Named barriers, 1 to 15, of `threads` threads, whole warps; 0 is that of __syncthreads.
__forceinline__ void barrier_sync(int32 barrier, int32 threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Counts as there, and goes on.
__forceinline__ void barrier_arrive(int32 barrier, int32 threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace flash::ptx
