// Blocks that segment ids hide altogether are skipped: segments are mostly sorted, so that the least and the greatest
// id of a block say enough.
#pragma once

#include "common/config.h"
#include "common/mask.h"
#include "kernels/ptx/warp.cuh"
#include "kernels/tile/scores.cuh"

namespace flash {

// Asks which blocks of kOther rows of the other side may have an id in common with some rows of this one. Each warp
// asks for itself; its lanes together.
template <int32 kOther>
class SegmentFilter {
 public:
  // Own ids are those of [begin, end), the other side's those of [0, other_count).
  __forceinline__ SegmentFilter(const int32* own, int32 begin, int32 end, const int32* other, int32 other_count)
      : other_(other), count_(other_count) {
    const Bounds part = bounds_of(own, begin + int32(threadIdx.x % 32), end, 32);
    own_ = {ptx::reduce_min(part.low), ptx::reduce_max(part.high)};
  }

  __forceinline__ bool may_see(int32 block) {
    if (block / 32 != chunk_) {
      chunk_ = block / 32;
      const int32 begin = (chunk_ * 32 + int32(threadIdx.x % 32)) * kOther;
      const Bounds other = bounds_of(other_, begin, min_of(begin + kOther, count_), 1);
      answers_ = __ballot_sync(~0u, other.low <= own_.high && own_.low <= other.high);
    }
    return answers_ >> (block % 32) & 1;
  }

 private:
  struct Bounds {
    int32 low, high;
  };

  // Of ids begin, begin + step, ...; of none, bounds between which no id lies.
  static __forceinline__ Bounds bounds_of(const int32* ids, int32 begin, int32 end, int32 step) {
    Bounds bounds = {0x7FFFFFFF, ~0x7FFFFFFF};
    for (int32 i = begin; i < end; i += step) bounds = {min_of(bounds.low, ids[i]), max_of(bounds.high, ids[i])};
    return bounds;
  }

  const int32* other_;
  int32 count_;
  Bounds own_;
  int32 chunk_ = -1;  // of 32 blocks, to which the answers belong, a bit each
  uint32 answers_ = 0;
};

// The filter of kernels without segment ids.
struct EveryBlock {
  __forceinline__ EveryBlock(const int32*, int32, int32, const int32*, int32) {}
  __forceinline__ bool may_see(int32) { return true; }
};

template <bool kSegments, int32 kOther>
struct FilterOf {
  using Type = EveryBlock;
};
template <int32 kOther>
struct FilterOf<true, kOther> {
  using Type = SegmentFilter<kOther>;
};

// The blocks of keys that the rows [row, row + rows) of a sequence visit, from the last to the first. No rows: none.
template <KernelConfig kC>
class KeyBlocks {
  using Filter = typename FilterOf<kC.segments, kC.block_kv>::Type;

 public:
  // Those that the positional mask shows, at least in part.
  static __forceinline__ BlockRange range_of(const MaskRule& rule, int32 row, int32 rows) {
    return rows > 0 ? key_blocks(rule, row, row + rows, kC.block_kv) : BlockRange{};
  }

  // `range`: range_of(in.rule, row, rows).
  __forceinline__ KeyBlocks(const BlockRange& range, const ScoreInputs<kC>& in, const Sequence& seq, int32 row,
                            int32 rows)
      : range_(range), filter_(in.q_segments, row, row + rows, in.kv_segments, seq.kv.used) {}
  __forceinline__ KeyBlocks(const ScoreInputs<kC>& in, const Sequence& seq, int32 row, int32 rows)
      : KeyBlocks(range_of(in.rule, row, rows), in, seq, row, rows) {}

  __forceinline__ int32 last() { return below(range_.end); }
  // The next one below block `n`, or one that does not exist.
  __forceinline__ int32 below(int32 n) {
    do --n;
    while (exists(n) && !filter_.may_see(n));
    return n;
  }
  __forceinline__ bool exists(int32 n) const { return n >= range_.first; }
  // Whether the positional mask shows it whole.
  __forceinline__ bool is_full(int32 n) const { return range_.full_begin <= n && n < range_.full_end; }
  // The same of a block below a full one, which need not exist.
  __forceinline__ bool is_full_below(int32 n) const { return range_.full_begin <= n; }

 private:
  BlockRange range_;
  Filter filter_;
};

}  // namespace flash
