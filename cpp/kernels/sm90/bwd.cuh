// Attention backward for Hopper: FlashAttention-3 (Shah et al., 2024, arXiv 2407.08608), with the scores transposed.
// docs/hopper_backward.md says why it looks as it does.
//
// A thread block has block_kv keys of one key head and goes through all blocks of queries that see them, of all
// query heads of the group. One warp copies Q, dO, lse and delta into rings of buffers, and if deterministic another
// one keeps the turns at dq. Two warpgroups compute. Up to head dim 128 each owns 64 keys. For larger ones, of which
// dK and dV of 64 keys take twice the registers, both have the same keys, and roles: one computes S^T, the weights P^T
// and dV, the other one dP^T and, with the weights that the first one hands over, dS^T and dK. P^T and dS^T are left
// operands straight from registers, and only dS^T goes through shared memory too, for dQ = dS K. That is done a step
// late: the two need not meet, and what one has to do between its products runs beside those of the other.
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
  using V = Tile<kC.block_kv, kC.head_dim_v>;
  using Q = Tile<kC.block_q, kC.head_dim, panel_cols_of_q(kC)>;
  using O = Tile<kC.block_q, kC.head_dim_v>;
  using S = Tile<kC.block_kv, kC.block_q>;
  using Bias = BiasTile<kC>;
  using Stages = Ring<kC.num_stages>;
  using Scores = Ring<score_buffers(kC)>;
  // Offsets in bytes: at kDs buffers of dS^T, at kP those of weights that one role hands to the other.
  static constexpr int32 kK = 0, kV = kK + K::kBytes, kQ = kV + V::kBytes, kDo = kQ + kC.num_stages * Q::kBytes;
  static constexpr int32 kDs = kDo + kC.num_stages * O::kBytes, kP = kDs + score_buffers(kC) * S::kBytes;
  static constexpr int32 kBias = kP + (has_roles(kC) ? score_buffers(kC) * S::kBytes : 0);
  static constexpr int32 kBiasBytes = kC.bias_tiled ? Bias::kBytes : 0;
  static constexpr int32 kStatistics = kBias + kC.num_stages * kBiasBytes, kStatisticsBytes = 8 * kC.block_q;
  // Of all that has stages; with roles dO, which is free earlier, has its own.
  static constexpr int32 kRowBarriers = kStatistics + kC.num_stages * kStatisticsBytes;
  static constexpr int32 kDoBarriers = kRowBarriers + Stages::kBytes;
  static constexpr int32 kKvBarriers = kDoBarriers + Stages::kBytes;
  static constexpr int32 kTurnBarriers = kKvBarriers + Ring<1>::kBytes;
  static constexpr int32 kScoreBarriers = kTurnBarriers + Ring<1>::kBytes;
  static constexpr int32 kWeightBarriers = kScoreBarriers + Scores::kBytes;
  static_assert(kWeightBarriers + Scores::kBytes <= kRowBarriers + kBarrierBytes);
  static_assert(kRowBarriers + kBarrierBytes == shared_bytes(kC));
};

// What a warpgroup does to the keys that both have: S^T, P^T and dV, or dP^T, dS^T and dK.
enum class Role { kWeights, kScores };

// Of all that compute, when rows of K and V are zeroed, and of each warpgroup.
enum BwdBarrier : int32 { kComputing = 1, kOwnWarpgroup = 2 };

template <KernelConfig kC>
struct Bwd {
  using Storage = BwdStorage<kC>;
  static constexpr int32 kBatchAxes = kC.num_batch_axes;
  static constexpr int32 kComputingThreads = 256;
  static constexpr bool kRoles = has_roles(kC);
  static constexpr int32 kDqShares = column_shares_of_dq(kC), kDqCols = columns_of_dq(kC);
  static constexpr DType kDType = kC.dtype;
  // K and V as left operands from registers, where these suffice. Shared memory, of which two of the five products then
  // read half as much, bounds small head dims.
  static constexpr bool kKvInRegisters = kC.block_q == 64 && max_of(kC.head_dim, kC.head_dim_v) <= 64;
  // Registers per thread of the copying warpgroup and of the others.
  static constexpr bool kIsTight = max_of(kC.head_dim, kC.head_dim_v) > 64 || kC.block_q > 64;
  static constexpr int32 kCopyingRegisters = kIsTight ? 24 : 40, kComputingRegisters = kIsTight ? 240 : 232;
  static_assert(128 * kCopyingRegisters + kComputingThreads * kComputingRegisters <=
                registers_at_start(kC) * num_threads(kC));
  static_assert(kC.num_warps == 8 && kC.block_kv == (kRoles ? 64 : 128) && (kC.block_q == 64 || kC.block_q == 128));
  static_assert(!kRoles || kC.block_q == 64);

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
      constexpr int32 kWarpsOfRole = kC.num_warps / 2;
      Storage::Scores::init(base + Storage::kScoreBarriers, kC.num_warps, kRoles ? kWarpsOfRole : kC.num_warps);
      if constexpr (kRoles) {
        Storage::Stages::init(base + Storage::kDoBarriers, kC.num_warps);
        Storage::Scores::init(base + Storage::kWeightBarriers, kWarpsOfRole, kWarpsOfRole);
      }
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
    typename Storage::Stages rows(base + Storage::kRowBarriers), do_rows(base + Storage::kDoBarriers);
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
          auto load_do = [&](uint32 barrier) {
            load.template operator()<typename Storage::O>(Storage::kDo + rows.stage() * Storage::O::kBytes, barrier,
                                                          p.d_o_map, p.d_o, row, step.head);
          };
          if constexpr (kRoles) {
            do_rows.wait_empty();
            ptx::mbarrier_arrive_expect_tx(do_rows.full(), Storage::O::kBytes);
            load_do(do_rows.full());
          }
          rows.wait_empty();
          ptx::mbarrier_arrive_expect_tx(rows.full(), Storage::Q::kBytes + (kRoles ? 0 : Storage::O::kBytes) +
                                                          Storage::kBiasBytes + Storage::kStatisticsBytes);
          ptx::bulk_load(base + Storage::kStatistics + rows.stage() * Storage::kStatisticsBytes,
                         statistics_of<kBatchAxes>(p, seq, step.head, step.n * kC.block_q), Storage::kStatisticsBytes,
                         rows.full());
          load.template operator()<typename Storage::Q>(Storage::kQ + rows.stage() * Storage::Q::kBytes, rows.full(),
                                                        p.q_map, p.q, row, step.head);
          if constexpr (!kRoles) load_do(rows.full());
          if constexpr (kC.bias_tiled)
            load.template operator()<typename Storage::Bias>(Storage::kBias + rows.stage() * Storage::kBiasBytes,
                                                             rows.full(), p.bias_map, p.bias, row,
                                                             p.bias.head_stride ? step.head : 0, block.kv_row);
        }
        rows.advance();
        do_rows.advance();
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
    typename Storage::Stages rows, do_rows;
    Ring<1> kv_ring, turns;
    typename Storage::Scores scores;      // dS^T of this step
    typename Storage::Scores due_scores;  // of the step before, whose dQ is due; at first a buffer that nobody wrote
    typename Storage::Scores weights;

    __forceinline__ explicit Rings(uint32 base)
        : rows(base + Storage::kRowBarriers),
          do_rows(base + Storage::kDoBarriers),
          kv_ring(base + Storage::kKvBarriers),
          turns(base + Storage::kTurnBarriers),
          scores(base + Storage::kScoreBarriers),
          due_scores(base + Storage::kScoreBarriers, score_buffers(kC) - 1, 1),
          weights(base + Storage::kWeightBarriers) {}
  };

  // What a warp says of a ring's next buffer: that it is done with it, where lanes that have read it have met, or that
  // it has written its part.
  static __forceinline__ void release(auto& ring) {
    if (threadIdx.x % 32 == 0) ring.release();
    ring.advance();
  }
  static __forceinline__ void fill(auto& ring) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(ring.full());
    ring.advance();
  }

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
    const int32 thread = int32(threadIdx.x) - 128, keys = max_of(block.keys, 0);
    const int32 slot_rows = min_of(kC.block_kv, block.seq.kv.size - block.kv_row);  // that must be written
    if (keys < slot_rows) {
      store_zeros<kComputingThreads>(thread, target(p, p.dk, block), p.dk.row_stride, keys, slot_rows,
                                     int32(p.head_dim));
      store_zeros<kComputingThreads>(thread, target(p, p.dv, block), p.dv.row_stride, keys, slot_rows,
                                     int32(p.head_dim_v));
    }
    if (keys == 0) return;
    if constexpr (!kRoles)
      compute_keys(p, shared, base, block, warpgroup, rings);
    else if (warpgroup == 0)
      compute_role<Role::kWeights>(p, shared, base, block, rings);
    else
      compute_role<Role::kScores>(p, shared, base, block, rings);
  }

  // The block's first row of dk or dv.
  static __forceinline__ uint16* target(const HopperBwdProblem& p, const View& view, const Block& block) {
    return address_of<uint16, kBatchAxes>(p, view, block.seq.batch, block.kv_head, block.seq.kv.begin + block.kv_row);
  }

  static __forceinline__ void store_dk(const HopperBwdProblem& p, const Block& block, const auto& dk, int32 warp_key) {
    store_rows<kDType>(dk, target(p, p.dk, block), p.dk.row_stride, warp_key, block.keys, int32(p.head_dim),
                       [&](int32) { return p.options.scale; });
  }

  static __forceinline__ void store_dv(const HopperBwdProblem& p, const Block& block, const auto& dv, int32 warp_key) {
    const float dropout_scale = 256.0f / float(p.options.keep_threshold);
    store_rows<kDType>(dv, target(p, p.dv, block), p.dv.row_stride, warp_key, block.keys, int32(p.head_dim_v),
                       [&](int32) { return dropout_scale; });
  }

  // A warpgroup's part of dQ = dS K, done a step late, and its addition to what other thread blocks have found.
  class LateDq {
   public:
    using Sum = Accumulator<16, kDqCols>;

    __forceinline__ LateDq(const HopperBwdProblem& p, uint32 base, const Block& block, int32 warpgroup, Rings& rings)
        : p_(p),
          base_(base),
          block_(block),
          rings_(rings),
          row_(kDqShares == 1 ? 64 * warpgroup : 0),
          col_(kDqShares == 2 ? (kC.head_dim - kDqCols) * warpgroup : 0),
          skipped_cols_((kDqShares * kDqCols - kC.head_dim) * warpgroup),
          accum_(uniform(accum_block_of<kBatchAxes>(p, block.seq, 0, 0))) {}

    // Issues that of the step before, once everyone's dS^T is there. In the first step it is a product of anything, as
    // around a branch the compiler would wait for every one.
    __forceinline__ void issue(Sum& dq) {
      rings_.due_scores.wait_full();
      const uint32 tile = base_ + Storage::kDs + rings_.due_scores.stage() * Storage::S::kBytes;
      issue_gemm<kDType, kC.block_kv, false>(dq, ColsOperand<typename Storage::S>(tile, row_),
                                             ColsOperand<typename Storage::K>(base_ + Storage::kK, col_));
    }
    // When it is done. Then that of the step at hand is due.
    __forceinline__ void add(const Sum& dq, int32 head, int32 q_row) {
      if (head_ >= 0) add_due(dq);
      rings_.due_scores.advance();
      head_ = head, q_row_ = q_row;
    }
    // Behind the last step.
    __forceinline__ void finish() {
      if (head_ < 0) return;
      Sum dq;
      issue(dq);
      wait_gemm<0>(dq);
      add_due(dq);
    }

   private:
    __forceinline__ void add_due(const Sum& dq) {
      if (kRoles && threadIdx.x % 32 == 0) rings_.due_scores.release();
      if constexpr (kC.deterministic) rings_.turns.wait_full();
      const int32 row = q_row_ + row_;
      add_to_dq<kC, 1>(p_, block_.seq, accum_block_behind(p_, accum_, head_, row), dq, row,
                       16 * (int32(threadIdx.x) % 128 / 32), col_, skipped_cols_);
      if constexpr (kC.deterministic) {
        __syncwarp();  // all lanes have added
        release(rings_.turns);
      }
    }

    const HopperBwdProblem& p_;
    uint32 base_;
    const Block& block_;
    Rings& rings_;
    int32 row_, col_;
    int32 skipped_cols_;  // of the second warpgroup, that are the first one's too
    float* accum_;
    int32 head_ = -1, q_row_ = 0;  // of the step whose dQ is due, if one is
  };

  // The lse, or with kDeltaBehindLse the delta, of a thread's pair of queries in n-tile `i` of a stage.
  static __forceinline__ float2 pair_of(const char* shared, int32 stage, int32 offset, int32 i) {
    const int32 first = Storage::kStatistics + stage * Storage::kStatisticsBytes + threadIdx.x % 4 * 8;
    return *reinterpret_cast<const float2*>(shared + first + statistics_offset(8 * i) + offset);
  }

  static __forceinline__ auto bias_tile(uint32 base, int32 stage, int32 warp_key) {
    if constexpr (kC.bias_tiled)
      return ColsOfA<typename Storage::Bias>{{base, Storage::kBias + stage * Storage::kBiasBytes, 0, warp_key}};
    else
      return NoBiasTile{};
  }

  // The queries of a step, and where they lie.
  struct Queries {
    int32 head, row;
    bool all_seen;  // by the positional mask
    int32 stage;
    uint32 q_tile, do_tile;

    __forceinline__ Queries(const Steps& step, uint32 base, int32 stage)
        : head(step.head),
          row(step.n * kC.block_q),
          all_seen(step.is_full()),
          stage(stage),
          q_tile(base + Storage::kQ + stage * Storage::Q::kBytes),
          do_tile(base + Storage::kDo + stage * Storage::O::kBytes) {}
  };

  // A warpgroup with keys of its own.
  static __forceinline__ void compute_keys(const HopperBwdProblem& p, char* shared, uint32 base, const Block& block,
                                           int32 warpgroup, Rings& rings) {
    using K = typename Storage::K;
    using V = typename Storage::V;
    using Q = typename Storage::Q;
    using O = typename Storage::O;
    using S = typename Storage::S;
    auto& rows = rings.rows;
    auto& scores = rings.scores;
    const int32 thread = int32(threadIdx.x) - 128;
    const int32 key_row = 64 * warpgroup, warp_key = key_row + thread % 128 / 32 * 16;
    Accumulator<16, kC.head_dim> dk_sum;
    Accumulator<16, kC.head_dim_v> dv_sum;
    dk_sum.clear();
    dv_sum.clear();
    if (!block.is_empty()) {
      rings.kv_ring.wait_full();
      hide_keys_behind(p, base, block, thread);
      uint32 k_rows[1][kC.head_dim / 16][4], v_rows[1][kC.head_dim_v / 16][4];
      if constexpr (kKvInRegisters) {
        const RowsOfA<K> k{{base, Storage::kK, warp_key}};
        const RowsOfA<V> v{{base, Storage::kV, warp_key}};
#pragma unroll
        for (int32 i = 0; i < kC.head_dim / 16; ++i) k.load(k_rows[0][i], 0, 16 * i);
#pragma unroll
        for (int32 i = 0; i < kC.head_dim_v / 16; ++i) v.load(v_rows[0][i], 0, 16 * i);
      }
      LateDq late_dq(p, base, block, warpgroup, rings);
#pragma unroll 1
      for (Steps step(p, block); step.exists(); step.advance()) {
        const Queries queries(step, base, rows.stage());
        const ScoreInputs<kC> in(p, block.seq, queries.head);
        Accumulator<16, kC.block_q> s, ds;
        uint32 probs[1][kC.block_q / 16][4], dscores[1][kC.block_q / 16][4];
        typename LateDq::Sum dq;
        rows.wait_full();
        hide_rows_without_keys(shared, queries, warpgroup, thread % 128);
        if constexpr (kKvInRegisters) {
          issue_gemm<kDType, false>(s, k_rows, RowsOperand<Q>(queries.q_tile));
          issue_gemm<kDType, false>(ds, v_rows, RowsOperand<O>(queries.do_tile));
        } else {
          issue_gemm<kDType, kC.head_dim, false>(s, RowsOperand<K>(base + Storage::kK, key_row),
                                                 RowsOperand<Q>(queries.q_tile));
          issue_gemm<kDType, kC.head_dim_v, false>(ds, RowsOperand<V>(base + Storage::kV, key_row),
                                                   RowsOperand<O>(queries.do_tile));
        }
        TileGradient<kC, 16, kC.block_q> gradient;
        wait_gemm<1>(s);
        gradient.weights(s, p, in, !queries.all_seen, block.kv_row + warp_key, queries.row,
                         bias_tile(base, queries.stage, warp_key),
                         [&](int32 i) { return pair_of(shared, queries.stage, 0, i); });
        const TileWriter<S> ds_tile(base, Storage::kDs + scores.stage() * S::kBytes, warp_key);
        auto finish = [&]<int32 kFrom, int32 kTo>() {  // the columns [kFrom, kTo) of P^T, then of dS^T
          Accumulator<16, kC.block_q> kept = s;
          gradient.template drop<kFrom, kTo>(kept);
          pack<kDType, kFrom, kTo>(probs, kept);
          issue_gemm<kDType, true, kFrom, kTo>(dv_sum, probs, ColsOperand<O>(queries.do_tile));
          if constexpr (kFrom == 0) wait_gemm<1>(ds);
          gradient.template scores<kFrom, kTo>(
              ds, s, p, [&](int32 i) { return pair_of(shared, queries.stage, kDeltaBehindLse, i); });
          pack<kDType, kFrom, kTo>(dscores, ds);
          ds_tile.template store<kFrom, kTo>(dscores);
        };
        // One half behind the other takes fewer registers.
        finish.template operator()<0, kC.block_q / 2>();
        finish.template operator()<kC.block_q / 2, kC.block_q>();
        ptx::fence_proxy_async();
        fill(scores);
        late_dq.issue(dq);
        issue_gemm<kDType, true>(dk_sum, dscores, ColsOperand<Q>(queries.q_tile));
        wait_gemm<1>(dq);
        late_dq.add(dq, queries.head, queries.row);
        wait_gemm<0>(dk_sum);
        ptx::settled(dv_sum.x[0]);
        release(rows);
      }
      late_dq.finish();
      release(rings.kv_ring);
    }
    store_dk(p, block, dk_sum, warp_key);
    store_dv(p, block, dv_sum, warp_key);
  }

  // A warpgroup with a role, whose keys are the other one's too.
  template <Role kRole>
  static __forceinline__ void compute_role(const HopperBwdProblem& p, char* shared, uint32 base, const Block& block,
                                           Rings& rings) {
    constexpr bool kOfWeights = kRole == Role::kWeights;
    constexpr int32 kWarpgroup = kOfWeights ? 0 : 1;
    using Q = typename Storage::Q;
    using O = typename Storage::O;
    using S = typename Storage::S;
    auto &rows = rings.rows, &do_rows = rings.do_rows;
    auto &scores = rings.scores, &weights = rings.weights;
    const int32 thread = int32(threadIdx.x) - 128, warp_key = thread % 128 / 32 * 16;
    Accumulator<16, kOfWeights ? kC.head_dim_v : kC.head_dim> sum;  // dV or dK
    sum.clear();
    if (!block.is_empty()) {
      rings.kv_ring.wait_full();
      hide_keys_behind(p, base, block, thread);
      LateDq late_dq(p, base, block, kWarpgroup, rings);
#pragma unroll 1
      for (Steps step(p, block); step.exists(); step.advance()) {
        const Queries queries(step, base, rows.stage());
        const ScoreInputs<kC> in(p, block.seq, queries.head);
        // The thread's fragments of weights, which are the same thread's of the other warpgroup.
        const int32 weights_place = Storage::kP + weights.stage() * S::kBytes + thread % 128 * 16;
        constexpr int32 kFragmentsBytes = 128 * 16;
        Accumulator<16, kC.block_q> s;  // S^T or dP^T
        uint32 left[1][kC.block_q / 16][4];
        typename LateDq::Sum dq;
        TileGradient<kC, 16, kC.block_q> gradient;
        rows.wait_full();
        do_rows.wait_full();
        hide_rows_without_keys(shared, queries, kWarpgroup, thread % 128);
        if constexpr (kOfWeights) {
          issue_gemm<kDType, kC.head_dim, false>(s, RowsOperand<typename Storage::K>(base + Storage::kK),
                                                 RowsOperand<Q>(queries.q_tile));
          wait_gemm<0>(s);
          gradient.weights(s, p, in, !queries.all_seen, block.kv_row + warp_key, queries.row,
                           bias_tile(base, queries.stage, warp_key),
                           [&](int32 i) { return pair_of(shared, queries.stage, 0, i); });
          __syncwarp();  // all lanes have read
          release(rows);
          {
            Accumulator<16, kC.block_q> factors = s;
            gradient.slope(factors);
            pack<kDType>(left, factors);
          }
          weights.wait_empty();
#pragma unroll
          for (int32 i = 0; i < kC.block_q / 16; ++i)
            ptx::st_shared_x4(base + weights_place + i * kFragmentsBytes, left[0][i][0], left[0][i][1], left[0][i][2],
                              left[0][i][3]);
          fill(weights);
          gradient.drop(s);
          pack<kDType>(left, s);
        } else {
          issue_gemm<kDType, kC.head_dim_v, false>(s, RowsOperand<typename Storage::V>(base + Storage::kV),
                                                   RowsOperand<O>(queries.do_tile));
          gradient.draw(p, in, block.kv_row + warp_key, queries.row);
          wait_gemm<0>(s);
          release(do_rows);
          weights.wait_full();
#pragma unroll
          for (int32 i = 0; i < kC.block_q / 16; ++i) {
            const uint4 x = *reinterpret_cast<const uint4*>(shared + weights_place + i * kFragmentsBytes);
            left[0][i][0] = x.x, left[0][i][1] = x.y, left[0][i][2] = x.z, left[0][i][3] = x.w;
          }
          __syncwarp();
          release(weights);
          Accumulator<16, kC.block_q> factors;
          unpack<kDType>(factors, left);
          gradient.capped_scores(s, factors, p,
                                 [&](int32 i) { return pair_of(shared, queries.stage, kDeltaBehindLse, i); });
          pack<kDType>(left, s);
          scores.wait_empty();
          TileWriter<S>(base, Storage::kDs + scores.stage() * S::kBytes, warp_key).store(left);
          ptx::fence_proxy_async();
          fill(scores);
        }
        late_dq.issue(dq);
        if constexpr (kOfWeights)
          issue_gemm<kDType, true>(sum, left, ColsOperand<O>(queries.do_tile));
        else
          issue_gemm<kDType, true>(sum, left, ColsOperand<Q>(queries.q_tile));
        wait_gemm<1>(dq);
        late_dq.add(dq, queries.head, queries.row);
        wait_gemm<0>(sum);
        release(kOfWeights ? do_rows : rows);
      }
      late_dq.finish();
      release(rings.kv_ring);
    }
    if constexpr (kOfWeights)
      store_dv(p, block, sum, warp_key);
    else
      store_dk(p, block, sum, warp_key);
  }

  // Zeros the rows of K and V that lie behind the keys in use: where dS is 0, NaN would make NaN of it. The copy engine
  // has done so behind the end of the tensor.
  static __forceinline__ void hide_keys_behind(const HopperBwdProblem& p, uint32 base, const Block& block,
                                               int32 thread) {
    if (block.keys == kC.block_kv || !(p.kv_lens.data || p.cu_seqlens_kv.data)) return;
    zero_rows<typename Storage::K>(base + Storage::kK, block.keys, kC.block_kv, thread, kComputingThreads);
    zero_rows<typename Storage::V>(base + Storage::kV, block.keys, kC.block_kv, thread, kComputingThreads);
    ptx::fence_proxy_async();
    __syncwarp();
    ptx::barrier_sync(kComputing, kComputingThreads);
  }

  // Zeros the rows of q and dO that see no key, or lie behind the sequence: they have no gradient, and what stands
  // there would be NaN also when multiplied by their weights of 0. Each warpgroup does it for itself.
  static __forceinline__ void hide_rows_without_keys(const char* shared, const Queries& queries, int32 warpgroup,
                                                     int32 thread) {
    if (!kDataMasks<kC> && queries.all_seen) return;
    constexpr int32 kThreadsPerRow = 128 / kC.block_q;
    const int32 row = thread / kThreadsPerRow;
    const char* lse =
        shared + Storage::kStatistics + queries.stage * Storage::kStatisticsBytes + statistics_offset(row);
    if (*reinterpret_cast<const float*>(lse) == kNoKey) {
      zero_rows<typename Storage::Q>(queries.q_tile, row, row + 1, thread % kThreadsPerRow, kThreadsPerRow);
      zero_rows<typename Storage::O>(queries.do_tile, row, row + 1, thread % kThreadsPerRow, kThreadsPerRow);
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
