// The backward's arithmetic on a tile of S^T and dP^T (rows are keys): weights from scores, then the gradient of the
// scores; and the turns in which thread blocks add to dq.
#pragma once

#include "common/config.h"
#include "kernels/ptx/atomic.cuh"
#include "kernels/tile/scores.cuh"

namespace flash {

template <KernelConfig kC, int32 kM, int32 kN>
class TileGradient {
 public:
  // Raw products become weights, before dropout. The tile starts at (key, query) of the sequence; lse(n) is the pair of
  // columns 8 n + 2 (lane % 4) of the tile's lse_in_log2. masked: the positional mask may hide some of it. factor:
  // score_factor().
  template <class BiasReader, class Lse>
  __forceinline__ void weights(Accumulator<kM, kN>& s, const Problem& p, const ScoreInputs<kC>& in, bool masked,
                               int32 key, int32 query, const BiasReader& bias, Lse lse, float factor) {
    draw(p, in, key, query);
    [[maybe_unused]] float even = 0.0f;
    auto on_cap = [&](int32 m, int32 n, int32 e, float y) {
      if constexpr (kC.softcap) {
        if (e % 2 == 0)
          even = 1.0f - y * y;
        else
          cap_slope_[m][n][e / 2] = ptx::pack<DType::kF16>(even, 1.0f - y * y);
      }
    };
    if (masked)
      apply_scores<kC, true, true>(s, p, in, key, query, bias, on_cap);
    else if constexpr (kScoresInLog2<kC> || kDataMasks<kC>)
      apply_scores<kC, true, false>(s, p, in, key, query, bias, on_cap);
#pragma unroll
    for (int32 n = 0; n < kN / 8; ++n) {
      const float2 pair = lse(n);
      const float base[2] = {pair.x, pair.y};
#pragma unroll
      for (int32 m = 0; m < kM / 16; ++m)
#pragma unroll
        for (int32 e = 0; e < 4; ++e) s.x[m][n][e] = ptx::ex2_approx(s.x[m][n][e] * factor - base[e % 2]);
    }
  }

  // Draws what dropout keeps: in place of weights() where another thread block computes those.
  __forceinline__ void draw(const Problem& p, const ScoreInputs<kC>& in, int32 key, int32 query) {
    if constexpr (kC.dropout)
      for_each_dropout_bit<true, kM, kN>(
          in.dropout, p.options.keep_threshold, key, query,
          [&](int32 m, int32 n, int32 e, bool keep) { kept_[m][n / 8] |= uint32(keep) << (n % 8 * 4 + e); });
  }

  // dP^T becomes the gradient of the scores behind the soft cap, hence also that of the bias. delta(n) is like lse(n),
  // or 0 where dP^T began at -delta.
  template <int32 kFrom = 0, int32 kTo = kN, class Delta>
  __forceinline__ void capped_scores(Accumulator<kM, kN>& ds, const Accumulator<kM, kN>& weights, const Problem& p,
                                     Delta delta) const {
    const float dropout_scale = 256.0f / float(p.options.keep_threshold);
#pragma unroll
    for (int32 n = kFrom / 8; n < kTo / 8; ++n) {
      const float2 pair = delta(n);
      const float shift[2] = {pair.x, pair.y};
#pragma unroll
      for (int32 m = 0; m < kM / 16; ++m)
#pragma unroll
        for (int32 e = 0; e < 4; ++e) {
          float d_weight = ds.x[m][n][e];
          if constexpr (kC.dropout) d_weight = keeps(m, n, e) ? d_weight * dropout_scale : 0.0f;
          ds.x[m][n][e] = weights.x[m][n][e] * (d_weight - shift[e % 2]);
        }
    }
  }

  // Likewise that of the raw products, without the scale.
  template <int32 kFrom = 0, int32 kTo = kN, class Delta>
  __forceinline__ void scores(Accumulator<kM, kN>& ds, const Accumulator<kM, kN>& weights, const Problem& p,
                              Delta delta) const {
    capped_scores<kFrom, kTo>(ds, weights, p, delta);
    if constexpr (kC.softcap) {
#pragma unroll
      for (int32 m = 0; m < kM / 16; ++m)
#pragma unroll
        for (int32 n = kFrom / 8; n < kTo / 8; ++n)
#pragma unroll
          for (int32 e = 0; e < 4; ++e)
            ds.x[m][n][e] *= ptx::unpack<DType::kF16>(uint16(cap_slope_[m][n][e / 2] >> (16 * (e % 2))));
    }
  }

  // Weights as the forward multiplied V by them, but not rescaled.
  template <int32 kFrom = 0, int32 kTo = kN>
  __forceinline__ void drop(Accumulator<kM, kN>& weights) const {
    if constexpr (kC.dropout) {
#pragma unroll
      for (int32 m = 0; m < kM / 16; ++m)
#pragma unroll
        for (int32 n = kFrom / 8; n < kTo / 8; ++n)
#pragma unroll
          for (int32 e = 0; e < 4; ++e) weights.x[m][n][e] = keeps(m, n, e) ? weights.x[m][n][e] : 0.0f;
    }
  }

  // The slopes of the soft cap that weights() has left: for who has only the weights.
  using Slopes = uint32[kM / 16][kC.softcap ? kN / 8 : 1][2];
  __forceinline__ Slopes& slopes() { return cap_slope_; }

 private:
  __forceinline__ bool keeps(int32 m, int32 n, int32 e) const { return kept_[m][n / 8] >> (n % 8 * 4 + e) & 1; }

  uint32 kept_[kM / 16][(kN + 63) / 64] = {};  // bit 4 n + e of the fragments m
  // Of the soft cap, 1 - tanh^2, in pairs of 16 bits: as precise as tanh.approx, and registers are scarce.
  Slopes cap_slope_;
};

// A thread's place in a tile of dq_accum, where `accum` is that of the tile's first query: the warp's rows from
// warp_row on, columns from `col` on.
__forceinline__ float* own_place(const BwdProblem& p, float* accum, int32 warp_row, int32 col) {
  const int32 row_floats = int32(p.dq_accum.row_stride);
  return accum + uint32(warp_row / kAccumRows * row_floats + col / 8 * 128 + int32(threadIdx.x % 32) * 4);
}

// Adds a tile of dq to dq_accum at the thread's place: the warp's rows from warp_row behind query `row` of the sequence
// on, of n-tiles those that are dealt (see dealt_column) to the warps whose first is at column `col`, but for
// skipped_cols in front.
template <KernelConfig kC, int32 kGroups, int32 kM, int32 kN>
__forceinline__ void add_to_dq(const BwdProblem& p, const Sequence& seq, float* place, const Accumulator<kM, kN>& dq,
                               int32 row, int32 warp_row, int32 col, int32 skipped_cols = 0) {
  const int32 row_floats = int32(p.dq_accum.row_stride), first_tile = col / 8;
#pragma unroll
  for (int32 m = 0; m < kM / 16; ++m)
#pragma unroll
    for (int32 n = 0; n < kN / 8; ++n) {
      const int32 tile = dealt_column<kGroups>(n) / 8;
      const float(&x)[4] = dq.x[m][n];
      if (row + warp_row + 16 * m < seq.q.used && 8 * tile >= skipped_cols &&
          (kC.exact || (first_tile + tile) * 128 < row_floats))
        ptx::red_add_x4(place + m * row_floats + tile * 128, x[0], x[1], x[2], x[3]);
    }
}

// If deterministic, the blocks of keys that a block of queries sees add to dq in turn, the last one first: with a
// causal mask each block of keys begins at its own diagonal, so that the later ones come by earlier, and none has to
// wait. The grid does later ones earlier, so that none waits for one that has not begun. A ticket counts the thread
// blocks that have added; all of a pair have the same turn.
template <KernelConfig kC>
__forceinline__ int32* ticket_of(const BwdProblem& p, const Sequence& seq, int32 head, int32 q_row) {
  return address_of<int32, kC.num_batch_axes>(p, p.tickets, seq.batch, head, seq.q.begin + q_row);
}

// Waits for the turn of block kv_block at the queries from q_row on. By one thread; the others follow it.
template <KernelConfig kC>
__forceinline__ void await_turn(const int32* ticket, const MaskRule& rule, int32 kv_block, int32 q_row) {
  const int32 last_row = min_of(q_row + kC.block_q, rule.seqlen_q);
  const int32 number = (visible_keys(rule, q_row, last_row).end - 1) / kC.block_kv - kv_block;
  while (ptx::ld_acquire(ticket) < cluster_size(kC) * number) {
  }
}

// When this thread knows that all have added: passes the turn on, if one has come.
__forceinline__ void pass_turn(int32* ticket) {
  if (!ticket) return;
  __threadfence();
  ptx::red_release_add(ticket, 1);
}

}  // namespace flash
