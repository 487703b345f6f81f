// The copy engine (TMA): boxes of tensors between global and shared memory, without a thread's help.
#pragma once

#include "common/problem.h"

namespace flash::ptx {

// Starts the copy of the box at these coordinates, which then counts as bytes of `barrier`. Elements outside of the
// tensor become zero.
__forceinline__ void tma_load(uint32 shared, const TensorMap& map, uint32 barrier, int32 c0, int32 c1, int32 c2,
                              int32 c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared),
      "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier)
      : "memory");
}

__forceinline__ void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// What this thread has written to shared memory becomes visible to the copy engine and to wgmma.
__forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace flash::ptx
