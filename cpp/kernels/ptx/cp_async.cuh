// cp.async: copies from global to shared memory that run beside the arithmetic.
#pragma once

#include "common/types.h"

namespace flash::ptx {

// Copies 16 bytes, of which only the first `source_bytes` are read; the rest is filled with zeros.
__forceinline__ void cp_async_16(uint32 shared, const void* global, int32 source_bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(source_bytes)
               : "memory");
}

__forceinline__ void cp_async_4(uint32 shared, const void* global, int32 source_bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(source_bytes) : "memory");
}

__forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's groups are under way.
template <int32 kPending>
__forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace flash::ptx
