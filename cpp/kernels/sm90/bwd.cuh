// Attention backward for Hopper: FlashAttention-3 (Shah et al., 2024, arXiv 2407.08608), with the scores transposed.
// docs/hopper_backward.md says why it looks as it does.
//
// A thread block has block_kv keys of one key head and goes through all blocks of queries that see them, of all
// query heads of the group. One warp copies Q, dO, lse and delta into rings of buffers, and if deterministic another
// one keeps the turns at dq. Two warpgroups compute. With warps_d = 1 each owns 64 keys: P^T and dS^T are left operands
// straight from registers, and only dS^T goes through shared memory too, for dQ = dS K. That is done a step late: the
// two need not meet, and the exponentials of one run beside the products of the other. With warps_d = 2, for large head
// dims, both work on the same 64 keys: on half of the queries each in S^T and dP^T, on half of the columns in dK, dV
// and dQ, with P^T and dS^T from shared memory.
//
// dQ is summed over thread blocks in global memory, in float32; bwd_postprocess makes dq of it.
#pragma once

#include "common/config.h"
#include "common/problem.h"
#include "kernels/ptx/grid.cuh"
#include "kernels/ptx/tma.cuh"
#include "kernels/ptx/warpgroup.cuh"
#include "kernels/tile/gradient.cuh"
#include "kernels/tile/pipeline.cuh"
#include "kernels/tile/rows.cuh"
#include "kernels/tile/scores.cuh"
#include "kernels/tile/segments.cuh"
#include "kernels/tile/sequence.cuh"
#include "kernels/tile/warpgroup_gemm.cuh"

namespace flash::sm90 {

template <KernelConfig kC>
struct BwdStorage {
  using K = Tile<kC.block_kv, kC.head_dim, panel_cols_of_q(kC)>;
  using V = Tile<kC.block_kv, kC.head_dim_v, panel_cols_of_v(kC)>;
  using Q = Tile<kC.block_q, kC.head_dim, panel_cols_of_q(kC)>;
  using O = Tile<kC.block_q, kC.head_dim_v, panel_cols_of_v(kC)>;
  using S = Tile<kC.block_kv, kC.block_q>;
  using Bias = BiasTile<kC>;
  using Stages = Ring<kC.num_stages>;
  using Scores = Ring<score_buffers(kC)>;
  // Offsets in bytes: at kDs buffers of dS^T, at kP of P^T if warps_d = 2.
  static constexpr int32 kK = 0, kV = kK + K::kBytes, kQ = kV + V::kBytes, kDo = kQ + kC.num_stages * Q::kBytes;
  static constexpr int32 kDs = kDo + kC.num_stages * O::kBytes, kP = kDs + score_buffers(kC) * S::kBytes;
  static constexpr int32 kBias = kP + (kC.warps_d == 2 ? score_buffers(kC) * S::kBytes : 0);
  static constexpr int32 kBiasBytes = kC.bias_tiled ? Bias::kBytes : 0;
  static constexpr int32 kStatistics = kBias + kC.num_stages * kBiasBytes, kStatisticsBytes = 8 * kC.block_q;
  static constexpr int32 kRowBarriers = kStatistics + kC.num_stages * kStatisticsBytes;  // of all that has stages
  static constexpr int32 kKvBarriers = kRowBarriers + Stages::kBytes;
  static constexpr int32 kTurnBarriers = kKvBarriers + Ring<1>::kBytes;
  static constexpr int32 kScoreBarriers = kTurnBarriers + Ring<1>::kBytes;
  static_assert(kScoreBarriers + Scores::kBytes <= kRowBarriers + kBarrierBytes);
  static_assert(kRowBarriers + kBarrierBytes == shared_bytes(kC));
};

// Of all that compute, when rows of K and V are zeroed, and of each warpgroup.
enum BwdBarrier : int32 { kComputing = 1, kOwnWarpgroup = 2 };

template <KernelConfig kC>
struct Bwd {
  using Storage = BwdStorage<kC>;
  static constexpr int32 kBatchAxes = kC.num_batch_axes, kD = kC.warps_d;
  static constexpr int32 kComputingThreads = 256;
  static constexpr int32 kQueries = kC.block_q / kD;  // of a warpgroup's part of S^T
  static constexpr int32 kDqShares = column_shares_of_dq(kC), kDqCols = columns_of_dq(kC);
  static constexpr DType kDType = kC.dtype;
  // K and V as left operands from registers, where these suffice. Shared memory, of which two of the five products then
  // read half as much, bounds small head dims.
  static constexpr bool kKvInRegisters = kD == 1 && kC.block_q == 64 && max_of(kC.head_dim, kC.head_dim_v) <= 64;
  // Registers per thread of the copying warpgroup and of the others.
  static constexpr bool kIsTight = kD == 1 && (kC.head_dim > 64 || kC.block_q > 64);
  static constexpr int32 kCopyingRegisters = kIsTight ? 24 : 40, kComputingRegisters = kIsTight ? 240 : 232;
  static_assert(128 * kCopyingRegisters + kComputingThreads * kComputingRegisters <=
                registers_at_start(kC) * num_threads(kC));
  static_assert(kC.num_warps == 8 && kC.block_kv == (kD == 1 ? 128 : 64) && (kC.block_q == 64 || kC.block_q == 128));
  static_assert(kD == 1 || kC.block_q == 64);

  // One block of keys, from row `kv_row` of the sequence on.
  struct Block {
    const Sequence& seq;
    int32 kv_head, kv_row, keys;
    MaskRule rule;
    int32 first_head, end_head;
    BlockRange queries;

    __forceinline__ Block(const HopperBwdProblem& p, const Sequence& s, int32 head, int32 row)
        : seq(s), kv_head(head), kv_row(row), keys(min_of(kC.block_kv, s.kv.used - row)), rule(mask_rule_of(p, s)) {
      const int32 group = int32(p.order.group.value);
      first_head = head * group, end_head = min_of(first_head + group, int32(p.num_heads));
      queries = row_blocks(rule, row, max_of(keys, 1), kC.block_kv, kC.block_q);
    }

    // Whether no query sees the keys.
    __forceinline__ bool is_empty() const { return keys <= 0 || queries.first >= queries.end; }
  };

  // The steps of a block: for all heads, the blocks of queries that may see its keys.
  class Steps {
   public:
    int32 head, n;

    __forceinline__ Steps(const HopperBwdProblem& p, const Block& block)
        : Steps(block, ScoreInputs<kC>(p, block.seq, block.first_head)) {}
    __forceinline__ bool exists() const { return head < block_.end_head; }
    // Whether the positional mask shows all of it.
    __forceinline__ bool is_full() const { return block_.queries.full_begin <= n && n < block_.queries.full_end; }
    __forceinline__ void advance() {
      do {
        if (++n == block_.queries.end) n = block_.queries.first, ++head;
      } while (exists() && !filter_.may_see(n));
    }

   private:
    // Deterministic blocks take turns, so that none may stay away.
    using Filter = typename FilterOf<kC.segments && !kC.deterministic, kC.block_q>::Type;

    __forceinline__ Steps(const Block& block, const ScoreInputs<kC>& in)
        : head(block.first_head),
          n(block.queries.first - 1),
          block_(block),
          filter_(in.kv_segments, block.kv_row, block.kv_row + block.keys, in.q_segments, block.seq.q.used) {
      advance();
    }

    const Block& block_;
    Filter filter_;
  };

  static __forceinline__ void run(const HopperBwdProblem& p, char* shared) {
    const uint32 base = ptx::shared_address(shared);
    ptx::let_next_grid_start();
    if (threadIdx.x == 0) {
      Storage::Stages::init(base + Storage::kRowBarriers, kC.num_warps);
      Ring<1>::init(base + Storage::kKvBarriers, kC.num_warps);
      Ring<1>::init(base + Storage::kTurnBarriers, kC.num_warps);
      Storage::Scores::init(base + Storage::kScoreBarriers, kC.num_warps, kC.num_warps);
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
    ptx::wait_for_last_grid();
    if (threadIdx.x < 128) {
      ptx::setmaxnreg_dec<kCopyingRegisters>();
      if (threadIdx.x < 32)
        copy(p, base);
      else if (kC.deterministic && threadIdx.x < 64)
        keep_turns(p, base);
    } else {
      ptx::setmaxnreg_inc<kComputingRegisters>();
      compute(p, shared, base);
    }
  }

  // Calls on_block(block) for the thread block's unit of work, in practice once, or on_stray(batch, row).
  template <class OnBlock, class OnStray>
  static __forceinline__ void visit_unit(const HopperBwdProblem& p, int32 thread, OnBlock on_block, OnStray on_stray) {
    Units<kBatchAxes, Side::kKeys, kC.block_kv, kComputingThreads, kC.deterministic, Divisor>(p, p.order)
        .visit(
            blockIdx.x, thread, [&](const Sequence& s, int32 head, int32 row) { on_block(Block(p, s, head, row)); },
            on_stray);
  }

  // The copying warp. Its first lane does all that touches memory.
  static __forceinline__ void copy(const HopperBwdProblem& p, uint32 base) {
    typename Storage::Stages rows(base + Storage::kRowBarriers);
    Ring<1> kv_ring(base + Storage::kKvBarriers);
    const bool first_lane = threadIdx.x == 0;
    auto copy_block = [&](const Block& block) {
      if (block.is_empty()) return;
      const Sequence& seq = block.seq;
      auto load = [&]<class T>(int32 tile, uint32 barrier, const TensorMap& map, const View& view, int32 row,
                               int32 head, int32 col = 0) {
        load_panels<T>(base + tile, barrier, map, row, head, view.batch_stride[0] ? int32(seq.batch) : 0, col);
      };
      if (first_lane) {
        const int32 row = seq.kv.begin + block.kv_row;
        kv_ring.wait_empty();
        ptx::mbarrier_arrive_expect_tx(kv_ring.full(), Storage::K::kBytes + Storage::V::kBytes);
        load.template operator()<typename Storage::K>(Storage::kK, kv_ring.full(), p.k_map, p.k, row, block.kv_head);
        load.template operator()<typename Storage::V>(Storage::kV, kv_ring.full(), p.v_map, p.v, row, block.kv_head);
      }
      kv_ring.advance();
#pragma unroll 1
      for (Steps step(p, block); step.exists(); step.advance()) {
        if (first_lane) {
          const int32 row = seq.q.begin + step.n * kC.block_q;
          rows.wait_empty();
          ptx::mbarrier_arrive_expect_tx(
              rows.full(), Storage::Q::kBytes + Storage::O::kBytes + Storage::kBiasBytes + Storage::kStatisticsBytes);
          ptx::bulk_load(base + Storage::kStatistics + rows.stage() * Storage::kStatisticsBytes,
                         statistics_of<kBatchAxes>(p, seq, step.head, step.n * kC.block_q), Storage::kStatisticsBytes,
                         rows.full());
          load.template operator()<typename Storage::Q>(Storage::kQ + rows.stage() * Storage::Q::kBytes, rows.full(),
                                                        p.q_map, p.q, row, step.head);
          load.template operator()<typename Storage::O>(Storage::kDo + rows.stage() * Storage::O::kBytes, rows.full(),
                                                        p.d_o_map, p.d_o, row, step.head);
          if constexpr (kC.bias_tiled)
            load.template operator()<typename Storage::Bias>(Storage::kBias + rows.stage() * Storage::kBiasBytes,
                                                             rows.full(), p.bias_map, p.bias, row,
                                                             p.bias.head_stride ? step.head : 0, block.kv_row);
        }
        rows.advance();
      }
    };
    visit_unit(p, threadIdx.x, copy_block, [](int64, int64) {});
  }

  // The warp that waits for turns at dq and passes them on, whose ways through global memory nobody else then has to
  // wait for. It fills a ring of one buffer with turns, which are empty when all warps have added.
  static __forceinline__ void keep_turns(const HopperBwdProblem& p, uint32 base) {
    Ring<1> turns(base + Storage::kTurnBarriers);
    const bool first_lane = threadIdx.x % 32 == 0;
    auto keep = [&](const Block& block) {
      if (block.is_empty()) return;
      Turn<kC> turn;
      auto pass_on = [&] {
        turns.wait_empty();
        turn.pass_on();
      };
#pragma unroll 1
      for (Steps step(p, block); step.exists(); step.advance()) {
        if (first_lane) {
          pass_on();
          turn.wait(p, block.seq, block.rule, step.head, block.kv_row / kC.block_kv, step.n * kC.block_q);
          ptx::mbarrier_arrive(turns.full());
        }
        turns.advance();
      }
      if (first_lane) pass_on();
    };
    visit_unit(p, threadIdx.x, keep, [](int64, int64) {});
  }

  // A computing warp's places.
  struct Rings {
    typename Storage::Stages rows;
    Ring<1> kv_ring, turns;
    typename Storage::Scores scores;      // dS^T of this step
    typename Storage::Scores due_scores;  // of the step before, whose dQ is due; at first a buffer that nobody wrote

    __forceinline__ explicit Rings(uint32 base)
        : rows(base + Storage::kRowBarriers),
          kv_ring(base + Storage::kKvBarriers),
          turns(base + Storage::kTurnBarriers),
          scores(base + Storage::kScoreBarriers),
          due_scores(base + Storage::kScoreBarriers, score_buffers(kC) - 1, 1) {}
  };

  // A warp that computes.
  static __forceinline__ void compute(const HopperBwdProblem& p, char* shared, uint32 base) {
    Rings rings(base);
    const int32 warpgroup = uniform(int32(threadIdx.x) / 128 - 1);
    visit_unit(
        p, int32(threadIdx.x) - 128,
        [&](const Block& block) { compute_block(p, shared, base, block, warpgroup, rings); },
        [&](int64 batch, int64 row) { define_stray<kBatchAxes>(p, batch, row); });
  }

  static __forceinline__ void compute_block(const HopperBwdProblem& p, char* shared, uint32 base, const Block& block,
                                            int32 warpgroup, Rings& rings) {
    auto& [rows, kv_ring, turns, scores, due_scores] = rings;
    const Sequence& seq = block.seq;
    const int32 thread = int32(threadIdx.x) - 128, lane = threadIdx.x % 32;
    const int32 warp_in_group = thread % 128 / 32;
    const int32 kv_row = block.kv_row, keys = block.keys;
    // Places of the warpgroup in S^T, of the warp among its keys, and of the warpgroup in dK, dV and dQ.
    const int32 key_row = kD == 1 ? 64 * warpgroup : 0, query_col = kD == 2 ? kQueries * warpgroup : 0;
    const int32 warp_key = key_row + 16 * warp_in_group;
    const int32 dk_col = kD == 2 ? kC.head_dim / 2 * warpgroup : 0,
                dv_col = kD == 2 ? kC.head_dim_v / 2 * warpgroup : 0;
    const int32 dq_row = kDqShares == 1 ? 64 * warpgroup : 0;
    const int32 dq_col = kDqShares == 2 ? (kC.head_dim - kDqCols) * warpgroup : 0;
    // Columns of the second warpgroup that are the first one's too.
    constexpr int32 kSharedCols = kDqShares * kDqCols - kC.head_dim;

    auto target = [&](const View& view) {
      return address_of<uint16, kBatchAxes>(p, view, seq.batch, block.kv_head, seq.kv.begin + kv_row);
    };
    const int32 slot_rows = min_of(kC.block_kv, seq.kv.size - kv_row);  // that must be written
    if (keys < slot_rows) {
      store_zeros<kComputingThreads>(thread, target(p.dk), p.dk.row_stride, max_of(keys, 0), slot_rows,
                                     int32(p.head_dim));
      store_zeros<kComputingThreads>(thread, target(p.dv), p.dv.row_stride, max_of(keys, 0), slot_rows,
                                     int32(p.head_dim_v));
    }
    if (keys <= 0) return;

    Accumulator<16, kC.head_dim / kD> dk_sum;
    Accumulator<16, kC.head_dim_v / kD> dv_sum;
    dk_sum.clear();
    dv_sum.clear();
    if (!block.is_empty()) {
      auto release = [&](auto& ring) {
        if (lane == 0) ring.release();
        ring.advance();
      };
      kv_ring.wait_full();
      hide_keys_behind(p, seq, base, kv_row, keys, thread);

      using K = typename Storage::K;
      using V = typename Storage::V;
      using Q = typename Storage::Q;
      using O = typename Storage::O;
      using S = typename Storage::S;
      uint32 k_rows[1][kC.head_dim / 16][4], v_rows[1][kC.head_dim_v / 16][4];
      if constexpr (kKvInRegisters) {
        const RowsOfA<K> k{{base, Storage::kK, warp_key}};
        const RowsOfA<V> v{{base, Storage::kV, warp_key}};
#pragma unroll
        for (int32 i = 0; i < kC.head_dim / 16; ++i) k.load(k_rows[0][i], 0, 16 * i);
#pragma unroll
        for (int32 i = 0; i < kC.head_dim_v / 16; ++i) v.load(v_rows[0][i], 0, 16 * i);
      }
      // dQ = dS K, from a buffer once it has everyone's dS^T, and its addition to what other thread blocks have found.
      using Dq = Accumulator<16, kDqCols>;
      auto issue_dq = [&](Dq& dq, const typename Storage::Scores& buffer) {
        buffer.wait_full();
        const uint32 tile = base + Storage::kDs + buffer.stage() * S::kBytes;
        issue_gemm<kDType, kC.block_kv, false>(dq, ColsOperand<S>(tile, dq_row),
                                               ColsOperand<K>(base + Storage::kK, dq_col));
      };
      float* accum = uniform(accum_block_of<kBatchAxes>(p, seq, 0, 0));
      auto add_dq = [&](const Dq& dq, int32 head, int32 q_row) {
        if constexpr (kC.deterministic) turns.wait_full();
        const int32 row = q_row + dq_row;
        add_to_dq<kC, 1>(p, seq, accum_block_behind(p, accum, head, row), dq, row, 16 * warp_in_group, dq_col,
                         kSharedCols * warpgroup);
        if constexpr (kC.deterministic) {
          __syncwarp();  // all lanes have added
          release(turns);
        }
      };
      // With warps_d = 1, the step whose dQ is due: its head, or -1 if there is none, and its queries.
      int32 due_head = -1, due_row = 0;
#pragma unroll 1
      for (Steps step(p, block); step.exists(); step.advance()) {
        const int32 head = step.head, q_row = step.n * kC.block_q;
        const ScoreInputs<kC> in(p, seq, head);
        const bool is_full = step.is_full(), masked = kDataMasks<kC> || !is_full;
        const int32 key = kv_row + warp_key, query = q_row + query_col;
        const int32 stage = rows.stage();
        const uint32 q_tile = base + Storage::kQ + stage * Q::kBytes;
        const uint32 do_tile = base + Storage::kDo + stage * O::kBytes;
        const int32 statistics =
            Storage::kStatistics + stage * Storage::kStatisticsBytes + statistics_offset(query_col) + lane % 4 * 8;
        auto pair_of = [&](int32 offset, int32 i) {
          return *reinterpret_cast<const float2*>(shared + statistics + statistics_offset(8 * i) + offset);
        };
        Accumulator<16, kQueries> s, ds;
        uint32 probs[1][kQueries / 16][4], dscores[1][kQueries / 16][4];
        Dq dq;
        rows.wait_full();
        if (masked) hide_rows_without_keys(shared, q_tile, do_tile, stage, warpgroup, thread % 128);
        if constexpr (kKvInRegisters) {
          issue_gemm<kDType, false>(s, k_rows, RowsOperand<Q>(q_tile, query_col));
          issue_gemm<kDType, false>(ds, v_rows, RowsOperand<O>(do_tile, query_col));
        } else {
          issue_gemm<kDType, kC.head_dim, false>(s, RowsOperand<K>(base + Storage::kK, key_row),
                                                 RowsOperand<Q>(q_tile, query_col));
          issue_gemm<kDType, kC.head_dim_v, false>(ds, RowsOperand<V>(base + Storage::kV, key_row),
                                                   RowsOperand<O>(do_tile, query_col));
        }
        TileGradient<kC, 16, kQueries> gradient;
        wait_gemm<1>(s);
        auto bias_tile = [&] {
          if constexpr (kC.bias_tiled)
            return ColsOfA<typename Storage::Bias>{
                {base, Storage::kBias + stage * Storage::kBiasBytes, query_col, warp_key}};
          else
            return NoBiasTile{};
        };
        gradient.weights(s, p, in, !is_full, key, query, bias_tile(), [&](int32 i) { return pair_of(0, i); });
        const int32 ds_tile = Storage::kDs + scores.stage() * S::kBytes;
        [[maybe_unused]] const int32 p_tile = Storage::kP + scores.stage() * S::kBytes;
        auto finish = [&]<int32 kFrom, int32 kTo>() {  // the columns [kFrom, kTo) of P^T, then of dS^T
          Accumulator<16, kQueries> kept = s;
          gradient.template drop<kFrom, kTo>(kept);
          pack<kDType, kFrom, kTo>(probs, kept);
          if constexpr (kD == 1) {
            issue_gemm<kDType, true, kFrom, kTo>(dv_sum, probs, ColsOperand<O>(do_tile));
            if constexpr (kFrom == 0) wait_gemm<1>(ds);
          } else {
            TileWriter<S>(base, p_tile, warp_key, query_col).store(probs);
            wait_gemm<0>(ds);
          }
          gradient.template scores<kFrom, kTo>(ds, s, p, [&](int32 i) { return pair_of(kDeltaBehindLse, i); });
          pack<kDType, kFrom, kTo>(dscores, ds);
          TileWriter<S>(base, ds_tile, warp_key, query_col).template store<kFrom, kTo>(dscores);
        };
        if constexpr (kD == 1) {
          // One half behind the other takes fewer registers.
          finish.template operator()<0, kQueries / 2>();
          finish.template operator()<kQueries / 2, kQueries>();
        } else {
          finish.template operator()<0, kQueries>();
        }
        ptx::fence_proxy_async();
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(scores.full());
        if constexpr (kD == 1) {
          // In the first step a product of anything, as around a branch the compiler would wait for every one.
          issue_dq(dq, due_scores);
          due_scores.advance();
          issue_gemm<kDType, true>(dk_sum, dscores, ColsOperand<Q>(q_tile));
          wait_gemm<1>(dq);
          if (due_head >= 0) add_dq(dq, due_head, due_row);
          due_head = head, due_row = q_row;
        } else {
          issue_dq(dq, scores);
          issue_gemm<kDType, kC.block_q, true>(dv_sum, RowsOperand<S>(base + p_tile), ColsOperand<O>(do_tile, dv_col));
          issue_gemm<kDType, kC.block_q, true>(dk_sum, RowsOperand<S>(base + ds_tile), ColsOperand<Q>(q_tile, dk_col));
          wait_gemm<2>(dq);
          add_dq(dq, head, q_row);
        }
        scores.advance();
        wait_gemm<0>(dk_sum);
        ptx::settled(dv_sum.x[0]);
        release(rows);
      }
      if constexpr (kD == 1) {
        if (due_head >= 0) {
          Dq dq;
          issue_dq(dq, due_scores);
          wait_gemm<0>(dq);
          add_dq(dq, due_head, due_row);
        }
      }
      release(kv_ring);
    }
    const float dropout_scale = 256.0f / float(p.options.keep_threshold);
    store_rows<kDType>(dk_sum, target(p.dk) + dk_col, p.dk.row_stride, warp_key, keys, int32(p.head_dim) - dk_col,
                       [&](int32) { return p.options.scale; });
    store_rows<kDType>(dv_sum, target(p.dv) + dv_col, p.dv.row_stride, warp_key, keys, int32(p.head_dim_v) - dv_col,
                       [&](int32) { return dropout_scale; });
  }

  // Zeros the rows of K and V that lie behind the keys in use: where dS is 0, NaN would make NaN of it. The copy engine
  // has done so behind the end of the tensor.
  static __forceinline__ void hide_keys_behind(const HopperBwdProblem& p, const Sequence& seq, uint32 base,
                                               int32 kv_row, int32 keys, int32 thread) {
    if (keys == kC.block_kv || !(p.kv_lens.data || p.cu_seqlens_kv.data)) return;
    zero_rows<typename Storage::K>(base + Storage::kK, keys, kC.block_kv, thread, kComputingThreads);
    zero_rows<typename Storage::V>(base + Storage::kV, keys, kC.block_kv, thread, kComputingThreads);
    ptx::fence_proxy_async();
    __syncwarp();
    ptx::barrier_sync(kComputing, kComputingThreads);
  }

  // Zeros the rows of q and dO that see no key, or lie behind the sequence: they have no gradient, and what stands
  // there would be NaN also when multiplied by their weights of 0. Each warpgroup does it for itself.
  static __forceinline__ void hide_rows_without_keys(const char* shared, uint32 q_tile, uint32 do_tile, int32 stage,
                                                     int32 warpgroup, int32 thread) {
    constexpr int32 kThreadsPerRow = 128 / kC.block_q;
    const int32 row = thread / kThreadsPerRow;
    const char* lse = shared + Storage::kStatistics + stage * Storage::kStatisticsBytes + statistics_offset(row);
    if (*reinterpret_cast<const float*>(lse) == kNoKey) {
      zero_rows<typename Storage::Q>(q_tile, row, row + 1, thread % kThreadsPerRow, kThreadsPerRow);
      zero_rows<typename Storage::O>(do_tile, row, row + 1, thread % kThreadsPerRow, kThreadsPerRow);
      ptx::fence_proxy_async();
    }
    __syncwarp();
    ptx::barrier_sync(kOwnWarpgroup + warpgroup, 128);
  }
};

template <KernelConfig kC>
__forceinline__ void bwd(const HopperBwdProblem& p) {
  extern __shared__ __align__(1024) char shared[];
  Bwd<kC>::run(p, shared);
}

}  // namespace flash::sm90
