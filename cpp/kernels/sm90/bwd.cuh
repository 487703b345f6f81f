// Attention backward for Hopper: FlashAttention-3 (Shah et al., 2024, arXiv 2407.08608), with the scores transposed.
// docs/hopper_backward.md says why it looks as it does.
//
// A unit of work is block_kv keys of one key head, for which a thread block goes through all blocks of queries that see
// them, of all query heads of the group. It may do several units, one after the other. One warp copies Q, dO, lse and
// delta into rings of buffers, and if deterministic two others keep the turns at dq. Two warpgroups compute, each for
// 64 keys. P^T and dS^T are left operands straight from registers, and only dS^T goes through shared memory too, for dQ
// = dS K. That is done a step late, so that the two need not meet, and what one has to do between its products runs
// beside those of the other.
//
// dK and dV of head dims beyond 128 take twice the registers that there are. There the keys are those of a pair of
// thread blocks, which reach each other's shared memory. One does all products with Q: S^T, hence the weights P^T, and
// dK. The other one does those with dO: dP^T and dV, with the weights that the first one sends, and dS^T, which it
// sends back, into shared memory, as dK's left operand too. Each adds one half of the columns of dQ, and needs half of
// what comes from memory.
//
// dQ is summed over thread blocks in global memory, in float32; bwd_postprocess makes dq of it.
#pragma once

#include "common/config.h"
#include "common/problem.h"
#include "kernels/ptx/atomic.cuh"
#include "kernels/ptx/cluster.cuh"
#include "kernels/ptx/compiler.cuh"
#include "kernels/ptx/grid.cuh"
#include "kernels/ptx/tma.cuh"
#include "kernels/ptx/warp.cuh"
#include "kernels/ptx/warpgroup.cuh"
#include "kernels/tile/gradient.cuh"
#include "kernels/tile/pipeline.cuh"
#include "kernels/tile/rows.cuh"
#include "kernels/tile/scores.cuh"
#include "kernels/tile/segments.cuh"
#include "kernels/tile/sequence.cuh"
#include "kernels/tile/warpgroup_gemm.cuh"

namespace flash::sm90 {

// The products that a thread block does: all, or of a pair those with Q or those with dO.
enum class Role { kAll, kOfQ, kOfDo };

template <KernelConfig kC, Role kRole>
struct BwdStorage {
  static constexpr bool kHasQ = kRole != Role::kOfDo, kHasDo = kRole != Role::kOfQ;
  // Of a pair, the first thread block needs Q for a step more, until it knows dS^T.
  static constexpr int32 kStages = kC.num_stages + (kRole == Role::kOfQ ? 1 : 0);
  // For S^T = K Q^T and dQ = dS K, or for the latter only.
  using K = Tile<kC.block_kv, kHasQ ? kC.head_dim : block_columns_of_dq(kC), panel_cols_of_q(kC)>;
  using V = Tile<kC.block_kv, kC.head_dim_v>;
  using Q = Tile<kC.block_q, kC.head_dim, panel_cols_of_q(kC)>;
  using O = Tile<kC.block_q, kC.head_dim_v>;
  using S = Tile<kC.block_kv, kC.block_q>;
  using Bias = BiasTile<kC>;
  using Stages = Ring<kStages>;
  using Scores = Ring<score_buffers(kC)>;
  using Weights = Ring<weight_buffers(kC)>;
  using Turns = Ring<2>;
  // Offsets in bytes: at kDs buffers of dS^T, at kP those of weights that come from the peer.
  static constexpr int32 kK = 0, kV = kK + K::kBytes, kQ = kV + (kHasDo ? V::kBytes : 0);
  static constexpr int32 kDo = kQ + (kHasQ ? kStages * Q::kBytes : 0), kDs = kDo + (kHasDo ? kStages * O::kBytes : 0);
  static constexpr int32 kP = kDs + score_buffers(kC) * S::kBytes;
  static constexpr int32 kBias = kP + (kHasQ ? 0 : kSentTiles * S::kBytes);
  static constexpr int32 kBiasBytes = kC.bias_tiled && kHasQ ? Bias::kBytes : 0;
  static constexpr int32 kStatistics = kBias + kStages * kBiasBytes, kStatisticsBytes = 8 * kC.block_q;
  static constexpr int32 kEnd = kStatistics + kStages * kStatisticsBytes;
  // Barriers lie in the same places in both thread blocks of a pair.
  static constexpr int32 kRowBarriers = int32(shared_bytes(kC) - kBarrierBytes);  // of all that has stages
  static constexpr int32 kKvBarriers = kRowBarriers + Ring<kC.num_stages + 1>::kBytes;
  static constexpr int32 kTurnBarriers = kKvBarriers + Ring<1>::kBytes;
  static constexpr int32 kAddedBarriers = kTurnBarriers + Turns::kBytes;
  static constexpr int32 kScoreBarriers = kAddedBarriers + Turns::kBytes;
  static constexpr int32 kWeightBarriers = kScoreBarriers + Scores::kBytes;  // of two rings
  static constexpr int32 kUnitBarriers = kWeightBarriers + 2 * Weights::kBytes;
  // Where the second thread block of a pair is told what comes next, in 16 bytes.
  static constexpr int32 kMailBarriers = kUnitBarriers + Ring<1>::kBytes, kMail = kMailBarriers + Ring<1>::kBytes;
  static constexpr int32 kMailBytes = 16, kUnit = kMail + kMailBytes;
  static_assert(kUnit + 4 <= kRowBarriers + kBarrierBytes && kEnd <= kRowBarriers && kMail % 16 == 0);
  static __forceinline__ int32 weight_barriers(int32 warpgroup) {
    return kWeightBarriers + warpgroup * Weights::kBytes;
  }
};

// Of all that compute, when rows of K and V are zeroed, and of each warpgroup.
enum BwdBarrier : int32 { kComputing = 1, kOwnWarpgroup = 2 };

template <KernelConfig kC, Role kRole>
struct Bwd {
  using Storage = BwdStorage<kC, kRole>;
  static constexpr int32 kBatchAxes = kC.num_batch_axes;
  static constexpr int32 kComputingThreads = 256;
  static constexpr bool kInPair = kRole != Role::kAll;
  static constexpr uint32 kRank = kRole == Role::kOfDo ? 1 : 0;  // in the pair
  // Columns of dQ: of each warpgroup, and those that both have.
  static constexpr int32 kDqCols[2] = {columns_of_dq(kC, 0), columns_of_dq(kC, 1)};
  static constexpr int32 kDqShares = column_shares_of_dq(kC);
  static constexpr int32 kCommonDqCols = kDqShares == 1 ? 0 : kDqCols[0] + kDqCols[1] - block_columns_of_dq(kC);
  static constexpr int32 kFirstDqCol = kRank * block_columns_of_dq(kC);
  static constexpr DType kDType = kC.dtype;
  // Columns of K and V that stay in registers as left operands, as far as these suffice: with 64 queries, shared
  // memory, of which two of the five products then read half as much, bounds. docs/hopper_backward.md has what it
  // gains.
  static constexpr int32 kLargestHeadDim = max_of(kC.head_dim, kC.head_dim_v);
  static constexpr int32 kHeldCols = kC.block_q > 64 ? 0 : kLargestHeadDim <= 64 ? 64 : kLargestHeadDim <= 96 ? 16 : 0;
  static constexpr int32 kHeldKCols = !kInPair ? min_of(kHeldCols, kC.head_dim) : kC.head_dim <= 192 ? kC.head_dim : 64;
  static constexpr int32 kHeldVCols = !kInPair               ? min_of(kHeldCols, kC.head_dim_v)
                                      : kC.head_dim_v <= 128 ? kC.head_dim_v
                                      : kC.head_dim_v > 192 && !(kC.softcap || kC.dropout) ? 32
                                                                                           : 0;
  // Whether a warpgroup passes over a first step of which it sees nothing.
  static constexpr bool kPassesOver = kC.block_q == 64 && kLargestHeadDim > 96;
  // Whether a step also reads the scores' factor in front of its products, and the place of lse and delta is kept in a
  // register: where a warp waits decides how the two warpgroups share the tensor cores. docs/hopper_backward.md has
  // what it gains, and loses where steps are passed over.
  static constexpr bool kReadsEarly = kC.block_q == 64 && !kPassesOver;
  // Registers per thread of the copying warpgroup and of the others.
  static constexpr bool kIsTight = kLargestHeadDim > 64 || kC.block_q > 64;
  static constexpr int32 kCopyingRegisters = kIsTight ? 24 : 40, kComputingRegisters = kIsTight ? 240 : 232;
  static_assert(128 * kCopyingRegisters + kComputingThreads * kComputingRegisters <=
                registers_at_start(kC) * num_threads(kC));
  static_assert(kC.num_warps == 8 && kC.block_kv == 128 && (kC.block_q == 64 || kC.block_q == 128));
  static_assert(kInPair == in_pairs(kC) && (!kInPair || kC.block_q == 64));

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
    if (threadIdx.x == 0) init_barriers(base);
    meet();
    ptx::wait_for_last_grid();
    if (threadIdx.x < 128) {
      ptx::setmaxnreg_dec<kCopyingRegisters>();
      switch (threadIdx.x / 32) {
        case 0: copy(p, shared, base); break;
        case 1: await_turns(p, base); break;
        case 2: pass_turns(p, base); break;
      }
    } else {
      ptx::setmaxnreg_inc<kComputingRegisters>();
      compute(p, shared, base);
    }
    if constexpr (kInPair) meet();  // a peer may still send
  }

  // Of all threads that may reach the thread block's memory.
  static __forceinline__ void meet() {
    if constexpr (kInPair)
      ptx::cluster_sync();
    else
      __syncthreads();
  }

  // Where a peer sends weights or dS^T, the barrier counts bytes.
  static __forceinline__ void init_barriers(uint32 base) {
    constexpr int32 kWarps = kC.num_warps;
    Storage::Stages::init(base + Storage::kRowBarriers, kWarps);
    Ring<1>::init(base + Storage::kKvBarriers, kWarps);
    Ring<1>::init(base + Storage::kUnitBarriers, 32 * kWarps);
    Ring<1>::init(base + Storage::kMailBarriers, 1);
    Storage::Turns::init(base + Storage::kTurnBarriers, 1);
    Storage::Turns::init(base + Storage::kAddedBarriers, 1, kWarps);
    constexpr int32 kReaders = kRole == Role::kOfDo ? 2 * kWarps : kWarps;  // of dS^T, in both thread blocks
    Storage::Scores::init(base + Storage::kScoreBarriers, kReaders, kRole == Role::kOfQ ? 1 : kWarps);
    if constexpr (kRole == Role::kOfQ)
      expect_all(typename Storage::Scores(base + Storage::kScoreBarriers), kScoreBytes);
    if constexpr (kInPair) {
      for (int32 w = 0; w < 2; ++w) {
        Storage::Weights::init(base + Storage::weight_barriers(w), kWarps / 2);
        if constexpr (kRole == Role::kOfDo)
          expect_all(typename Storage::Weights(base + Storage::weight_barriers(w)), kWeightBytes);
      }
    }
    ptx::fence_mbarrier_init();
  }

  // What comes from the peer into one buffer: dS^T, or a warpgroup's weights. By one thread, in front of each phase.
  static constexpr int32 kScoreBytes = Storage::S::kBytes;
  static constexpr int32 kWeightBytes = Storage::S::kBytes / 2 * (kC.softcap ? 2 : 1);
  static __forceinline__ void expect(const auto& ring, int32 bytes) {
    ptx::mbarrier_arrive_expect_tx(ring.full(), bytes);
  }
  static __forceinline__ void expect_all(auto ring, int32 bytes) {
    for (int32 i = 0; i < ring.kStages; ++i, ring.advance()) expect(ring, bytes);
  }

  using Work = Units<kBatchAxes, Side::kKeys, kC.block_kv, kComputingThreads, kC.deterministic, Divisor>;

  // Of the thread block, or pair.
  static __forceinline__ int32 first_unit() { return int32(blockIdx.x / cluster_size(kC)); }

  // Calls on_block(block) for the blocks of each unit of work, in practice one, or on_stray(batch, row). next() says
  // which unit follows, negative if none.
  template <class OnBlock, class OnStray, class Next>
  static __forceinline__ void visit_units(const HopperBwdProblem& p, int32 thread, OnBlock on_block, OnStray on_stray,
                                          Next next) {
    const Work work(p, p.order);
    for (int32 unit = first_unit(); unit >= 0; unit = next())
      work.visit(
          unit, thread, [&](const Sequence& s, int32 head, int32 row) { on_block(Block(p, s, head, row)); }, on_stray);
  }

  // The copying warp. Its first lane does all that touches memory.
  static __forceinline__ void copy(const HopperBwdProblem& p, char* shared, uint32 base) {
    typename Storage::Stages rows(base + Storage::kRowBarriers);
    Ring<1> kv_ring(base + Storage::kKvBarriers);
    const bool first_lane = threadIdx.x == 0;
    auto copy_block = [&](const Block& block) {
      if (block.is_empty()) return;
      const Sequence& seq = block.seq;
      auto coordinate = [&](const View& view) { return view.batch_stride[0] ? int32(seq.batch) : 0; };
      auto load = [&]<class T>(int32 tile, uint32 barrier, const TensorMap& map, const View& view, int32 row,
                               int32 head, int32 col = 0) {
        load_panels<T>(base + tile, barrier, map, row, head, coordinate(view), col);
      };
      if (first_lane) {
        const int32 row = seq.kv.begin + block.kv_row;
        kv_ring.wait_empty();
        ptx::mbarrier_arrive_expect_tx(kv_ring.full(), Storage::kQ);  // all that lies in front of Q: K, and V if here
        load.template operator()<typename Storage::K>(Storage::kK, kv_ring.full(), p.k_map, p.k, row, block.kv_head,
                                                      kFirstDqCol);
        if constexpr (Storage::kHasDo)
          load.template operator()<typename Storage::V>(Storage::kV, kv_ring.full(), p.v_map, p.v, row, block.kv_head);
      }
      kv_ring.advance();
#pragma unroll 1
      for (Steps step(p, block); step.exists(); step.advance()) {
        if (first_lane) {
          const int32 row = seq.q.begin + step.n * kC.block_q;
          rows.wait_empty();
          ptx::mbarrier_arrive_expect_tx(rows.full(), (Storage::kHasQ ? Storage::Q::kBytes + Storage::kBiasBytes : 0) +
                                                          (Storage::kHasDo ? Storage::O::kBytes : 0) +
                                                          Storage::kStatisticsBytes);
          // Through a map, though it lies side by side: racecheck does not follow the barriers of plain copies.
          ptx::tma_load(base + Storage::kStatistics + rows.stage() * Storage::kStatisticsBytes, p.statistics_map,
                        rows.full(), 0, statistics_row(seq, step.n * kC.block_q), step.head, coordinate(p.statistics));
          if constexpr (Storage::kHasQ)
            load.template operator()<typename Storage::Q>(Storage::kQ + rows.stage() * Storage::Q::kBytes, rows.full(),
                                                          p.q_map, p.q, row, step.head);
          if constexpr (Storage::kHasDo)
            load.template operator()<typename Storage::O>(Storage::kDo + rows.stage() * Storage::O::kBytes, rows.full(),
                                                          p.d_o_map, p.d_o, row, step.head);
          if constexpr (Storage::kBiasBytes > 0)
            load.template operator()<typename Storage::Bias>(Storage::kBias + rows.stage() * Storage::kBiasBytes,
                                                             rows.full(), p.bias_map, p.bias, row,
                                                             p.bias.head_stride ? step.head : 0, block.kv_row);
        }
        rows.advance();
      }
    };
    const Work work(p, p.order);
    Ring<1> units(base + Storage::kUnitBarriers), mail(base + Storage::kMailBarriers);
    // The next unit is asked for when all that this one takes is on its way, and no earlier: thread blocks are to begin
    // units in their order, whose operands are then in the L2 cache.
    auto ask = [&] {
      if constexpr (!stays_on_multiprocessor(kC)) return -1;
      int32 unit = -1;
      if (first_lane) {
        units.wait_empty();
        // Else nobody has more than one, and without queries nobody has zeroed the counter.
        const uint32 count = work.count(), at_once = gridDim.x / cluster_size(kC);
        if (kRank == 0 && at_once < count) {
          unit = int32(at_once) + ptx::atom_add(static_cast<int32*>(p.next_unit.data), 1);
          if (uint32(unit) >= count) unit = -1;
        }
        if constexpr (kInPair) share_unit(shared, base, mail, unit);
      }
      if constexpr (kInPair) mail.advance();
      return uniform(unit);
    };
    auto tell = [&](int32 unit) {
      if constexpr (!stays_on_multiprocessor(kC)) return;
      if (first_lane) {
        *reinterpret_cast<int32*>(shared + Storage::kUnit) = unit;
        ptx::mbarrier_arrive(units.full());
      }
      units.advance();
    };
    // Of units behind the end of their sequence, which may be many, nobody else hears; but a pair's warps do, as with
    // more to remember the warp that copies finds out later what a unit is.
    for (int32 unit = first_unit(); unit >= 0; unit = ask()) {
      bool is_told = unit == first_unit();
      auto tell_once = [&] {
        if (!is_told) tell(unit);
        is_told = true;
      };
      if constexpr (kInPair) tell_once();
      work.visit(
          unit,
          [&](const Sequence& s, int32 head, int32 row) {
            tell_once();
            copy_block(Block(p, s, head, row));
          },
          [&](int64, int32, Range) { tell_once(); });
    }
    tell(-1);
  }

  // A pair's first thread block asks, and tells the second one by mail.
  static __forceinline__ void share_unit(const char* shared, uint32 base, const Ring<1>& mail, int32& unit) {
    if constexpr (kRank == 0) {
      mail.wait_empty();
      ptx::st_async_x4(of_peer(base + Storage::kMail), unit, 0, 0, 0, of_peer(mail.full()));
    } else {
      expect(mail, Storage::kMailBytes);
      mail.wait_full();
      unit = *reinterpret_cast<const int32*>(shared + Storage::kMail);
      ptx::mbarrier_arrive_peer(of_peer(mail.empty()));
    }
  }

  // If deterministic, two warps wait for turns at dq and pass them on, whose ways through global memory nobody else
  // then has to wait for, nor one for the other's. The first fills a ring with turns. The second empties it when
  // another ring says that all warps have added.
  static __forceinline__ void await_turns(const HopperBwdProblem& p, uint32 base) {
    for_each_turn(p, base, [&](auto& turns, auto&, const Block& block, const Steps& step) {
      const int32 q_row = step.n * kC.block_q;
      turns.wait_empty();
      await_turn<kC>(ticket_of<kC>(p, block.seq, step.head, q_row), block.rule, block.kv_row / kC.block_kv, q_row);
      ptx::mbarrier_arrive(turns.full());
    });
  }
  static __forceinline__ void pass_turns(const HopperBwdProblem& p, uint32 base) {
    for_each_turn(p, base, [&](auto& turns, auto& added, const Block& block, const Steps& step) {
      added.wait_full();
      turns.release();
      pass_turn(ticket_of<kC>(p, block.seq, step.head, step.n * kC.block_q));
    });
  }
  // Calls on_turn for all of them, in a warp's first lane.
  template <class OnTurn>
  static __forceinline__ void for_each_turn(const HopperBwdProblem& p, uint32 base, OnTurn on_turn) {
    if constexpr (kC.deterministic) {
      typename Storage::Turns turns(base + Storage::kTurnBarriers), added(base + Storage::kAddedBarriers);
      auto go_through = [&](const Block& block) {
        if (block.is_empty()) return;
#pragma unroll 1
        for (Steps step(p, block); step.exists(); step.advance()) {
          if (threadIdx.x % 32 == 0) on_turn(turns, added, block, step);
          turns.advance();
          added.advance();
        }
      };
      visit_units(p, threadIdx.x % 32, go_through, [](int64, int64) {}, [] { return -1; });
    }
  }

  // A computing warp's places.
  struct Rings {
    typename Storage::Stages rows;
    Ring<1> kv_ring;
    typename Storage::Turns turns, added;
    typename Storage::Scores scores;    // dS^T of this step, where it is computed
    typename Storage::Weights weights;  // in a pair, from a warpgroup to the peer's
    // Of the step before, whose dQ is due, and where a peer computes dS^T also dK, for which Q is kept. At first
    // buffers that nobody has filled.
    typename Storage::Scores due_scores;
    typename Storage::Stages due_rows;

    __forceinline__ Rings(uint32 base, int32 warpgroup)
        : rows(base + Storage::kRowBarriers),
          kv_ring(base + Storage::kKvBarriers),
          turns(base + Storage::kTurnBarriers),
          added(base + Storage::kAddedBarriers),
          scores(base + Storage::kScoreBarriers),
          weights(base + Storage::weight_barriers(warpgroup)),
          due_scores(base + Storage::kScoreBarriers, score_buffers(kC) - 1, 1),
          due_rows(base + Storage::kRowBarriers, Storage::kStages - 1, 1),
          pair_offset_(kReadsEarly ? __shfl_sync(~0u, int32(threadIdx.x) % 4 * 8, int32(threadIdx.x) % 32) : 0) {}

    // Bytes to the thread's pair of queries among lse and delta. What has gone through a shuffle ptxas does not form
    // anew in each step, as it does whatever follows from the thread's number.
    __forceinline__ auto pair_offset() const {
      if constexpr (kReadsEarly)
        return pair_offset_;
      else
        return threadIdx.x % 4 * 8;
    }

   private:
    int32 pair_offset_;
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

  // The address of something of the pair's other thread block.
  static __forceinline__ uint32 of_peer(uint32 address) { return ptx::peer_shared(address, 1 - kRank); }

  // A warp that computes.
  static __forceinline__ void compute(const HopperBwdProblem& p, char* shared, uint32 base) {
    const int32 warpgroup = uniform(int32(threadIdx.x) / 128 - 1);
    Rings rings(base, warpgroup);
    Ring<1> units(base + Storage::kUnitBarriers);
    visit_units(
        p, int32(threadIdx.x) - 128,
        [&](const Block& block) { compute_block(p, shared, base, block, warpgroup, rings); },
        [&](int64 batch, int64 row) {
          if (kRank == 0) define_stray<kBatchAxes>(p, batch, row);
        },
        [&] {
          if constexpr (!stays_on_multiprocessor(kC)) return -1;
          units.wait_full();
          // Not uniform(), which would leave what follows from it in registers of the loop.
          const int32 unit = ptx::reduce_max(*reinterpret_cast<const int32*>(shared + Storage::kUnit));
          units.release();  // each lane for itself, which racecheck understands
          units.advance();
          return unit;
        });
  }

  static __forceinline__ void compute_block(const HopperBwdProblem& p, char* shared, uint32 base, const Block& block,
                                            int32 warpgroup, Rings& rings) {
    const int32 thread = int32(threadIdx.x) - 128, keys = max_of(block.keys, 0);
    const int32 slot_rows = min_of(kC.block_kv, block.seq.kv.size - block.kv_row);  // that must be written
    if (keys < slot_rows && Storage::kHasQ)
      store_zeros<kComputingThreads>(thread, target(p, p.dk, block), p.dk.row_stride, keys, slot_rows,
                                     int32(p.head_dim));
    if (keys < slot_rows && Storage::kHasDo)
      store_zeros<kComputingThreads>(thread, target(p, p.dv, block), p.dv.row_stride, keys, slot_rows,
                                     int32(p.head_dim_v));
    if (keys == 0) return;
    if constexpr (kRole == Role::kAll) {
      if (warpgroup == 0 || kDqCols[0] == kDqCols[1])
        compute_all<kDqCols[0]>(p, shared, base, block, warpgroup, rings);
      else
        compute_all<kDqCols[1]>(p, shared, base, block, warpgroup, rings);
    } else if constexpr (kRole == Role::kOfQ)
      compute_of_q(p, shared, base, block, warpgroup, rings);
    else
      compute_of_do(p, shared, base, block, warpgroup, rings);
  }

  // The block's first row of dk or dv.
  static __forceinline__ uint16* target(const HopperBwdProblem& p, const View& view, const Block& block) {
    return address_of<uint16, kBatchAxes>(p, view, block.seq.batch, block.kv_head, block.seq.kv.begin + block.kv_row);
  }

  // A warp's rows in a buffer of dS^T, through which it stores dK and dV. Everyone has read the buffer, and nobody else
  // writes these rows meanwhile.
  static __forceinline__ char* scratch_of(char* shared, const typename Storage::Scores& buffer, int32 warp_key) {
    return shared + Storage::kDs + buffer.stage() * Storage::S::kBytes + warp_key * Storage::S::kRowBytes;
  }
  static __forceinline__ void store_dk(const HopperBwdProblem& p, const Block& block, const auto& dk, char* scratch,
                                       int32 warp_key) {
    store_rows_through<kDType>(scratch, dk, p.options.scale, target(p, p.dk, block), p.dk.row_stride, warp_key,
                               block.keys, int32(p.head_dim));
  }
  static __forceinline__ void store_dv(const HopperBwdProblem& p, const Block& block, const auto& dv, char* scratch,
                                       int32 warp_key) {
    store_rows_through<kDType>(scratch, dv, 256.0f / float(p.options.keep_threshold), target(p, p.dv, block),
                               p.dv.row_stride, warp_key, block.keys, int32(p.head_dim_v));
  }

  // A warpgroup's part of dQ = dS K, done a step late, and its addition to what other thread blocks have found.
  template <int32 kCols>
  class LateDq {
   public:
    __forceinline__ LateDq(const HopperBwdProblem& p, uint32 base, const Block& block, int32 warpgroup, Rings& rings)
        : p_(p),
          base_(base),
          block_(block),
          rings_(rings),
          row_(kDqShares == 1 ? 64 * warpgroup : 0),
          col_(kDqShares == 2 ? (block_columns_of_dq(kC) - kCols) * warpgroup : 0),
          skipped_cols_(kCommonDqCols * warpgroup),
          warp_row_(uniform(row_ + int32(threadIdx.x) % 128 / 32 * 16)),
          place_(own_place(p, accum_block_of<kBatchAxes>(p, block.seq, 0, 0), warp_row_, kFirstDqCol + col_)) {
      if constexpr (kKeepsRegisters) dq_.clear();
    }

    // Issues that of the step before, once everyone's dS^T is there. In the first step it is a product of anything, as
    // around a branch the compiler would wait for every one.
    __forceinline__ void issue() {
      const int64 offset = head_ * p_.dq_accum.head_stride + q_row_ / kAccumRows * p_.dq_accum.row_stride;
      place_ += offset - offset_;
      offset_ = offset;
      rings_.due_scores.wait_full();
      if (kRole == Role::kOfQ && threadIdx.x == 128 && is_due()) expect(rings_.due_scores, kScoreBytes);
      const uint32 tile = base_ + Storage::kDs + rings_.due_scores.stage() * Storage::S::kBytes;
      issue_gemm<kDType, kC.block_kv>(dq_, ColsOperand<typename Storage::S>(tile, row_),
                                      ColsOperand<typename Storage::K>(base_ + Storage::kK, col_),
                                      kKeepsRegisters && might_add());
    }
    // Whether there is a step before.
    __forceinline__ bool is_due() const { return head_ >= 0; }
    __forceinline__ Accumulator<16, kCols>& sum() { return dq_; }
    // When it is done.
    __forceinline__ void add() {
      if (!is_due()) return;
      if constexpr (kC.deterministic) rings_.turns.wait_full();
      add_to_dq<kC, 1>(p_, block_.seq, place_, dq_, q_row_, warp_row_, kFirstDqCol + col_, skipped_cols_);
      if constexpr (kC.deterministic) {
        rings_.turns.advance();
        fill(rings_.added);
      }
    }
    // When dS^T has been read: in a pair its buffer is free when both thread blocks say so to the one that writes it.
    __forceinline__ void release() {
      if (!kInPair || !is_due() || threadIdx.x % 32 != 0) return;
      if constexpr (kRole == Role::kOfQ)
        ptx::mbarrier_arrive_peer(of_peer(rings_.due_scores.empty()));
      else
        rings_.due_scores.release();
    }
    // Then that of the step at hand is due.
    __forceinline__ void advance(int32 head, int32 q_row) {
      rings_.due_scores.advance();
      head_ = head, q_row_ = q_row;
    }
    // All of it, behind the last step.
    __forceinline__ void finish() {
      if (!is_due()) return;
      issue();
      wait_gemm<0>(dq_);
      release();
      add();
    }

   private:
    // Where there are registers enough, nobody shall write to those of dq_, which additions read late, before the next
    // product does. The compiler sees to it if that might add to them, which it never does.
    static constexpr bool kKeepsRegisters = kC.block_q == 64 && kLargestHeadDim <= 96;
    __forceinline__ bool might_add() const { return p_.num_heads < 0; }

    const HopperBwdProblem& p_;
    uint32 base_;
    const Block& block_;
    Rings& rings_;
    int32 row_, col_;     // of the thread block's part, which K's tile begins with
    int32 skipped_cols_;  // of the second warpgroup, that are the first one's too
    int32 warp_row_;      // the first of a warp
    // The thread's place in dq_accum, where the tile due begins `offset_` behind the sequence (in the first step, which
    // adds nothing, it is none). It moves on in the middle of a step: additions read their registers late, and who
    // writes to these before waits for them.
    float* place_;
    int64 offset_ = 0;
    Accumulator<16, kCols> dq_;
    int32 head_ = -1, q_row_ = 0;  // of the step before
  };

  // The lse, or with kDeltaBehindLse the delta, of a thread's pair of queries in n-tile `i`.
  static __forceinline__ float2 pair_of(const char* shared, const Rings& rings, int32 buffer, int32 offset, int32 i) {
    const int32 first = Storage::kStatistics + buffer * Storage::kStatisticsBytes + rings.pair_offset();
    return *reinterpret_cast<const float2*>(shared + first + statistics_offset(8 * i) + offset);
  }

  // dP^T begins at -delta, which then need not be subtracted, unless dropout comes in between; with a soft cap it would
  // take 4 % longer. To be called in front of a step's products: reads of shared memory queue behind those.
  static constexpr bool kDeltaFirst = !(kC.dropout || kC.softcap);
  static __forceinline__ void begin_dp(Accumulator<16, kC.block_q>& dp, const char* shared, const Rings& rings,
                                       int32 stage) {
    if constexpr (kDeltaFirst) {
#pragma unroll
      for (int32 i = 0; i < kC.block_q / 8; ++i) {
        const float2 delta = pair_of(shared, rings, stage, kDeltaBehindLse, i);
        dp.x[0][i][0] = dp.x[0][i][2] = -delta.x, dp.x[0][i][1] = dp.x[0][i][3] = -delta.y;
      }
      ptx::settled(dp.x[0]);  // else some of it is written between products, which ptxas then waits for
    }
  }
  // What is left to be subtracted.
  static __forceinline__ float2 delta_of(const char* shared, const Rings& rings, int32 stage, int32 i) {
    return kDeltaFirst ? float2{0.0f, 0.0f} : pair_of(shared, rings, stage, kDeltaBehindLse, i);
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

    __forceinline__ Queries(const Steps& step, uint32 base, const Rings& rings)
        : head(step.head),
          row(step.n * kC.block_q),
          all_seen(step.is_full()),
          stage(rings.rows.stage()),
          q_tile(base + Storage::kQ + stage * Storage::Q::kBytes),
          do_tile(base + Storage::kDo + stage * Storage::O::kBytes) {}
  };

  // Whether no query of a block's first step sees any of the warpgroup's keys: with a causal mask the second half of
  // the block's, or if none of that half are in use. All that is left to it then is dQ, which wants zeros of it.
  static __forceinline__ bool passes_over(const Block& block, const Steps& step, int32 warpgroup) {
    return kPassesOver && (!kC.segments || step.exists()) &&  // only segments leave a block without steps
           visible_rows(block.rule, block.kv_row + 64 * warpgroup).begin >= (step.n + 1) * kC.block_q;
  }

  // A warpgroup that does all products of its keys, and so many columns of dQ.
  template <int32 kCols>
  static __forceinline__ void compute_all(const HopperBwdProblem& p, char* shared, uint32 base, const Block& block,
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
      const HeldRows<K, kHeldKCols> k(base, Storage::kK, key_row, warp_key);
      const HeldRows<V, kHeldVCols> v(base, Storage::kV, key_row, warp_key);
      LateDq<kCols> late_dq(p, base, block, warpgroup, rings);
      Steps step(p, block);
      if (passes_over(block, step, warpgroup)) {
        rows.wait_full();  // or the release might count for what the stage held before
        zero_rows<S>(base + Storage::kDs + scores.stage() * S::kBytes, warp_key, warp_key + 16, thread % 32, 32);
        ptx::fence_proxy_async();
        fill(scores);
        release(rows);
        late_dq.advance(step.head, step.n * kC.block_q);
        step.advance();
      }
#pragma unroll 1
      for (; step.exists(); step.advance()) {
        const Queries queries(step, base, rings);
        const ScoreInputs<kC> in(p, block.seq, queries.head);
        Accumulator<16, kC.block_q> s, ds;
        uint32 probs[1][kC.block_q / 16][4], dscores[1][kC.block_q / 16][4];
        rows.wait_full();
        hide_rows_without_keys<Q, O>(shared, queries, warpgroup, queries.q_tile, queries.do_tile);
        float factor = score_factor<kC>(p);
        if constexpr (kReadsEarly && !kScoresInLog2<kC>) ptx::opaque(factor);
        begin_dp(ds, shared, rings, queries.stage);
        // The lse of the first 64 queries is read here too, where there are registers; that of others when it is
        // needed.
        constexpr bool kEarlyLse = !(kC.softcap || kC.segments || kC.dropout || kC.mask || (kC.bias && !kC.bias_tiled));
        float2 early_lse[8];
#pragma unroll
        for (int32 i = 0; i < 8; ++i) early_lse[i] = kEarlyLse ? pair_of(shared, rings, queries.stage, 0, i) : float2{};
        issue_gemm<kDType, false>(s, k, RowsOperand<Q>(queries.q_tile));
        issue_gemm<kDType, kDeltaFirst>(ds, v, RowsOperand<O>(queries.do_tile));
        TileGradient<kC, 16, kC.block_q> gradient;
        wait_gemm<1>(s);
        gradient.weights(
            s, p, in, !queries.all_seen, block.kv_row + warp_key, queries.row, bias_tile(base, queries.stage, warp_key),
            [&](int32 i) {
              return kEarlyLse && i < 8 ? early_lse[i % 8] : pair_of(shared, rings, queries.stage, 0, i);
            },
            factor);
        const auto ds_place = TileReader<S, Order::kDown>(base, Storage::kDs, warp_key).stage(scores.stage());
        // One half of the queries behind the other takes fewer registers.
        constexpr int32 kHalf = kC.block_q / 2;
        auto pack_weights = [&]<int32 kFrom, int32 kTo>() {
          Accumulator<16, kC.block_q> kept = s;
          gradient.template drop<kFrom, kTo>(kept);
          pack<kDType, kFrom, kTo>(probs, kept);
        };
        auto store_scores = [&]<int32 kFrom, int32 kTo>() {
          gradient.template scores<kFrom, kTo>(ds, s, p,
                                               [&](int32 i) { return delta_of(shared, rings, queries.stage, i); });
          pack<kDType, kFrom, kTo>(dscores, ds);
          store_fragments<kFrom, kTo>(ds_place, dscores);
        };
        auto issue_dv = [&]<int32 kFrom, int32 kTo>() {
          issue_gemm<kDType, true, kFrom, kTo>(dv_sum, probs, ColsOperand<O>(queries.do_tile));
        };
        pack_weights.template operator()<0, kHalf>();
        issue_dv.template operator()<0, kHalf>();
        wait_gemm<1>(ds);
        store_scores.template operator()<0, kHalf>();
        pack_weights.template operator()<kHalf, kC.block_q>();
        store_scores.template operator()<kHalf, kC.block_q>();
        // Behind the stores of dS^T, as accesses to shared memory queue behind products issued earlier.
        issue_dv.template operator()<kHalf, kC.block_q>();
        ptx::fence_proxy_async();
        fill(scores);
        late_dq.issue();
        issue_gemm<kDType, true>(dk_sum, dscores, ColsOperand<Q>(queries.q_tile));
        wait_gemm<1>(late_dq.sum());
        late_dq.add();
        late_dq.advance(queries.head, queries.row);
        wait_gemm<0>(dk_sum);
        ptx::settled(dv_sum.x[0]);
        release(rows);
      }
      late_dq.finish();
      release(rings.kv_ring);
    }
    char* scratch = scratch_of(shared, scores, warp_key);
    store_dk(p, block, dk_sum, scratch, warp_key);
    store_dv(p, block, dv_sum, scratch, warp_key);
  }

  // Of a pair: a warpgroup that does its keys' products with Q. dK is a step late too, as dS^T is.
  static __forceinline__ void compute_of_q(const HopperBwdProblem& p, char* shared, uint32 base, const Block& block,
                                           int32 warpgroup, Rings& rings) {
    using K = typename Storage::K;
    using Q = typename Storage::Q;
    using S = typename Storage::S;
    const int32 thread = int32(threadIdx.x) - 128, warp_key = thread / 32 * 16;
    Accumulator<16, kC.head_dim> dk_sum;
    dk_sum.clear();
    if (!block.is_empty()) {
      rings.kv_ring.wait_full();
      hide_keys_behind(p, base, block, thread);
      const HeldRows<K, kHeldKCols> k(base, Storage::kK, 64 * warpgroup, warp_key);
      LateDq<kDqCols[0]> late_dq(p, base, block, warpgroup, rings);
      int32 steps = 0;
      // What is due of the step before, whose Q lies in this stage. In the first step these are products of anything,
      // and the second one does not add to them.
      auto finish_last = [&](int32 stage) {
        late_dq.issue();
        const uint32 scores = base + Storage::kDs + rings.due_scores.stage() * S::kBytes;
        issue_gemm<kDType, kC.block_q>(dk_sum, RowsOperand<S>(scores, 64 * warpgroup),
                                       ColsOperand<Q>(base + Storage::kQ + stage * Q::kBytes), steps > 1);
        wait_gemm<1>(late_dq.sum());
        late_dq.add();
        wait_gemm<0>(dk_sum);
        late_dq.release();
        __syncwarp();  // all lanes have read their lse
        if (late_dq.is_due() && thread % 32 == 0) rings.due_rows.release();
      };
      Steps step(p, block);
      if (passes_over(block, step, warpgroup)) {
        const Queries queries(step, base, rings);
        rings.rows.wait_full();
        hide_rows_without_keys<Q>(shared, queries, warpgroup, queries.q_tile);  // which dK multiplies by zeros
        rings.rows.advance();
        rings.due_rows.advance();
        late_dq.advance(queries.head, queries.row);
        ++steps;
        step.advance();
      }
#pragma unroll 1
      for (; step.exists(); step.advance()) {
        const Queries queries(step, base, rings);
        const ScoreInputs<kC> in(p, block.seq, queries.head);
        Accumulator<16, kC.block_q> s;
        rings.rows.wait_full();
        hide_rows_without_keys<Q>(shared, queries, warpgroup, queries.q_tile);
        issue_gemm<kDType, false>(s, k, RowsOperand<Q>(queries.q_tile));
        wait_gemm<0>(s);
        TileGradient<kC, 16, kC.block_q> gradient;
        gradient.weights(
            s, p, in, !queries.all_seen, block.kv_row + warp_key, queries.row, bias_tile(base, queries.stage, warp_key),
            [&](int32 i) { return pair_of(shared, rings, queries.stage, 0, i); }, score_factor<kC>(p));
        send_weights(s, gradient, base, rings.weights);
        finish_last(late_dq.is_due() ? rings.due_rows.stage() : queries.stage);
        rings.rows.advance();
        rings.due_rows.advance();
        late_dq.advance(queries.head, queries.row);
        ++steps;
      }
      if (steps > 0) finish_last(rings.due_rows.stage());
      release(rings.kv_ring);
    }
    // Through the buffer of the last step, which the other warpgroup may still read. The peer's copy engine writes the
    // warp's rows of it for the next block, but only when the peer has got this warpgroup's weights: hence the fence.
    // To the buffer behind it, it might copy the zeros of a step that is passed over, for which it awaits no weights.
    // (The peer is one unit ahead at most, as this thread block's copying warp tells it the next.)
    ptx::barrier_sync(kComputing, kComputingThreads);
    store_dk(p, block, dk_sum, scratch_of(shared, rings.due_scores, warp_key), warp_key);
    ptx::fence_proxy_async();
  }

  // Where a thread finds the weights, and behind them the slopes of a soft cap, that the one with the same keys and
  // queries has sent: 16 bytes, and as many bytes behind the last ones as all threads of both warpgroups have.
  static constexpr int32 kSentBytes = 16 * kComputingThreads;
  static __forceinline__ int32 place_of_weights(int32 buffer) {
    return BwdStorage<kC, Role::kOfDo>::kP + buffer * Storage::S::kBytes + (int32(threadIdx.x) - 128) * 16;
  }

  static __forceinline__ void send_weights(const Accumulator<16, kC.block_q>& weights, auto& gradient, uint32 base,
                                           typename Storage::Weights& ring) {
    uint32 words[1][kC.block_q / 16][4];
    pack<kDType>(words, weights);
    ring.wait_empty();
    const uint32 target = of_peer(base + place_of_weights(ring.stage())), barrier = of_peer(ring.full());
#pragma unroll
    for (int32 i = 0; i < kC.block_q / 16; ++i) {
      const auto& w = words[0][i];
      ptx::st_async_x4(target + i * kSentBytes, w[0], w[1], w[2], w[3], barrier);
      if constexpr (kC.softcap) {
        const auto& slopes = gradient.slopes()[0];
        ptx::st_async_x4(target + Storage::S::kBytes + i * kSentBytes, slopes[2 * i][0], slopes[2 * i][1],
                         slopes[2 * i + 1][0], slopes[2 * i + 1][1], barrier);
      }
    }
    ring.advance();
  }

  static __forceinline__ void receive_weights(uint32 (&weights)[1][kC.block_q / 16][4], auto& gradient,
                                              const char* shared, typename Storage::Weights& ring) {
    ring.wait_full();
    if (threadIdx.x % 128 == 0) expect(ring, kWeightBytes);
    const char* source = shared + place_of_weights(ring.stage());
#pragma unroll
    for (int32 i = 0; i < kC.block_q / 16; ++i) {
      const uint4 x = *reinterpret_cast<const uint4*>(source + i * kSentBytes);
      weights[0][i][0] = x.x, weights[0][i][1] = x.y, weights[0][i][2] = x.z, weights[0][i][3] = x.w;
      if constexpr (kC.softcap) {
        auto& slopes = gradient.slopes()[0];
        const uint4 y = *reinterpret_cast<const uint4*>(source + Storage::S::kBytes + i * kSentBytes);
        slopes[2 * i][0] = y.x, slopes[2 * i][1] = y.y, slopes[2 * i + 1][0] = y.z, slopes[2 * i + 1][1] = y.w;
      }
    }
  }

  // Behind send_scores(): every lane has then used all that it read, in what it has stored, and they have met. Without
  // a use, what is read may leave shared memory later than the arrival does.
  static __forceinline__ void release_weights(typename Storage::Weights& ring) {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive_peer(of_peer(ring.empty()));
    ring.advance();
  }

  // Of a pair: a warpgroup that does its keys' products with dO, and dS^T.
  static __forceinline__ void compute_of_do(const HopperBwdProblem& p, char* shared, uint32 base, const Block& block,
                                            int32 warpgroup, Rings& rings) {
    using V = typename Storage::V;
    using O = typename Storage::O;
    const int32 thread = int32(threadIdx.x) - 128, warp_key = thread / 32 * 16;
    Accumulator<16, kC.head_dim_v> dv_sum;
    dv_sum.clear();
    if (!block.is_empty()) {
      rings.kv_ring.wait_full();
      hide_keys_behind(p, base, block, thread);
      const HeldRows<V, kHeldVCols> v(base, Storage::kV, 64 * warpgroup, warp_key);
      LateDq<kDqCols[0]> late_dq(p, base, block, warpgroup, rings);
      Steps step(p, block);
      if (passes_over(block, step, warpgroup)) {
        rings.rows.wait_full();
        const uint32 zeros[1][kC.block_q / 16][4] = {};
        send_scores(zeros, base, warp_key, rings.scores);
        release(rings.rows);
        late_dq.advance(step.head, step.n * kC.block_q);
        step.advance();
      }
#pragma unroll 1
      for (; step.exists(); step.advance()) {
        const Queries queries(step, base, rings);
        const ScoreInputs<kC> in(p, block.seq, queries.head);
        Accumulator<16, kC.block_q> ds, weights;
        uint32 probs[1][kC.block_q / 16][4], dscores[1][kC.block_q / 16][4];
        rings.rows.wait_full();
        hide_rows_without_keys<O>(shared, queries, warpgroup, queries.do_tile);
        begin_dp(ds, shared, rings, queries.stage);
        issue_gemm<kDType, kDeltaFirst>(ds, v, RowsOperand<O>(queries.do_tile));
        TileGradient<kC, 16, kC.block_q> gradient;
        gradient.draw(p, in, block.kv_row + warp_key, queries.row);
        receive_weights(probs, gradient, shared, rings.weights);
        unpack<kDType>(weights, probs);
        if constexpr (kC.dropout) {
          Accumulator<16, kC.block_q> kept = weights;
          gradient.drop(kept);
          pack<kDType>(probs, kept);
        }
        wait_gemm<0>(ds);
        late_dq.issue();
        issue_gemm<kDType, true>(dv_sum, probs, ColsOperand<O>(queries.do_tile));
        gradient.scores(ds, weights, p, [&](int32 i) { return delta_of(shared, rings, queries.stage, i); });
        pack<kDType>(dscores, ds);
        send_scores(dscores, base, warp_key, rings.scores);
        release_weights(rings.weights);
        wait_gemm<1>(late_dq.sum());
        late_dq.release();
        late_dq.add();
        late_dq.advance(queries.head, queries.row);
        wait_gemm<0>(dv_sum);
        release(rings.rows);
      }
      late_dq.finish();
      release(rings.kv_ring);
    }
    rings.scores.wait_empty();  // until it has been copied to the peer
    store_dv(p, block, dv_sum, scratch_of(shared, rings.scores, warp_key), warp_key);
  }

  // A warp's part of dS^T, into both thread blocks' shared memory.
  static __forceinline__ void send_scores(const uint32 (&scores)[1][kC.block_q / 16][4], uint32 base, int32 warp_key,
                                          typename Storage::Scores& ring) {
    using S = typename Storage::S;
    const int32 part = ring.stage() * S::kBytes + warp_key * S::kRowBytes;
    ring.wait_empty();
    store_fragments(TileReader<S, Order::kDown>(base, Storage::kDs, warp_key).stage(ring.stage()), scores);
    ptx::fence_proxy_async();
    __syncwarp();
    if (threadIdx.x % 32 == 0)
      ptx::copy_to_peer(of_peer(base + BwdStorage<kC, Role::kOfQ>::kDs + part), base + Storage::kDs + part,
                        16 * S::kRowBytes, of_peer(ring.full()));
    fill(ring);
  }

  // Of the loops that zero rows, which are seldom gone through but decide how ptxas numbers the main loop's registers.
  // Thousands of cycles with 4 and 1: head dim 256, 4096 causal 2040 and 2105; 128, 4096 causal 1781 and 1733.
  static constexpr int32 kZeroingUnroll = kC.head_dim > 192 ? 4 : 1;

  // Zeros the rows of K and V that lie behind the keys in use: where dS is 0, NaN would make NaN of it. The copy engine
  // has done so behind the end of the tensor.
  static __forceinline__ void hide_keys_behind(const HopperBwdProblem& p, uint32 base, const Block& block,
                                               int32 thread) {
    if (block.keys == kC.block_kv || !(p.kv_lens.data || p.cu_seqlens_kv.data)) return;
    zero_rows<typename Storage::K, kZeroingUnroll>(base + Storage::kK, block.keys, kC.block_kv, thread,
                                                   kComputingThreads);
    if constexpr (Storage::kHasDo)
      zero_rows<typename Storage::V, kZeroingUnroll>(base + Storage::kV, block.keys, kC.block_kv, thread,
                                                     kComputingThreads);
    ptx::fence_proxy_async();
    __syncwarp();
    ptx::barrier_sync(kComputing, kComputingThreads);
  }

  // Zeros the rows of Tiles, which are q or dO, that see no key, or lie behind the sequence: they have no gradient, and
  // what stands there would be NaN also when multiplied by their weights of 0. Each warpgroup does it for itself.
  template <class... Tiles, class... Addresses>
  static __forceinline__ void hide_rows_without_keys(const char* shared, const Queries& queries, int32 warpgroup,
                                                     Addresses... tiles) {
    if (!kDataMasks<kC> && queries.all_seen) return;
    uint32 thread = threadIdx.x % 128;
    ptx::opaque(thread);  // or what follows from it is computed in front of the loop, and holds registers
    constexpr int32 kThreadsPerRow = 128 / kC.block_q;
    const int32 row = int32(thread) / kThreadsPerRow;
    const char* lse =
        shared + Storage::kStatistics + queries.stage * Storage::kStatisticsBytes + statistics_offset(row);
    if (*reinterpret_cast<const float*>(lse) == kNoKey) {
      (zero_rows<Tiles, kZeroingUnroll>(tiles, row, row + 1, int32(thread) % kThreadsPerRow, kThreadsPerRow), ...);
      ptx::fence_proxy_async();
    }
    __syncwarp();
    ptx::barrier_sync(kOwnWarpgroup + warpgroup, 128);
  }
};

template <KernelConfig kC>
__forceinline__ void bwd(const HopperBwdProblem& p) {
  extern __shared__ __align__(1024) char shared[];
  char* own = ptx::own_shared(shared);
  if constexpr (!in_pairs(kC))
    Bwd<kC, Role::kAll>::run(p, own);
  else if (blockIdx.x % 2 == 0)
    Bwd<kC, Role::kOfQ>::run(p, own);
  else
    Bwd<kC, Role::kOfDo>::run(p, own);
}

}  // namespace flash::sm90
