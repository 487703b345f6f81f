// Attention backward with mma.sync and cp.async: every GPU from Ampere on. FlashAttention-2 (Dao, 2023, arXiv
// 2307.08691), with the scores transposed.
//
// A thread block has block_kv keys of one key head and goes through all queries that see them, of all query heads of
// the group. Tiles of S^T and dP^T have keys as rows, so that P^T and dS^T are left operands of dV += P^T dO and
// dK += dS^T Q as they come out of the registers; only dS^T goes through shared memory, for dQ = dS K. With warps_d > 1
// warps share keys, for products of 32 rows instead of 16 or for dk and dv that one warp could not hold, and P^T goes
// through shared memory too. dQ is summed over thread blocks in global memory, in float32; bwd_postprocess makes dq of
// it.
#pragma once

#include "common/config.h"
#include "common/problem.h"
#include "kernels/ptx/grid.cuh"
#include "kernels/tile/copy.cuh"
#include "kernels/tile/gradient.cuh"
#include "kernels/tile/rows.cuh"
#include "kernels/tile/scores.cuh"
#include "kernels/tile/segments.cuh"
#include "kernels/tile/sequence.cuh"

namespace flash::sm80 {

template <KernelConfig kC>
struct BwdStorage {
  using K = Tile<kC.block_kv, kC.head_dim>;
  using V = Tile<kC.block_kv, kC.head_dim_v>;
  using Q = Tile<kC.block_q, kC.head_dim>;
  using O = Tile<kC.block_q, kC.head_dim_v>;
  using S = Tile<kC.block_kv, kC.block_q>;
  // Offsets in bytes; buffers of q, dO and the statistics, by stage.
  static constexpr int32 kK = 0, kV = kK + K::kBytes, kQ = kV + V::kBytes, kDo = kQ + kC.num_stages * Q::kBytes;
  static constexpr int32 kDs = kDo + kC.num_stages * O::kBytes, kP = kDs + (kC.warps_d > 1 ? S::kBytes : 0);
  static constexpr int32 kStatistics = kP + S::kBytes, kStatisticsBytes = 8 * kC.block_q;  // lse, then delta
  static constexpr int32 kBias = kStatistics + kC.num_stages * kStatisticsBytes;
  static constexpr int32 kEnd = kBias + (kC.bias_tiled ? BiasTile<kC>::kBytes : 0);
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
  static constexpr int32 kWarpsQ =
      kC.head_dim % (kC.num_warps * 16 * 32 / kC.block_q) == 0 && kC.block_q > 32 ? kC.block_q / 32 : kC.block_q / 16;
  static constexpr int32 kWarpsCols = kC.num_warps / kWarpsQ;
  using Storage = BwdStorage<kC>;
  static_assert(kKeys == 16 || kKeys == 32);
  static_assert(kC.head_dim % (16 * kWarpsCols) == 0 && kC.head_dim % (16 * kWarpsD) == 0);

  static __forceinline__ void run(const BwdProblem& p, char* shared, const Sequence& seq, int64 kv_head, int32 kv_row) {
    const int32 head_dim = int32(p.head_dim), head_dim_v = int32(p.head_dim_v);
    const int32 warp = threadIdx.x / 32;
    const int32 warp_kv = warp / kWarpsD, warp_d = warp % kWarpsD, warp_q = warp / kWarpsCols,
                warp_col = warp % kWarpsCols;
    const int32 key_row = warp_kv * kKeys, query_col = warp_d * kQueries;
    const int32 group = int32(p.num_heads / p.num_heads_kv);
    const int32 keys = min_of(kC.block_kv, seq.kv.used - kv_row);  // that take part

    uint16* dk = address_of<uint16, kBatchAxes>(p, p.dk, seq.batch, kv_head, seq.kv.begin + kv_row);
    uint16* dv = address_of<uint16, kBatchAxes>(p, p.dv, seq.batch, kv_head, seq.kv.begin + kv_row);
    const int32 slot_rows = min_of(kC.block_kv, seq.kv.size - kv_row);  // that must be written
    store_zeros<kThreads>(threadIdx.x, dk, p.dk.row_stride, max_of(keys, 0), slot_rows, head_dim);
    store_zeros<kThreads>(threadIdx.x, dv, p.dv.row_stride, max_of(keys, 0), slot_rows, head_dim_v);
    if (keys <= 0) return;

    // Blocks of queries [first, end), of which the mask shows [full_begin, full_end) whole.
    const MaskRule rule = mask_rule_of(p, seq);
    const auto [first, end, full_begin, full_end] = row_blocks(rule, kv_row, keys, kC.block_kv, kC.block_q);

    const int32 first_head = int32(kv_head) * group, end_head = first_head + group;
    // Deterministic blocks take turns, so that none may stay away.
    const ScoreInputs<kC> first_in(p, seq, first_head);
    typename FilterOf<kC.segments && !kC.deterministic, kC.block_q>::Type filter(
        first_in.kv_segments, kv_row, kv_row + keys, first_in.q_segments, seq.q.used);
    // The next block above `block` that may be seen; `end` if there is none.
    auto above = [&](int32 block) {
      do ++block;
      while (block < end && !filter.may_see(block));
      return block;
    };
    const int32 start = above(first - 1);

    // Loads are one step ahead of products, and this is their head.
    const uint32 base = ptx::shared_address(shared);
    const int64 q_begin = seq.q.begin;
    struct {
      StridedRows q, d_o;
      const float* statistics;
      const uint16* bias;
    } source = {{address_of<const uint16, kBatchAxes>(p, p.q, seq.batch, first_head, q_begin), p.q.row_stride},
                {address_of<const uint16, kBatchAxes>(p, p.d_o, seq.batch, first_head, q_begin), p.d_o.row_stride},
                statistics_of<kBatchAxes>(p, seq, first_head, 0),
                address_of<const uint16, kBatchAxes>(p, p.bias, seq.batch, first_head, 0)};
    auto next_head = [&] {
      source.q.first += p.q.head_stride;
      source.d_o.first += p.d_o.head_stride;
      source.statistics += p.statistics.head_stride;
      source.bias += p.bias.head_stride;
    };
    auto load_queries = [&](int32 block, int32 stage) {
      const int32 row = block * kC.block_q;
      load_tile<typename Storage::Q, kC.aligned, kC.exact, kThreads>(base + Storage::kQ + stage * Storage::Q::kBytes,
                                                                     source.q, row, seq.q.used, head_dim);
      load_tile<typename Storage::O, kC.aligned, kC.exact, kThreads>(base + Storage::kDo + stage * Storage::O::kBytes,
                                                                     source.d_o, row, seq.q.used, head_dim_v);
      static_assert(kC.block_q <= kStatisticsRows);
      constexpr int32 kLanes = kC.block_q / 4;  // that copy lse; as many copy delta
      if (threadIdx.x < 2 * kLanes) {
        const bool is_delta = threadIdx.x >= kLanes;
        const char* from = reinterpret_cast<const char*>(source.statistics) + statistics_offset(row) +
                           (is_delta ? kDeltaBehindLse : 0) + int32(threadIdx.x) % kLanes * 16;
        ptx::cp_async_16(base + Storage::kStatistics + stage * Storage::kStatisticsBytes + 16 * threadIdx.x, from, 16);
      }
    };
    auto load_bias_tile = [&](int32 block) {
      if constexpr (kC.bias_tiled) load_bias<kC>(p, source.bias, base + Storage::kBias, block * kC.block_q, kv_row);
    };

    const StridedRows k_source = {address_of<const uint16, kBatchAxes>(p, p.k, seq.batch, kv_head, seq.kv.begin),
                                  p.k.row_stride};
    const StridedRows v_source = {address_of<const uint16, kBatchAxes>(p, p.v, seq.batch, kv_head, seq.kv.begin),
                                  p.v.row_stride};
    load_tile<typename Storage::K, kC.aligned, kC.exact, kThreads>(base + Storage::kK, k_source, kv_row, seq.kv.used,
                                                                   head_dim);
    load_tile<typename Storage::V, kC.aligned, kC.exact, kThreads>(base + Storage::kV, v_source, kv_row, seq.kv.used,
                                                                   head_dim_v);
    if (start < end) {
      load_queries(start, 0);
      load_bias_tile(start);
    }
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
    const TileWriter<typename Storage::S> ds_writer(base, Storage::kDs, key_row, query_col);
    const TileWriter<typename Storage::S> p_writer(base, Storage::kP, key_row, query_col);
    const ColsOfA<BiasTile<kC>> bias{{base, Storage::kBias, query_col, key_row}};
    const float dropout_scale = 256.0f / float(p.options.keep_threshold);

    Accumulator<kKeys, kC.head_dim / kWarpsD> dk_sum;
    Accumulator<kKeys, kC.head_dim_v / kWarpsD> dv_sum;
    dk_sum.clear();
    dv_sum.clear();
    int32 *ticket = nullptr, *last_ticket = nullptr;
    const bool keeps_turns = kC.deterministic && threadIdx.x == 0;

    // kMasked: the mask cuts this block. `next` is the block to be loaded, -1 for none.
    auto step = [&]<bool kMasked>(const ScoreInputs<kC>& in, int32 head, int32 block, int32 stage, int32 next) {
      const int32 q_row = block * kC.block_q;
      ptx::cp_async_wait<0>();
      __syncthreads();  // this step's queries are there for all, and all are done with the last one's
      if (kC.num_stages > 1 && next >= 0) load_queries(next, stage ^ 1);
      if constexpr (kMasked || kDataMasks<kC>) hide_rows_without_keys(base, shared, stage);
      Accumulator<kKeys, kQueries> s, ds;
      s.clear();
      ds.clear();
      gemm<kDType, kC.head_dim>(s, k_rows, RowsOfB<typename Storage::Q>{q_rows.reader.stage(stage)});
      gemm<kDType, kC.head_dim_v>(ds, v_rows, RowsOfB<typename Storage::O>{do_rows.reader.stage(stage)});
      auto pair_of = [&](int32 first, int32 n) {
        return *reinterpret_cast<const float2*>(shared + Storage::kStatistics + stage * Storage::kStatisticsBytes +
                                                4 * (first + query_col + 8 * n + int32(threadIdx.x % 4) * 2));
      };
      TileGradient<kC, kKeys, kQueries> gradient;
      gradient.weights(
          s, p, in, kMasked, kv_row + key_row, q_row + query_col, bias, [&](int32 n) { return pair_of(0, n); },
          score_factor<kC>(p));
      gradient.scores(ds, s, p, [&](int32 n) { return pair_of(kC.block_q, n); });
      gradient.drop(s);

      auto one = [](int32, int32) { return 1.0f; };
      ds_writer.template store<kDType>(ds, one);
      if (keeps_turns) {
        ticket = ticket_of<kC>(p, seq, head, q_row);
        await_turn<kC>(ticket, rule, kv_row / kC.block_kv, q_row);
      }
      const ColsOfB<typename Storage::O, kWarpsD> do_operand{do_cols.reader.stage(stage)};
      const ColsOfB<typename Storage::Q, kWarpsD> q_operand{q_cols.reader.stage(stage)};
      // In the middle of the step: dS^T (and P^T) are there for all, and the bias has been read.
      auto meet = [&] {
        __syncthreads();
        if (keeps_turns) {
          pass_turn(last_ticket);  // its additions have long arrived, and cost no wait
          last_ticket = ticket;
        }
        if constexpr (kC.num_stages > 1) {
          if (next >= 0) load_bias_tile(next);
          ptx::cp_async_commit();
        }
      };
      if constexpr (kWarpsD == 1) {
        uint32 fragments[kKeys / 16][kQueries / 16][4];
        pack<kDType>(fragments, s);
        gemm<kDType, kC.block_q>(dv_sum, RegistersOfA<kKeys, kQueries>{fragments}, do_operand);
        pack<kDType>(fragments, ds);
        meet();
        gemm<kDType, kC.block_q>(dk_sum, RegistersOfA<kKeys, kQueries>{fragments}, q_operand);
      } else {
        p_writer.template store<kDType>(s, one);
        meet();
        gemm<kDType, kC.block_q>(dv_sum, p_rows, do_operand);
        gemm<kDType, kC.block_q>(dk_sum, ds_rows, q_operand);
      }
      if constexpr (kC.num_stages == 1) {
        __syncthreads();  // all are done with this step's queries
        if (next >= 0) {
          load_queries(next, 0);
          load_bias_tile(next);
        }
        ptx::cp_async_commit();
      }
      Accumulator<kDqRows, kC.head_dim / kWarpsCols> dq;
      dq.clear();
      gemm<kDType, kC.block_kv>(dq, ds_cols, k_cols);
      float* place = own_place(p, accum_block_of<kBatchAxes>(p, seq, head, q_row), warp_q * kDqRows, 16 * warp_col);
      add_to_dq<kC, kWarpsCols>(p, seq, place, dq, q_row, warp_q * kDqRows, 16 * warp_col);
    };
    int32 stage = 0;
    for (int32 head = first_head; head < end_head; ++head) {
      const ScoreInputs<kC> in(p, seq, head);
      for (int32 block = start; block < end;) {
        const int32 following = above(block);
        int32 next = following;
        if (following >= end) {
          next = head + 1 < end_head ? start : -1;
          next_head();
        }
        if (full_begin <= block && block < full_end)
          step.template operator()<false>(in, head, block, stage, next);
        else
          step.template operator()<true>(in, head, block, stage, next);
        if (kC.num_stages > 1) stage ^= 1;
        block = following;
      }
    }

    // dk and dv leave through the memory of k and v.
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (keeps_turns) pass_turn(last_ticket);
    TileWriter<typename Storage::K>(base, Storage::kK, key_row, 16 * warp_d)
        .template store<kDType, kWarpsD>(dk_sum, [&](int32, int32) { return p.options.scale; });
    TileWriter<typename Storage::V>(base, Storage::kV, key_row, 16 * warp_d)
        .template store<kDType, kWarpsD>(dv_sum, [&](int32, int32) { return dropout_scale; });
    __syncthreads();
    store_tile<typename Storage::K, kC.aligned, kThreads>(shared + Storage::kK, dk, p.dk.row_stride, keys, head_dim);
    store_tile<typename Storage::V, kC.aligned, kThreads>(shared + Storage::kV, dv, p.dv.row_stride, keys, head_dim_v);
  }

  // Zeros the rows of q and dO that see no key: they have no gradient, and what stands there would be NaN also when
  // multiplied by their weights of 0.
  static __forceinline__ void hide_rows_without_keys(uint32 base, const char* shared, int32 stage) {
    constexpr int32 kThreadsPerRow = kThreads / kC.block_q;
    const int32 row = threadIdx.x / kThreadsPerRow, part = threadIdx.x % kThreadsPerRow;
    const char* lse = shared + Storage::kStatistics + stage * Storage::kStatisticsBytes + 4 * row;
    if (*reinterpret_cast<const float*>(lse) == kNoKey) {
      using Q = typename Storage::Q;
      using O = typename Storage::O;
      zero_rows<Q>(base + Storage::kQ + stage * Q::kBytes, row, row + 1, part, kThreadsPerRow);
      zero_rows<O>(base + Storage::kDo + stage * O::kBytes, row, row + 1, part, kThreadsPerRow);
    }
    __syncthreads();
  }
};

template <KernelConfig kC>
__forceinline__ void bwd(const BwdProblem& p) {
  extern __shared__ __align__(1024) char shared[];
  constexpr int32 kAxes = kC.num_batch_axes;
  ptx::let_next_grid_start();
  ptx::wait_for_last_grid();
  for_each_block<kAxes, Side::kKeys, kC.block_kv, num_threads(kC), kC.deterministic>(
      p, [&](const Sequence& s, int32 head, int32 row) { BwdBlock<kC>::run(p, shared, s, head, row); },
      [&](int64 batch, int64 row) { define_stray<kAxes>(p, batch, row); });
}

}  // namespace flash::sm80
