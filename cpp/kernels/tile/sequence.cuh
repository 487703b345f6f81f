// Where a thread block works: the sequence, its rows and lengths, for dense, packed and paged problems alike.
//
// Values that come from the device are clamped so that no cu_seqlens, length or page index leads outside of a tensor.
// Packed sequences that overlap (cu_seqlens that decrease) give unspecified results in the rows that they share.
#pragma once

#include "common/mask.h"
#include "common/problem.h"

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

// Rows of one sequence inside its batch entry: its slot, of which the first `used` take part.
struct Slot {
  int32 begin;
  int32 size;
  int32 used;
};

template <int32 kBatchAxes>
__forceinline__ Slot slot_of(const Problem& p, const View& cu_seqlens, const View& lens, int64 batch, int32 index,
                             int64 rows) {
  Slot slot = {0, int32(rows), int32(rows)};
  if (cu_seqlens.data) {
    const int32* cu = address_of<const int32, kBatchAxes>(p, cu_seqlens, batch, 0, index);
    slot.begin = clamp_to<int32>(cu[0], 0, int32(rows));
    slot.size = clamp_to<int32>(cu[1], slot.begin, int32(rows)) - slot.begin;
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
  return make_mask_rule(s.q.used, s.kv.used, p.options.window_left, p.options.window_right, p.options.bottom_right);
}

// Whether a row of a packed batch entry lies in no sequence; such rows are nobody's and must still be defined.
template <int32 kBatchAxes>
__forceinline__ bool outside_all_sequences(const Problem& p, const View& cu_seqlens, int64 batch, int32 row) {
  const int32* cu = address_of<const int32, kBatchAxes>(p, cu_seqlens, batch, 0, 0);
  for (int32 i = 0; i < p.num_sequences; ++i)
    if (cu[i] <= row && row < cu[i + 1]) return false;
  return true;
}

}  // namespace flash
