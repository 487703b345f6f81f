// An attention problem as plain data: pointers, shapes and options. It is all that crosses from the XLA boundary
// (ffi/) to the implementations (cpu/, cuda/), which therefore need to know nothing about XLA.
//
// Dense and packed (varlen) problems are one: a batch entry holds `num_sequences` sequences (one when dense) inside
// its rows. Paged problems differ only in how a key's row is found.
#pragma once

#include "common/types.h"
#include "common/unit_order.h"

namespace flash {

inline constexpr int32 kMaxBatchAxes = 8;
inline constexpr int64 kMaxHeadDim = 256;
// Rows (columns) of a block over which the gradient of a bias is summed where the bias has one for all. The caller adds
// up the blocks: BIAS_BLOCK of jax_flash/_attrs.py.
inline constexpr int32 kBiasBlock = 64;

// Queries whose numbers make a block of BwdProblem::statistics: the most that a thread block of the backward takes at a
// time. In it, for each kStatisticsRows queries in turn, their lse in units of log2 and then their delta.
inline constexpr int32 kStatisticsBlock = 128, kStatisticsRows = 64;

// A strided operand. Strides are in elements; the stride of an axis that is broadcast is 0.
struct View {
  void* data;  // null: the operand is absent
  DType dtype;
  int64 batch_stride[kMaxBatchAxes];
  int64 head_stride;
  int64 row_stride;
  int64 col_stride;
};

struct Options {
  float scale;
  float softcap;  // 0: none
  int32 window_left;
  int32 window_right;
  bool bottom_right;
  int32 keep_threshold;  // of 256; 256: no dropout
  bool return_softmax;
};

struct Problem {
  Options options;
  DType dtype;  // of q, k, v, o and their gradients

  int32 num_batch_axes;
  int64 batch_dims[kMaxBatchAxes];
  int64 num_sequences;  // per batch entry
  int64 seqlen_q;       // rows per batch entry (the packed total when varlen)
  int64 seqlen_kv;      // likewise; for paged problems the capacity of a page table row
  int64 num_heads;
  int64 num_heads_kv;
  int64 head_dim;      // of q and k
  int64 head_dim_v;    // of v and o
  int64 max_seqlen_q;  // a bound on the rows of a sequence, for the size of grids; seqlen_q when dense
  int64 max_seqlen_kv;
  bool rows_are_heads;  // of queries: each sequence's only query, of several heads that share keys; see cuda/simplify.h
  int64 page_size;      // 0: not paged
  int64 num_pages;

  // Operands, by the field's names. Rows are queries or keys; `col` is the head dim, or the key for bias and mask.
  View q, k, v;
  View bias, mask;                     // broadcast over any axis
  View alibi_slopes;                   // [batch, sequence, head] float32, sequence on `row`
  View sinks;                          // [batch, head] float32; if rows are heads, [batch, head, row]
  View q_lens, kv_lens;                // [batch, sequence] int32, sequence on `row`
  View q_segment_ids, kv_segment_ids;  // [batch, row] int32
  View cu_seqlens_q, cu_seqlens_kv;    // [batch, sequence + 1] int32, on `row`
  View page_table;                     // [batch, sequence, page] int32, sequence on `row`, page on `col`
  View dropout_stream;                 // [batch, head, 4] uint32: key, batch index, head index
};

struct FwdProblem : Problem {
  View o;
  View lse;    // [batch, head, row] float32
  View probs;  // [batch, sequence, head, i, j] float32; see return_softmax. Sequence stride in `probs_sequence_stride`
  int64 probs_sequence_stride;
  int64 probs_rows, probs_cols;
  View next_unit;  // scratch of the CUDA kernels: one int32, which hands out work. Not zero when the call starts
};

struct BwdProblem : Problem {
  View o, lse;
  View d_o, d_lse;  // cotangents
  View dq, dk, dv;
  View delta;  // [batch, head, row] float32: rowsum(dO * O) - dLSE
  // Scratch memory of the CUDA kernels, without meaning to the caller. Not zero when the call starts.
  View dq_accum;    // [batch, head, block, float] float32: the sums that become dq, see kernels/tile/sequence.cuh
  View statistics;  // [batch, head, block, float] float32: lse and delta for the main kernel, see there too
  View next_unit;   // one int32, which hands out work
  View tickets;  // [batch, head, row] int32, if deterministic: whose turn it is to add to the block that starts there
};

// The gradient of the bias: that of the scores, summed over the batch entries and heads that share the bias.
struct DbiasProblem : Problem {
  View lse, delta;  // as in BwdProblem
  View d_o;
  // [bias entry and head, row, col], see num_bias_entries; the first on `head`. Of the bias's dtype, or float32 if it
  // has one row or column for all: then an element is the sum over kBiasBlock of them.
  View dbias;
};

// How the copy engine of a GPU reads a tensor: the driver's CUtensorMap, whose contents are its own.
struct alignas(128) TensorMap {
  uint64 words[16];
};

// What Hopper's forward kernel takes. Maps are of [batch, head, row, column].
struct HopperFwdProblem : FwdProblem {
  TensorMap q_map, k_map, v_map;
  TensorMap bias_map;  // if KernelConfig::bias_tiled
  UnitOrder order;
};

// Likewise Hopper's backward kernel.
struct HopperBwdProblem : BwdProblem {
  TensorMap q_map, k_map, v_map, d_o_map;
  TensorMap statistics_map;  // of rows with the numbers of kStatisticsRows queries
  TensorMap bias_map;
  UnitOrder order;
};

// Likewise Hopper's kernel for the gradient of a bias.
struct HopperDbiasProblem : DbiasProblem {
  TensorMap q_map, k_map, v_map, d_o_map;
  TensorMap bias_map;
};

// Every driver takes so many bytes of parameters.
static_assert(sizeof(HopperFwdProblem) <= 4096 && sizeof(HopperBwdProblem) <= 4096 &&
              sizeof(HopperDbiasProblem) <= 4096);

// Blocks of statistics of each head: every sequence starts a new one.
static inline int64 num_statistics_blocks(const Problem& p) {
  return p.seqlen_q / kStatisticsBlock + p.num_sequences;
}

static inline int64 num_batch_entries(const Problem& p) {
  int64 n = 1;
  for (int32 a = 0; a < p.num_batch_axes; ++a) n *= p.batch_dims[a];
  return n;
}

// Element offset of batch entry `batch` (linear, last axis fastest) in `view`.
static inline int64 batch_offset(const Problem& p, const View& view, int64 batch) {
  int64 offset = 0;
  for (int32 a = p.num_batch_axes - 1; a >= 0; --a) {
    offset += batch % p.batch_dims[a] * view.batch_stride[a];
    batch /= p.batch_dims[a];
  }
  return offset;
}

static inline int64 offset_of(const Problem& p, const View& view, int64 batch, int64 head, int64 row, int64 col = 0) {
  return batch_offset(p, view, batch) + head * view.head_stride + row * view.row_stride + col * view.col_stride;
}

// How many batch entries, and heads, the bias tells apart. Others share it, as many for each.
static inline int64 num_bias_entries(const Problem& p) {
  int64 n = 1;
  for (int32 a = 0; a < p.num_batch_axes; ++a) n *= p.bias.batch_stride[a] ? p.batch_dims[a] : 1;
  return n;
}
static inline int64 num_bias_heads(const Problem& p) {
  return p.bias.head_stride ? p.num_heads : 1;
}

// The batch entry that is number `sharer` of those that share entry `own` of the bias. In 32 bits, as divisions of 64
// are slow on a GPU, and told the number of batch axes, which a kernel knows when it is compiled.
static inline uint32 entry_sharing_bias(const Problem& p, int32 num_batch_axes, uint32 own, uint32 sharer) {
  uint32 entry = 0, weight = 1;
  for (int32 a = num_batch_axes - 1; a >= 0; --a) {
    const bool is_own = p.bias.batch_stride[a] != 0;
    const uint32 size = uint32(p.batch_dims[a]), index = is_own ? own : sharer, rest = index / size;
    entry += (index - rest * size) * weight;
    own = is_own ? rest : own;
    sharer = is_own ? sharer : rest;
    weight *= size;
  }
  return entry;
}

template <class T>
static inline T* pointer_to(const Problem& p, const View& view, int64 batch, int64 head, int64 row, int64 col = 0) {
  return static_cast<T*>(view.data) + offset_of(p, view, batch, head, row, col);
}

}  // namespace flash
