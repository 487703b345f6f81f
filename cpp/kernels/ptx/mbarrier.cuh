// mbarrier: barriers in shared memory that count arrivals and bytes that the copy engine delivers.
#pragma once

#include "common/types.h"

namespace flash::ptx {

__forceinline__ void mbarrier_init(uint32 barrier, uint32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Behind mbarrier_init, in front of a barrier of all threads: the copy engine sees the initialised barriers.
__forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__forceinline__ void mbarrier_arrive(uint32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and makes the phase wait for so many bytes besides.
__forceinline__ void mbarrier_arrive_expect_tx(uint32 barrier, uint32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the phase with this parity; the first phase has parity 0, the one "before" it 1. With a time
// limit for each look, of 10 ms here, who waits sleeps meanwhile; without one it looks every 20 cycles.
__forceinline__ void mbarrier_wait(uint32 barrier, uint32 parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, %2;\n"
      "@done bra end_%=;\nbra again_%=;\nend_%=:\n}" ::"r"(barrier),
      "r"(parity), "r"(10000000)
      : "memory");
}

}  // namespace flash::ptx
