// Blocks that segment ids hide altogether are skipped: segments are mostly sorted, so that the least and the greatest
// id of a block say enough.
#pragma once

#include "common/config.h"
#include "kernels/ptx/warp.cuh"
#include "kernels/tile/sequence.cuh"

namespace flash {

// Asks which blocks of kOther rows of the other side may have an id in common with this thread block's own rows. All
// threads ask together.
template <int32 kThreads, int32 kOther>
struct SegmentFilter {
  int32* scratch;  // kSegmentBytes of shared memory: minima and maxima of the warps, then answers, a bit each
  const int32* ids;
  int32 count;
  int32 low, high;
  int32 chunk = -1;  // the answers are those of blocks [chunk * kThreads, (chunk + 1) * kThreads)

  static constexpr int32 kWarps = kThreads / 32;
  static_assert(2 * kWarps * 4 <= kSegmentBytes);

  // Own ids are those of [begin, end), the other side's those of [0, other_count).
  __forceinline__ SegmentFilter(int32* shared, const int32* own, int32 begin, int32 end, const int32* other,
                                int32 other_count)
      : scratch(shared), ids(other), count(other_count) {
    int32 least = 0x7FFFFFFF, greatest = ~0x7FFFFFFF;
    for (int32 i = begin + threadIdx.x; i < end; i += kThreads) {
      least = min_of(least, own[i]);
      greatest = max_of(greatest, own[i]);
    }
    least = ptx::reduce_min(least);
    greatest = ptx::reduce_max(greatest);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = least, scratch[kWarps + threadIdx.x / 32] = greatest;
    __syncthreads();
    low = scratch[0], high = scratch[kWarps];
    for (int32 w = 1; w < kWarps; ++w) low = min_of(low, scratch[w]), high = max_of(high, scratch[kWarps + w]);
    __syncthreads();
  }

  __forceinline__ bool may_see(int32 block) {
    if (block / kThreads != chunk) {
      chunk = block / kThreads;
      const int32 begin = (chunk * kThreads + threadIdx.x) * kOther, end = min_of(begin + kOther, count);
      int32 least = 0x7FFFFFFF, greatest = ~0x7FFFFFFF;
      for (int32 i = begin; i < end; ++i) {
        least = min_of(least, ids[i]);
        greatest = max_of(greatest, ids[i]);
      }
      const uint32 answers = __ballot_sync(~0u, least <= high && low <= greatest);
      __syncthreads();
      if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = int32(answers);
      __syncthreads();
    }
    return uint32(scratch[block % kThreads / 32]) >> (block % 32) & 1;
  }
};

// The filter of kernels without segment ids.
struct EveryBlock {
  __forceinline__ bool may_see(int32) { return true; }
};

}  // namespace flash
