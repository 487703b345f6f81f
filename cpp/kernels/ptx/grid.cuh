// Programmatic dependent launch, from Hopper on: a kernel may be on the multiprocessors before the one in front of it
// in the stream has ended, if the host says so (launch in cuda/driver.h). Elsewhere nothing of this does anything.
#pragma once

#include "common/types.h"

namespace flash::ptx {

// When all thread blocks have said so, or ended, those of the next kernel may start.
__forceinline__ void let_next_grid_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernel in front has ended and what it wrote is visible.
__forceinline__ void wait_for_last_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace flash::ptx
