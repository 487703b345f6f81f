// Attention backward with mma.sync and cp.async: every GPU from Ampere on. FlashAttention-2 (Dao, 2023, arXiv
// 2307.08691), with the scores transposed.
//
// A thread block has block_kv keys of one key head and goes through all queries that see them, of all query heads of
// the group. Tiles of S^T and dP^T have keys as rows, so that P^T and dS^T are left operands of dV += P^T dO and
// dK += dS^T Q as they come out of the registers; only dS^T goes through shared memory, for dQ = dS K. With warps_d > 1
// (head dims whose dk and dv one warp could not hold) P^T goes that way too. dQ is summed over thread blocks in global
// memory, in float32; bwd_postprocess makes dq of it.
#pragma once

#include "common/config.h"
#include "common/problem.h"
#include "kernels/ptx/atomic.cuh"
#include "kernels/tile/copy.cuh"
#include "kernels/tile/scores.cuh"
#include "kernels/tile/sequence.cuh"

namespace flash::sm80 {

template <KernelConfig kC>
struct BwdStorage {
  using K = Tile<kC.block_kv, kC.head_dim>;
  using V = Tile<kC.block_kv, kC.head_dim_v>;
  using Q = Tile<kC.block_q, kC.head_dim>;
  using O = Tile<kC.block_q, kC.head_dim_v>;
  using S = Tile<kC.block_kv, kC.block_q>;
  // Offsets in bytes; buffers of q, dO, and lse and delta, by stage.
  static constexpr int32 kK = 0, kV = kK + K::kBytes, kQ = kV + V::kBytes, kDo = kQ + kC.num_stages * Q::kBytes;
  static constexpr int32 kDs = kDo + kC.num_stages * O::kBytes, kP = kDs + (kC.warps_d > 1 ? S::kBytes : 0);
  static constexpr int32 kLse = kP + S::kBytes, kDelta = kLse + kC.num_stages * 4 * kC.block_q;
  static constexpr int32 kEnd = kDelta + kC.num_stages * 4 * kC.block_q;
  static_assert(kEnd == shared_bytes(kC));
};

template <KernelConfig kC>
struct BwdBlock {
  static constexpr int32 kThreads = num_threads(kC);
  static constexpr int32 kBatchAxes = kC.num_batch_axes;
  static constexpr DType kDType = kC.dtype;
  // Warps of S^T, dP^T, dK and dV: rows of keys, and shares of the queries (of the head dim in dK and dV).
  static constexpr int32 kWarpsD = kC.warps_d, kWarpsKv = kC.num_warps / kWarpsD;
  static constexpr int32 kKeys = kC.block_kv / kWarpsKv, kQueries = kC.block_q / kWarpsD;
  // Warps of dQ: rows of queries, and shares of the head dim.
  static constexpr int32 kWarpsQ = kC.head_dim % (kC.num_warps * 16 * 32 / kC.block_q) == 0 && kC.block_q > 32
                                       ? kC.block_q / 32
                                       : kC.block_q / 16;
  static constexpr int32 kWarpsCols = kC.num_warps / kWarpsQ;
  using Storage = BwdStorage<kC>;
  static_assert(kKeys == 16 || kKeys == 32);
  static_assert(kC.head_dim % (16 * kWarpsCols) == 0 && kC.head_dim % (16 * kWarpsD) == 0);

  static __forceinline__ void run(const BwdProblem& p, char* shared, const Sequence& seq, int64 kv_head, int32 kv_row) {
    const int32 head_dim = int32(p.head_dim), head_dim_v = int32(p.head_dim_v);
    const int32 warp = threadIdx.x / 32;
    const int32 warp_kv = warp / kWarpsD, warp_d = warp % kWarpsD, warp_q = warp / kWarpsCols, warp_col = warp % kWarpsCols;
    const int32 key_row = warp_kv * kKeys, query_col = warp_d * kQueries;
    const int32 group = int32(p.num_heads / p.num_heads_kv);
    const int32 keys = min_of(kC.block_kv, seq.kv.used - kv_row);  // that take part

    uint16* dk = address_of<uint16, kBatchAxes>(p, p.dk, seq.batch, kv_head, seq.kv.begin + kv_row);
    uint16* dv = address_of<uint16, kBatchAxes>(p, p.dv, seq.batch, kv_head, seq.kv.begin + kv_row);
    const int32 slot_rows = min_of(kC.block_kv, seq.kv.size - kv_row);  // that must be written
    store_zeros<kThreads>(dk, p.dk.row_stride, max_of(keys, 0), slot_rows, head_dim);
    store_zeros<kThreads>(dv, p.dv.row_stride, max_of(keys, 0), slot_rows, head_dim_v);
    if (keys <= 0) return;

    // Blocks of queries [first, end), of which the mask shows [full_begin, full_end) whole.
    const MaskRule rule = mask_rule_of(p, seq);
    const Range any = {visible_rows(rule, kv_row).begin, visible_rows(rule, kv_row + keys - 1).end};
    const Range all = {visible_rows(rule, kv_row + kC.block_kv - 1).begin, visible_rows(rule, kv_row).end};
    const int32 first = any.begin / kC.block_q, end = any.begin < any.end ? (any.end - 1) / kC.block_q + 1 : first;
    const int32 full_begin = int32(ceil_div(all.begin, kC.block_q)), full_end = all.end / kC.block_q;

    const uint32 base = ptx::shared_address(shared);

    // Loads go one step ahead of the products: blocks [first, end) of each head of the group, one head after the other.
    struct {
      int32 block, head, stage;
      StridedRows q, d_o;
      const float *lse, *delta;
    } next = {first, int32(kv_head) * group, 0};
    const int32 end_head = next.head + group;
    auto load_next = [&] {
      if (next.head == end_head || first == end) return;
      if (next.block == first) {
        const int64 q_begin = seq.q.begin + first * kC.block_q;
        next.q = {address_of<const uint16, kBatchAxes>(p, p.q, seq.batch, next.head, q_begin), p.q.row_stride};
        next.d_o = {address_of<const uint16, kBatchAxes>(p, p.d_o, seq.batch, next.head, q_begin), p.d_o.row_stride};
        next.lse = address_of<const float, kBatchAxes>(p, p.lse, seq.batch, next.head, q_begin);
        next.delta = address_of<const float, kBatchAxes>(p, p.delta, seq.batch, next.head, q_begin);
      }
      const int32 rows = seq.q.used - next.block * kC.block_q, stage = next.stage;
      load_tile<typename Storage::Q, kC.aligned, kC.exact, kThreads>(base + Storage::kQ + stage * Storage::Q::kBytes, next.q, 0, rows,
                                                           head_dim);
      load_tile<typename Storage::O, kC.aligned, kC.exact, kThreads>(base + Storage::kDo + stage * Storage::O::kBytes, next.d_o, 0, rows, head_dim_v);
      if (threadIdx.x < kC.block_q) {
        const int32 bytes = threadIdx.x < rows ? 4 : 0;
        const uint32 target = base + Storage::kLse + 4 * (stage * kC.block_q + threadIdx.x);
        ptx::cp_async_4(target, next.lse + threadIdx.x, bytes);
        ptx::cp_async_4(target + Storage::kDelta - Storage::kLse, next.delta + threadIdx.x, bytes);
      }
      next.q.first += kC.block_q * next.q.stride;
      next.d_o.first += kC.block_q * next.d_o.stride;
      next.lse += kC.block_q;
      next.delta += kC.block_q;
      if (++next.block == end) next.block = first, ++next.head;
      if (++next.stage == kC.num_stages) next.stage = 0;
    };

    const StridedRows k_source = {address_of<const uint16, kBatchAxes>(p, p.k, seq.batch, kv_head, seq.kv.begin),
                                  p.k.row_stride};
    const StridedRows v_source = {address_of<const uint16, kBatchAxes>(p, p.v, seq.batch, kv_head, seq.kv.begin),
                                  p.v.row_stride};
    load_tile<typename Storage::K, kC.aligned, kC.exact, kThreads>(base + Storage::kK, k_source, kv_row, seq.kv.used, head_dim);
    load_tile<typename Storage::V, kC.aligned, kC.exact, kThreads>(base + Storage::kV, v_source, kv_row, seq.kv.used, head_dim_v);
    load_next();
    ptx::cp_async_commit();

    constexpr int32 kDqRows = kC.block_q / kWarpsQ;
    const RowsOfA<typename Storage::K> k_rows{{base, Storage::kK, key_row}};
    const RowsOfA<typename Storage::V> v_rows{{base, Storage::kV, key_row}};
    const ColsOfB<typename Storage::K, kWarpsCols> k_cols{{base, Storage::kK, 0, 16 * warp_col}};
    const ColsOfA<typename Storage::S> ds_cols{{base, Storage::kDs, 0, warp_q * kDqRows}};
    const RowsOfA<typename Storage::S> p_rows{{base, Storage::kP, key_row}}, ds_rows{{base, Storage::kDs, key_row}};
    const RowsOfB<typename Storage::Q> q_rows{{base, Storage::kQ, query_col}};
    const RowsOfB<typename Storage::O> do_rows{{base, Storage::kDo, query_col}};
    const ColsOfB<typename Storage::Q, kWarpsD> q_cols{{base, Storage::kQ, 0, 16 * warp_d}};
    const ColsOfB<typename Storage::O, kWarpsD> do_cols{{base, Storage::kDo, 0, 16 * warp_d}};
    const TileWriter<typename Storage::S> ds_writer(base, Storage::kDs, key_row, query_col), p_writer(base, Storage::kP, key_row, query_col);
    const float dropout_scale = 256.0f / float(p.options.keep_threshold);

    Accumulator<kKeys, kC.head_dim / kWarpsD> dk_sum;
    Accumulator<kKeys, kC.head_dim_v / kWarpsD> dv_sum;
    dk_sum.clear();
    dv_sum.clear();

    // kMasked: the mask cuts this block.
    auto step = [&]<bool kMasked>(const ScoreInputs<kC>& in, int32 head, int32 q_row, int32 stage, float* dq_sum) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // this step's queries are there for all, and all are done with the last one's
      if constexpr (kC.num_stages > 1) {
        load_next();
        ptx::cp_async_commit();
      }
      Accumulator<kKeys, kQueries> s, ds;
      s.clear();
      ds.clear();
      gemm<kDType, kC.head_dim>(s, k_rows, RowsOfB<typename Storage::Q>{q_rows.reader.stage(stage)});
      gemm<kDType, kC.head_dim_v>(ds, v_rows, RowsOfB<typename Storage::O>{do_rows.reader.stage(stage)});
      softmax_gradient<kMasked>(p, in, shared, seq, head, s, ds, kv_row + key_row, q_row, query_col, stage);

      auto one = [](int32, int32) { return 1.0f; };
      ds_writer.template store<kDType>(ds, one);
      const ColsOfB<typename Storage::O, kWarpsD> do_operand{do_cols.reader.stage(stage)};
      const ColsOfB<typename Storage::Q, kWarpsD> q_operand{q_cols.reader.stage(stage)};
      if constexpr (kWarpsD == 1) {
        uint32 fragments[kKeys / 16][kQueries / 16][4];
        pack<kDType>(fragments, s);
        gemm<kDType, kC.block_q>(dv_sum, RegistersOfA<kKeys, kQueries>{fragments}, do_operand);
        pack<kDType>(fragments, ds);
        __syncthreads();
        gemm<kDType, kC.block_q>(dk_sum, RegistersOfA<kKeys, kQueries>{fragments}, q_operand);
      } else {
        p_writer.template store<kDType>(s, one);
        __syncthreads();
        gemm<kDType, kC.block_q>(dv_sum, p_rows, do_operand);
        gemm<kDType, kC.block_q>(dk_sum, ds_rows, q_operand);
      }

      if constexpr (kC.num_stages == 1) {
        __syncthreads();  // all are done with this step's queries
        load_next();
        ptx::cp_async_commit();
      }
      Accumulator<kDqRows, kC.head_dim / kWarpsCols> dq;
      dq.clear();
      gemm<kDType, kC.block_kv>(dq, ds_cols, k_cols);
      add_to_dq<kMasked>(p, seq, rule, head, dq, dq_sum, kv_row / kC.block_kv, q_row, warp_q * kDqRows, warp_col);
    };
    int32 stage = 0;
    const int32 row_floats = int32(p.dq_accum.row_stride);
    for (int32 head = int32(kv_head) * group; head < end_head; ++head) {
      const ScoreInputs<kC> in(p, seq, head);
      float* dq_sum = accum_block_of<kBatchAxes>(p, seq, head, first * kC.block_q + warp_q * kDqRows) +
                      2 * warp_col * 128 + threadIdx.x % 32 * 4;
      for (int32 block = first; block < end; ++block) {
        if (!kDataMasks<kC> && full_begin <= block && block < full_end)
          step.template operator()<false>(in, head, block * kC.block_q, stage, dq_sum);
        else
          step.template operator()<true>(in, head, block * kC.block_q, stage, dq_sum);
        if (++stage == kC.num_stages) stage = 0;
        dq_sum += kC.block_q / kAccumRows * row_floats;
      }
    }

    // dk and dv leave through the memory of k and v.
    ptx::cp_async_wait<0>();
    __syncthreads();
    TileWriter<typename Storage::K>(base, Storage::kK, key_row, 16 * warp_d)
        .template store<kDType, kWarpsD>(dk_sum, [&](int32, int32) { return p.options.scale; });
    TileWriter<typename Storage::V>(base, Storage::kV, key_row, 16 * warp_d)
        .template store<kDType, kWarpsD>(dv_sum, [&](int32, int32) { return dropout_scale; });
    __syncthreads();
    store_tile<typename Storage::K, kC.aligned, kThreads>(shared + Storage::kK, dk, p.dk.row_stride, keys, head_dim);
    store_tile<typename Storage::V, kC.aligned, kThreads>(shared + Storage::kV, dv, p.dv.row_stride, keys, head_dim_v);
  }

  // From raw S^T and dP^T to P^T (dropped, not yet rescaled) and dS^T (of the raw scores, but without the scale). The
  // warp's part starts at key `key` and at query `query_col` of the block at q_row.
  template <bool kMasked>
  static __forceinline__ void softmax_gradient(const BwdProblem& p, const ScoreInputs<kC>& in, const char* shared,
                                               const Sequence& seq, int32 head, Accumulator<kKeys, kQueries>& s,
                                               Accumulator<kKeys, kQueries>& ds, int32 key, int32 q_row,
                                               int32 query_col, int32 stage) {
    const int32 lane = threadIdx.x % 32;
    const float factor = score_factor(in), dropout_scale = 256.0f / float(p.options.keep_threshold);
    [[maybe_unused]] uint32 kept[kKeys / 16][(kQueries + 63) / 64] = {};  // bit 4 n + e of the fragments m
    if constexpr (kC.dropout)
      for_each_dropout_bit<true, kKeys, kQueries>(
          in.dropout, p.options.keep_threshold, key, q_row + query_col,
          [&](int32 m, int32 n, int32 e, bool keep) { kept[m][n / 8] |= uint32(keep) << (n % 8 * 4 + e); });
    [[maybe_unused]] Accumulator<kC.softcap ? kKeys : 16, kC.softcap ? kQueries : 16> cap_slope;
    if constexpr (kMasked || kScoresInLog2<kC> || kDataMasks<kC>)
      apply_scores<kC, true, kMasked>(s, p, in, key, q_row + query_col, [&](int32 m, int32 n, int32 e, float y) {
        if constexpr (kC.softcap) cap_slope.x[m][n][e] = 1.0f - y * y;
      });
#pragma unroll
    for (int32 n = 0; n < kQueries / 8; ++n) {
      const int32 at = 4 * (stage * kC.block_q + query_col + 8 * n + lane % 4 * 2);
      const float2 lse = *reinterpret_cast<const float2*>(shared + Storage::kLse + at);
      const float2 delta = *reinterpret_cast<const float2*>(shared + Storage::kDelta + at);
      // Rows that see no key have -inf; subtracting +inf instead makes them zero.
      const float base[2] = {lse.x == -kInfinity ? kInfinity : lse.x * kLog2e,
                             lse.y == -kInfinity ? kInfinity : lse.y * kLog2e};
      const float shift[2] = {delta.x, delta.y};
#pragma unroll
      for (int32 m = 0; m < kKeys / 16; ++m)
#pragma unroll
        for (int32 e = 0; e < 4; ++e) {
          const float prob = ptx::ex2_approx(s.x[m][n][e] * factor - base[e % 2]);
          float d_prob = ds.x[m][n][e];
          s.x[m][n][e] = prob;
          if constexpr (kC.dropout) {
            const bool keep = kept[m][n / 8] >> (n % 8 * 4 + e) & 1;
            d_prob = keep ? d_prob * dropout_scale : 0.0f;
            s.x[m][n][e] = keep ? prob : 0.0f;
          }
          ds.x[m][n][e] = prob * (d_prob - shift[e % 2]);
        }
    }
    if constexpr (kC.bias) add_to_dbias(p, seq, head, ds, key, q_row + query_col);
    if constexpr (kC.softcap) {
#pragma unroll
      for (int32 m = 0; m < kKeys / 16; ++m)
#pragma unroll
        for (int32 n = 0; n < kQueries / 8; ++n)
#pragma unroll
          for (int32 e = 0; e < 4; ++e) ds.x[m][n][e] *= cap_slope.x[m][n][e];
    }
  }

  // Adds the block's share to dq_accum. If deterministic, the blocks of keys that a block of queries sees take turns.
  template <bool kMasked>
  static __forceinline__ void add_to_dq(const BwdProblem& p, const Sequence& seq, const MaskRule& rule, int32 head,
                                        const Accumulator<kC.block_q / kWarpsQ, kC.head_dim / kWarpsCols>& dq,
                                        float* target, int32 kv_block, int32 q_row, int32 warp_row, int32 warp_col) {
    int32* ticket = nullptr;
    if constexpr (kC.deterministic) {
      ticket = address_of<int32, kBatchAxes>(p, p.tickets, seq.batch, head, seq.q.begin + q_row);
      const int32 last_row = min_of(q_row + kC.block_q, rule.seqlen_q);
      const int32 turn = kv_block - visible_keys(rule, q_row, last_row).begin / kC.block_kv;
      if (threadIdx.x == 0)
        while (ptx::ld_acquire(ticket) != turn) {
        }
      __syncthreads();
    }
    const int32 row_floats = int32(p.dq_accum.row_stride), first_tile = 2 * warp_col;
#pragma unroll
    for (int32 m = 0; m < kC.block_q / kWarpsQ / 16; ++m)
#pragma unroll
      for (int32 n = 0; n < kC.head_dim / kWarpsCols / 8; ++n) {
        const int32 tile = dealt_column<kWarpsCols>(n) / 8;
        const float(&x)[4] = dq.x[m][n];
        if ((!kMasked || q_row + warp_row + 16 * m < rule.seqlen_q) &&
            (kC.exact || (first_tile + tile) * 128 < row_floats))
          ptx::red_add_x4(target + m * row_floats + tile * 128, x[0], x[1], x[2], x[3]);
      }
    if constexpr (kC.deterministic) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) ptx::red_release_add(ticket, 1);
    }
  }

  // Adds dS^T to the bias gradient, whose shape may broadcast.
  static __forceinline__ void add_to_dbias(const BwdProblem& p, const Sequence& seq, int64 head,
                                           const Accumulator<kKeys, kQueries>& ds, int32 row, int32 col) {
    float* dbias = address_of<float, kBatchAxes>(p, p.dbias, seq.batch, head, 0);
    const int32 lane = threadIdx.x % 32;
#pragma unroll
    for (int32 m = 0; m < kKeys / 16; ++m)
#pragma unroll
      for (int32 n = 0; n < kQueries / 8; ++n)
#pragma unroll
        for (int32 e = 0; e < 4; ++e) {
          const int64 j = row + 16 * m + e / 2 * 8 + lane / 4, i = col + 8 * n + lane % 4 * 2 + e % 2;
          if (i < seq.q.used && j < seq.kv.used)
            ptx::red_add(dbias + i * p.dbias.row_stride + j * p.dbias.col_stride, ds.x[m][n][e]);
        }
  }
};

template <KernelConfig kC>
__forceinline__ void bwd(const BwdProblem& p) {
  extern __shared__ __align__(1024) char shared[];
  constexpr int32 kAxes = kC.num_batch_axes;
  for_each_block<kAxes, Side::kKeys, kC.block_kv, num_threads(kC), false>(
      p, [&](const Sequence& s, int32 head, int32 row) { BwdBlock<kC>::run(p, shared, s, head, row); },
      [&](int64 batch, int64 row) {
        for (int64 head = 0; head < p.num_heads_kv; ++head) {
          uint16* dk = address_of<uint16, kAxes>(p, p.dk, batch, head, row);
          uint16* dv = address_of<uint16, kAxes>(p, p.dv, batch, head, row);
          for (int64 c = 0; c < p.head_dim; ++c) dk[c] = 0;
          for (int64 c = 0; c < p.head_dim_v; ++c) dv[c] = 0;
        }
      });
}

}  // namespace flash::sm80
