// Where a thread block works: the sequence, its rows and lengths, for dense, packed and paged problems alike.
//
// Values that come from the device are clamped so that no cu_seqlens, length or page index leads outside of a tensor,
// and no cu_seqlens makes sequences overlap.
#pragma once

#include "common/mask.h"
#include "common/problem.h"
#include "kernels/ptx/warp.cuh"

namespace flash {

// Element offset of batch entry `batch` in a view, with the number of batch axes known to the compiler.
template <int32 kBatchAxes>
__forceinline__ int64 batch_offset_of(const Problem& p, const View& view, int64 batch) {
  int64 offset = 0;
#pragma unroll
  for (int32 a = kBatchAxes - 1; a > 0; --a) {
    offset += batch % p.batch_dims[a] * view.batch_stride[a];
    batch /= p.batch_dims[a];
  }
  return kBatchAxes ? offset + batch * view.batch_stride[0] : 0;
}

// Address of batch entry, head and row.
template <class T, int32 kBatchAxes>
__forceinline__ T* address_of(const Problem& p, const View& view, int64 batch, int64 head, int64 row) {
  return static_cast<T*>(view.data) + batch_offset_of<kBatchAxes>(p, view, batch) + head * view.head_stride +
         row * view.row_stride;
}

// Zeros a row of 16-bit elements, in one thread.
template <int32 kBatchAxes>
__forceinline__ void zero_row(const Problem& p, const View& view, int64 batch, int64 head, int64 row, int64 cols) {
  // Not unrolled, like all that is seldom gone through: kernels had a third more instructions (hopper_backward.md).
  uint16* x = address_of<uint16, kBatchAxes>(p, view, batch, head, row);
  if ((reinterpret_cast<uint64>(x) | uint64(2 * cols)) % 16 == 0) {
#pragma unroll 1
    for (int64 c = 0; c < cols; c += 8) *reinterpret_cast<uint4*>(x + c) = {0, 0, 0, 0};
  } else {
#pragma unroll 1
    for (int64 c = 0; c < cols; ++c) x[c] = 0;
  }
}

// Defines the results of a row that lies in no sequence, in one thread.
template <int32 kBatchAxes>
__forceinline__ void define_stray(const FwdProblem& p, int64 batch, int64 row) {
#pragma unroll 1
  for (int64 head = 0; head < p.num_heads; ++head) {
    zero_row<kBatchAxes>(p, p.o, batch, head, row, p.head_dim_v);
    *address_of<float, kBatchAxes>(p, p.lse, batch, head, row) = -kInfinity;
  }
}
template <int32 kBatchAxes>
__forceinline__ void define_stray(const BwdProblem& p, int64 batch, int64 row) {
#pragma unroll 1
  for (int64 head = 0; head < p.num_heads_kv; ++head) {
    zero_row<kBatchAxes>(p, p.dk, batch, head, row, p.head_dim);
    zero_row<kBatchAxes>(p, p.dv, batch, head, row, p.head_dim_v);
  }
}

// Rows of one sequence inside its batch entry: its slot, of which the first `used` take part.
struct Slot {
  int32 begin;
  int32 size;
  int32 used;
};

// Where sequence `index` of a packed batch entry starts, or sequence `index - 1` ends: the greatest offset so far, so
// that no offsets make sequences overlap. To be called by whole warps.
template <int32 kBatchAxes>
__forceinline__ int32 packed_offset(const Problem& p, const View& cu_seqlens, int64 batch, int32 index, int64 rows) {
  const int32* cu = address_of<const int32, kBatchAxes>(p, cu_seqlens, batch, 0, 0);
  int32 greatest = 0;
#pragma unroll 4
  for (int32 i = threadIdx.x % 32; i <= index; i += 32) greatest = max_of(greatest, cu[i]);
  return min_of(ptx::reduce_max(greatest), int32(rows));
}

template <int32 kBatchAxes>
__forceinline__ Slot slot_of(const Problem& p, const View& cu_seqlens, const View& lens, int64 batch, int32 index,
                             int64 rows) {
  Slot slot = {0, int32(rows), int32(rows)};
  if (cu_seqlens.data) {
    slot.begin = packed_offset<kBatchAxes>(p, cu_seqlens, batch, index, rows);
    const int32 next = address_of<const int32, kBatchAxes>(p, cu_seqlens, batch, 0, index)[1];
    slot.size = clamp_to<int32>(next, slot.begin, int32(rows)) - slot.begin;
    slot.used = slot.size;
  }
  if (lens.data)
    slot.used = clamp_to<int32>(*address_of<const int32, kBatchAxes>(p, lens, batch, 0, index), 0, slot.size);
  return slot;
}

struct Sequence {
  int64 batch;
  int32 index;
  Slot q, kv;
};

template <int32 kBatchAxes>
__forceinline__ Sequence sequence_of(const Problem& p, int64 batch, int32 index) {
  return {batch, index, slot_of<kBatchAxes>(p, p.cu_seqlens_q, p.q_lens, batch, index, p.seqlen_q),
          slot_of<kBatchAxes>(p, p.cu_seqlens_kv, p.kv_lens, batch, index, p.seqlen_kv)};
}

__forceinline__ MaskRule mask_rule_of(const Problem& p, const Sequence& s) {
  return make_mask_rule(p.rows_are_heads ? 1 : s.q.used, s.kv.used, p.options.window_left, p.options.window_right,
                        p.options.bottom_right);
}

// The sink of a row's head in log2 units, of those at `sinks`; -inf if there are none.
__forceinline__ float sink_of(const Problem& p, const float* sinks, int32 row) {
  return p.sinks.data ? sinks[row * p.sinks.row_stride] * kLog2e : -kInfinity;
}

// dq_accum holds sums as the fragments of accumulators: blocks of 16 queries, in them n-tiles of 8 columns, in these
// four floats of each lane. Every sequence starts a block of its own, at most one more than its rows fill.
inline constexpr int32 kAccumRows = 16;

template <int32 kBatchAxes>
__forceinline__ float* accum_block_of(const BwdProblem& p, const Sequence& s, int64 head, int32 row) {
  return address_of<float, kBatchAxes>(p, p.dq_accum, s.batch, head,
                                       s.q.begin / kAccumRows + s.index + row / kAccumRows);
}

// In place of the lse of rows that see no key, so that 2^(s - lse) is 0 whatever s.
inline constexpr float kNoKey = kInfinity;

__forceinline__ float lse_in_log2(float lse) {
  return lse == -kInfinity ? kNoKey : lse * kLog2e;
}

// lse and delta as the backward reads them. Every sequence starts kStatisticsBlock rows of its own and fills up the
// last, so that whoever takes as many queries at a time finds them side by side, and never anyone else's.
//
// Which row of statistics_map, of kStatisticsRows queries each, has `row` of the sequence.
__forceinline__ int32 statistics_row(const Sequence& s, int32 row) {
  return (s.q.begin / kStatisticsBlock + s.index) * (kStatisticsBlock / kStatisticsRows) + row / kStatisticsRows;
}
template <int32 kBatchAxes>
__forceinline__ float* statistics_of(const BwdProblem& p, const Sequence& s, int64 head, int32 row) {
  return address_of<float, kBatchAxes>(p, p.statistics, s.batch, head, 0) +
         int64(statistics_row(s, row)) * (2 * kStatisticsRows);
}
// Offset in bytes of a row's lse in several of them; that of its delta lies kDeltaBehindLse further on.
inline constexpr int32 kDeltaBehindLse = 4 * kStatisticsRows;
static constexpr int32 statistics_offset(int32 row) {
  return row / kStatisticsRows * 2 * kDeltaBehindLse + 4 * (row % kStatisticsRows);
}

enum class Side { kQueries, kKeys };

// The work of a grid, in units: [batch entry, sequence, head, block of kBlockRows rows] and then, if packed, blocks of
// kStrayRows rows of batch entries, for rows that lie in no sequence and that nobody else would define.
//
// The blocks come in the order of UnitOrderOf, the high ones of a head first if kHighFirst: with a causal mask those of
// queries are the longest, and those of keys the first that have turns at dq.
//
// Div is Divisor where the host has prepared the divisions, else PlainDivisor.
template <int32 kBatchAxes, Side kSide, int32 kBlockRows, int32 kStrayRows, bool kHighFirst, class Div>
struct Units {
  const Problem& p;
  // 32 bits, as a grid has fewer than 2^31 blocks: divisions of 64 bits are slow.
  UnitOrderOf<Div> order;

  static constexpr bool kQueries = kSide == Side::kQueries;

  __forceinline__ Units(const Problem& problem, const UnitOrderOf<Div>& unit_order) : p(problem), order(unit_order) {}
  // In sections of so many heads, which divide those of a sequence, none late.
  __forceinline__ Units(const Problem& problem, uint32 section) : p(problem) {
    order.heads = heads_of(problem) * uint32(problem.num_sequences * num_batch_entries(problem));
    order.section = {section}, order.late_heads = {0}, order.blocks = order.first_blocks = {blocks_of(problem)};
    order.num_heads = {heads_of(problem)}, order.num_sequences = {uint32(problem.num_sequences)};
  }

  __forceinline__ uint32 count() const {
    const int64 rows = kQueries ? p.seqlen_q : p.seqlen_kv;
    const bool packed = (kQueries ? p.cu_seqlens_q : p.cu_seqlens_kv).data;
    return order.count() + (packed ? uint32(ceil_div(rows, kStrayRows) * num_batch_entries(p)) : 0);
  }

  // Calls on_block(sequence, head, row) for blocks of rows that start at `row` of the sequence, or on_rest(batch, row,
  // packed) for kStrayRows rows of a batch entry from `row` on, some of which may lie outside of the packed ones. To be
  // called by whole warps.
  template <class OnBlock, class OnRest>
  __forceinline__ void visit(uint32 unit, OnBlock on_block, OnRest on_rest) const {
    if (unit < order.count()) {
      const auto place = order.place_of(unit);
      const uint32 entry = quotient(place.head, order.num_heads), batch = quotient(entry, order.num_sequences);
      const uint32 head = place.head - entry * order.num_heads.value;
      const Sequence s = sequence_of<kBatchAxes>(p, batch, int32(entry - batch * order.num_sequences.value));
      const int32 size = kQueries ? s.q.size : s.kv.size;
      // More than one block of rows only if max_seqlen was too small; then neighbours, as those who take turns need.
      const int64 stated = int64(order.blocks.value) * kBlockRows;
      const int32 passes = size <= stated ? 1 : int32(ceil_div(size, stated));
      const int32 first = int32(kHighFirst ? order.blocks.value - 1 - place.block : place.block) * passes;
#pragma unroll 1
      for (int32 pass = 0; pass < passes; ++pass) {
        const int32 i = first + (kHighFirst ? passes - 1 - pass : pass);
        if (int64(i) * kBlockRows < size) on_block(s, int32(head), i * kBlockRows);
      }
    } else {
      const int64 rows = kQueries ? p.seqlen_q : p.seqlen_kv;
      const uint32 row_blocks = uint32(ceil_div(rows, kStrayRows)), batch = (unit - order.count()) / row_blocks;
      const View& cu_seqlens = kQueries ? p.cu_seqlens_q : p.cu_seqlens_kv;
      const Range packed = {packed_offset<kBatchAxes>(p, cu_seqlens, batch, 0, rows),
                            packed_offset<kBatchAxes>(p, cu_seqlens, batch, int32(p.num_sequences), rows)};
      on_rest(int64(batch), int32((unit - order.count()) % row_blocks * kStrayRows), packed);
    }
  }

  // Whether a row of a batch entry lies in no sequence.
  __forceinline__ bool is_stray(int32 row, Range packed) const {
    return row < (kQueries ? p.seqlen_q : p.seqlen_kv) && (row < packed.begin || row >= packed.end);
  }

  // The same with on_stray(batch, row) for the thread's row that lies in no sequence. `thread` counts up to kStrayRows.
  template <class OnBlock, class OnStray>
  __forceinline__ void visit(uint32 unit, int32 thread, OnBlock on_block, OnStray on_stray) const {
    visit(unit, on_block, [&](int64 batch, int32 first_row, Range packed) {
      if (is_stray(first_row + thread, packed)) on_stray(batch, int64(first_row + thread));
    });
  }

 private:
  static __forceinline__ uint32 blocks_of(const Problem& p) {
    return uint32(ceil_div(kQueries ? p.max_seqlen_q : p.max_seqlen_kv, kBlockRows));
  }
  static __forceinline__ uint32 heads_of(const Problem& p) { return uint32(kQueries ? p.num_heads : p.num_heads_kv); }
};

// Does unit blockIdx.x with all of kThreads threads. Sections are of one head for kernels that read their operands many
// times, of all of a sequence for those that go through memory once, in its order.
template <int32 kBatchAxes, Side kSide, int32 kBlockRows, int32 kThreads, bool kHighFirst, class OnBlock, class OnStray>
__forceinline__ void for_each_block(const Problem& p, OnBlock on_block, OnStray on_stray, uint32 section = 1) {
  Units<kBatchAxes, kSide, kBlockRows, kThreads, kHighFirst, PlainDivisor>(p, section)
      .visit(
          blockIdx.x, threadIdx.x,
          [&](const Sequence& s, int32 head, int32 row) {
            on_block(s, head, row);
            __syncthreads();
          },
          on_stray);
}

}  // namespace flash
