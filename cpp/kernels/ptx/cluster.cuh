// Clusters: thread blocks that run at the same time and reach each other's shared memory. What lies in that of another
// one, a peer, has an address from peer_shared(), for the instructions here alone.
#pragma once

#include "common/types.h"

namespace flash::ptx {

// Where the thread block's dynamic shared memory starts, which is called `shared`: for the emulated GPU of tests/,
// where that is one array for all of a cluster.
__forceinline__ char* own_shared(char* shared) {
  return shared;
}

// The same place in the shared memory of the cluster's thread block `rank`.
__forceinline__ uint32 peer_shared(uint32 address, uint32 rank) {
  uint32 result;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(rank));
  return result;
}

// All threads of the cluster meet: what they wrote before is visible behind it. A thread block must not end while a
// peer may still reach for its memory.
__forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Says nothing of loads that are still on their way: who lets the peer overwrite what was read must have used it. That
// much of an order suffices; release at the scope of the cluster would wait for all that is on its way to global
// memory.
__forceinline__ void mbarrier_arrive_peer(uint32 barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Stores 16 bytes, which then count at `barrier`. Both are the same peer's.
__forceinline__ void st_async_x4(uint32 address, uint32 x, uint32 y, uint32 z, uint32 w, uint32 barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
      "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier)
      : "memory");
}

// Starts a copy out of the own shared memory, whose bytes then count at `barrier`. `target` and that are the same
// peer's; addresses and `bytes` are multiples of 16.
__forceinline__ void copy_to_peer(uint32 target, uint32 source, uint32 bytes, uint32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
      "r"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

}  // namespace flash::ptx
