// Rings of buffers in shared memory, which some fill, mostly one warp by the copy engine, and others read.
#pragma once

#include "common/types.h"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/tma.cuh"

namespace flash {

// One party's place in a ring of kStages buffers. Each buffer has two barriers of 8 bytes: the full ones lie at
// `barriers`, the empty ones behind them.
template <int32 kNumStages>
class Ring {
 public:
  static constexpr int32 kStages = kNumStages;
  static constexpr int32 kBytes = 16 * kStages;

  // By one thread. A buffer is full when all who fill it say so, and empty when all readers have released it.
  static __forceinline__ void init(uint32 barriers, int32 readers, int32 fillers = 1) {
    for (int32 i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(barriers + 8 * i, fillers);
      ptx::mbarrier_init(barriers + 8 * (kStages + i), readers);
    }
  }

  // A reader that starts at the last stage with parity 1 finds one full buffer in front of the first.
  __forceinline__ explicit Ring(uint32 barriers, int32 stage = 0, uint32 parity = 0)
      : barriers_(barriers), stage_(stage), parity_(parity) {}

  __forceinline__ int32 stage() const { return stage_; }
  __forceinline__ uint32 full() const { return barriers_ + 8 * stage_; }
  __forceinline__ uint32 empty() const { return full() + 8 * kStages; }

  // The filler's: the buffer may be written. All are empty at first.
  __forceinline__ void wait_empty() const { ptx::mbarrier_wait(empty(), parity_ ^ 1); }
  // The readers': what was copied is there, and later that this reader is done with it.
  __forceinline__ void wait_full() const { ptx::mbarrier_wait(full(), parity_); }
  __forceinline__ void release() const { ptx::mbarrier_arrive(empty()); }

  // By more than one where several parties share the buffers in turns.
  __forceinline__ void advance(int32 by = 1) {
    stage_ += by;
    if (stage_ < kStages) return;
    stage_ -= kStages;
    parity_ ^= 1;
  }

 private:
  uint32 barriers_;
  int32 stage_;
  uint32 parity_;
};

// Starts the copy of a Tile, panel by panel, whose bytes then count at `barrier`. By one thread.
template <class T>
__forceinline__ void load_panels(uint32 tile, uint32 barrier, const TensorMap& map, int32 row, int32 head, int32 batch,
                                 int32 col = 0) {
#pragma unroll
  for (int32 panel = 0; panel < T::kPanels; ++panel)
    ptx::tma_load(tile + panel * T::kPanelBytes, map, barrier, col + panel * T::kPanelCols, row, head, batch);
}

}  // namespace flash
