// Attention forward for Hopper: FlashAttention-3 (Shah et al., 2024, arXiv 2407.08608). docs/hopper_forward.md says why
// it looks as it does.
//
// A thread block stays on its multiprocessor and does units of work, one after the other. Of its first warpgroup one
// warp finds out what they are, one copies Q, and one blocks of keys and values, from the last to the first, into rings
// of buffers. The other warpgroups own 64 queries each, with their scores and their part of O, in registers. They take
// turns: the maximum of one is found beside its own P V of the block before, and its exponentials beside both products
// of the next. Of three, each does one block after the other, in no turn, if registers do not allow more.
#pragma once

#include "common/config.h"
#include "common/problem.h"
#include "kernels/ptx/atomic.cuh"
#include "kernels/ptx/compiler.cuh"
#include "kernels/ptx/grid.cuh"
#include "kernels/ptx/tma.cuh"
#include "kernels/ptx/warpgroup.cuh"
#include "kernels/tile/pipeline.cuh"
#include "kernels/tile/rows.cuh"
#include "kernels/tile/scores.cuh"
#include "kernels/tile/segments.cuh"
#include "kernels/tile/sequence.cuh"
#include "kernels/tile/softmax.cuh"
#include "kernels/tile/warpgroup_gemm.cuh"

namespace flash::sm90 {

// What warps tell each other of a unit of work: a block of queries of a head. Without queries: there are no more. All
// that follows from it is found out once, as those who compute would do nothing else meanwhile.
struct alignas(16) Unit {
  Sequence seq;
  int32 head;
  int32 q_row, q_end;
  BlockRange keys;
  uint16* o;  // this and the others at q_row
  float* lse;
  const float* sinks;
};

template <KernelConfig kC>
struct FwdStorage {
  static constexpr int32 kWarpgroups = kC.num_warps / 4;  // that compute
  using Q = Tile<64, kC.head_dim>;                        // of one warpgroup
  using K = Tile<kC.block_kv, kC.head_dim>;
  using V = Tile<kC.block_kv, kC.head_dim_v>;
  using Bias = BiasTile<kC>;                        // of all warpgroups; only if bias_tiled
  using QRing = Ring<q_buffers(kC) * kWarpgroups>;  // warpgroups in turns
  using KvRing = Ring<kC.num_stages>;
  using UnitRing = Ring<2>;
  using Ends = Ring<1>;  // a unit told fills it, by itself; empty when who copies K and V is about to end that unit
  // Offsets in bytes.
  static constexpr int32 kQ = 0, kK = q_buffers(kC) * kWarpgroups * Q::kBytes, kV = kK + kC.num_stages * K::kBytes;
  static constexpr int32 kBias = kV + kC.num_stages * V::kBytes;
  static constexpr int32 kBiasBytes = kC.bias_tiled ? 2 * kC.block_q * kC.block_kv : 0;
  static constexpr int32 kQBarriers = kBias + kC.num_stages * kBiasBytes, kKBarriers = kQBarriers + QRing::kBytes;
  static constexpr int32 kVBarriers = kKBarriers + KvRing::kBytes, kUnitBarriers = kVBarriers + KvRing::kBytes;
  static constexpr int32 kBiasBarriers = kUnitBarriers + UnitRing::kBytes;
  static constexpr int32 kEndBarriers = kBiasBarriers + (kC.bias_tiled ? KvRing::kBytes : 0);
  static constexpr int32 kUnits = kEndBarriers + Ends::kBytes;
  static_assert(kUnits + UnitRing::kStages * sizeof(Unit) <= kQBarriers + kBarrierBytes && kUnits % 16 == 0);
  static_assert(kQBarriers + kBarrierBytes == shared_bytes(kC));
  static_assert(kC.num_warps % 4 == 0 && kC.block_q == 16 * kC.num_warps);
};

// Named barriers. Warpgroup w's turn begins at kTurn + w, its own four warps meet at kWarpgroup + w.
enum FwdBarrier : int32 { kTurn = 1, kWarpgroup = 4 };

template <KernelConfig kC>
struct Fwd {
  using Storage = FwdStorage<kC>;
  static constexpr int32 kBatchAxes = kC.num_batch_axes, kWarpgroups = Storage::kWarpgroups;
  static constexpr int32 kComputingThreads = 32 * kC.num_warps;
  static constexpr DType kDType = kC.dtype;
  using Work = Units<kBatchAxes, Side::kQueries, kC.block_q, kComputingThreads, true, Divisor>;

  // Registers per thread of the copying warpgroup and of the others.
  static constexpr int32 kCopyingRegisters = kWarpgroups == 3 ? 32 : 40;
  static constexpr int32 kComputingRegisters = kWarpgroups == 3 ? 160 : 232;
  static_assert(128 * kCopyingRegisters + kComputingThreads * kComputingRegisters <=
                registers_at_start(kC) * num_threads(kC));
  static_assert(kWarpgroups == 2 || kWarpgroups == 3);

  // A turn goes from a warpgroup's products to the end of their issue, or, where exponentials take longer than
  // products, to its maximum, so that no two warpgroups compute them at the same time.
  static constexpr bool kTurnHasMaximum = kC.head_dim <= 64;

  // Whether a warpgroup has registers for P of one block and scores of the next one at a time.
  static constexpr bool kPvLags = kWarpgroups == 2 || max_of(kC.head_dim, kC.head_dim_v) <= 64;
  static_assert(kPvLags || !kC.dropout);

  // The next unit is asked for when at most so many blocks of keys of this one are left to be copied.
  static constexpr int32 kAskedAhead = 4;

  static __forceinline__ void run(const HopperFwdProblem& p, char* shared) {
    const uint32 base = ptx::shared_address(shared);
    if (threadIdx.x == 0) {
      Storage::QRing::init(base + Storage::kQBarriers, 4);
      Storage::KvRing::init(base + Storage::kKBarriers, kC.num_warps);
      Storage::KvRing::init(base + Storage::kVBarriers, kC.num_warps);
      Storage::UnitRing::init(base + Storage::kUnitBarriers, 32 * (kC.num_warps + 2));
      Storage::Ends::init(base + Storage::kEndBarriers, 1);
      if constexpr (kC.bias_tiled) Storage::KvRing::init(base + Storage::kBiasBarriers, kC.num_warps);
      ptx::fence_mbarrier_init();
    }
    ptx::wait_for_last_grid();
    __syncthreads();
    if (threadIdx.x < 128) {
      ptx::setmaxnreg_dec<kCopyingRegisters>();
      switch (threadIdx.x / 32) {
        case 0: copy_kv(p, shared, base); break;
        case 1: copy_q(p, shared, base); break;
        case 2: hand_out_units(p, shared, base); break;
      }
    } else {
      ptx::setmaxnreg_inc<kComputingRegisters>();
      compute(p, shared, base);
    }
  }

  // The warp that finds out what the thread block's units are. The first one is known; others, if there are any, a
  // counter hands out, late, so that who gets on faster gets more of them.
  static __forceinline__ void hand_out_units(const HopperFwdProblem& p, char* shared, uint32 base) {
    const Work work(p, p.order);
    typename Storage::UnitRing ring(base + Storage::kUnitBarriers);
    typename Storage::Ends ends(base + Storage::kEndBarriers);
    const bool first_lane = threadIdx.x % 32 == 0;
    auto tell = [&](const Unit& unit) {
      if (first_lane) {
        ring.wait_empty();
        *reinterpret_cast<Unit*>(shared + Storage::kUnits + ring.stage() * sizeof(Unit)) = unit;
        ptx::mbarrier_arrive(ring.full());
      }
      ring.advance();
    };
    const uint32 count = work.count();
    const bool asks = count > gridDim.x;
    uint32 index = blockIdx.x;
    while (index < count) {
      work.visit(
          index,
          [&](const Sequence& seq, int32 head, int32 row) {
            // Blocks end with the sequence, in multiples of a warpgroup's rows: the one that is not full has the least
            // keys if causal.
            const int32 end = row + kC.block_q - (kC.block_q - 1 - (seq.q.size - 1) % kC.block_q) / 64 * 64;
            const int32 first = max_of(end - kC.block_q, 0);
            const int64 o_row = seq.q.begin + first;
            if (first_lane) ends.wait_empty();  // also if a visit has more than one
            tell({seq, head, first, end,
                  KeyBlocks<kC>::range_of(mask_rule_of(p, seq), first, min_of(end, seq.q.used) - first),
                  address_of<uint16, kBatchAxes>(p, p.o, seq.batch, head, o_row),
                  address_of<float, kBatchAxes>(p, p.lse, seq.batch, head, o_row),
                  address_of<const float, kBatchAxes>(p, p.sinks, seq.batch, head, first)});
            ends.advance();
          },
          [&](int64 batch, int32 first_row, Range packed) {
#pragma unroll 1
            for (int32 row = first_row + threadIdx.x % 32; row < first_row + kComputingThreads; row += 32)
              if (work.is_stray(row, packed)) define_stray<kBatchAxes>(p, batch, row);
          });
      uint32 next = count;
      if (asks && first_lane) {
        ends.wait_empty();
        next = gridDim.x + uint32(ptx::atom_add(static_cast<int32*>(p.next_unit.data), 1));
      }
      index = __shfl_sync(~0u, next, 0);
    }
    tell({});
  }

  // Calls on_unit(unit) for all of them, and at last for one without queries.
  template <class OnUnit>
  static __forceinline__ void for_each_unit(const char* shared, uint32 base, OnUnit on_unit) {
    for (typename Storage::UnitRing ring(base + Storage::kUnitBarriers);;) {
      ring.wait_full();
      Unit unit;
      const auto* words = reinterpret_cast<const uint4*>(shared + Storage::kUnits + ring.stage() * sizeof(Unit));
#pragma unroll
      for (int32 i = 0; i < int32(sizeof(Unit) / 16); ++i) {
        const uint4 x = words[i];
        const uint32 four[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int32 j = 0; j < 4; ++j) reinterpret_cast<int32*>(&unit)[4 * i + j] = uniform(int32(four[j]));
      }
      ring.release();  // each lane for itself, which racecheck understands
      ring.advance();
      on_unit(unit);
      if (unit.q_end == 0) return;
    }
  }

  // The blocks of keys that a unit's queries see.
  static __forceinline__ KeyBlocks<kC> keys_of(const ScoreInputs<kC>& in, const Unit& unit) {
    return {unit.keys, in, unit.seq, unit.q_row, min_of(unit.q_end, unit.seq.q.used) - unit.q_row};
  }

  // Fills the ring's next buffer, of those at `tiles`. Only the warp's first lane touches memory.
  template <class T>
  static __forceinline__ void load(auto& ring, uint32 tiles, const TensorMap& map, int32 row, int32 head, int32 batch,
                                   int32 col = 0) {
    if (threadIdx.x % 32 == 0) {
      ring.wait_empty();
      ptx::mbarrier_arrive_expect_tx(ring.full(), T::kBytes);
      load_panels<T>(tiles + ring.stage() * T::kBytes, ring.full(), map, row, head, batch, col);
    }
    __syncwarp();  // else the other lanes go on to wait for the next unit, and take turns from the first one
    ring.advance();
  }

  // The warp that copies Q, where there are two buffers while others work on the unit before.
  static __forceinline__ void copy_q(const HopperFwdProblem& p, const char* shared, uint32 base) {
    typename Storage::QRing q_ring(base + Storage::kQBarriers);
    if (threadIdx.x % 32 == 0) ptx::prefetch_tensor_map(p.q_map);
    for_each_unit(shared, base, [&](const Unit& unit) {
      KeyBlocks<kC> keys = keys_of(ScoreInputs<kC>(p, unit.seq, unit.head), unit);
      if (!keys.exists(keys.last())) return;
#pragma unroll
      for (int32 w = 0; w < kWarpgroups; ++w)
        load<typename Storage::Q>(q_ring, base + Storage::kQ, p.q_map, unit.seq.q.begin + unit.q_row + 64 * w,
                                  unit.head, int32(unit.seq.batch));
    });
  }

  // The warp that copies K, V and bias.
  static __forceinline__ void copy_kv(const HopperFwdProblem& p, const char* shared, uint32 base) {
    typename Storage::KvRing k_ring(base + Storage::kKBarriers), v_ring(base + Storage::kVBarriers);
    typename Storage::KvRing bias_ring(base + Storage::kBiasBarriers);
    typename Storage::Ends ends(base + Storage::kEndBarriers);
    auto tell_end = [&] {
      if (threadIdx.x % 32 == 0) ends.release();
    };
    if (threadIdx.x % 32 == 0) {
      ptx::prefetch_tensor_map(p.k_map);
      ptx::prefetch_tensor_map(p.v_map);
      if constexpr (kC.bias_tiled) ptx::prefetch_tensor_map(p.bias_map);
    }
    for_each_unit(shared, base, [&](const Unit& unit) {
      if (unit.q_end == 0) return;  // nobody waits for its end
      const Sequence& seq = unit.seq;
      KeyBlocks<kC> keys = keys_of(ScoreInputs<kC>(p, seq, unit.head), unit);
      int32 n = keys.last();
      if (!keys.exists(n)) return tell_end();
      const int32 kv_head = int32(quotient(uint32(unit.head), p.order.group));
      auto coordinate = [&](const View& view) { return view.batch_stride[0] ? int32(seq.batch) : 0; };
      const int32 k_batch = coordinate(p.k), v_batch = coordinate(p.v);
      auto load_k_and_bias = [&](int32 n) {
        load<typename Storage::K>(k_ring, base + Storage::kK, p.k_map, seq.kv.begin + n * kC.block_kv, kv_head,
                                  k_batch);
        if constexpr (kC.bias_tiled)
          load<typename Storage::Bias>(bias_ring, base + Storage::kBias, p.bias_map, unit.q_row,
                                       p.bias.head_stride ? unit.head : 0, coordinate(p.bias), n * kC.block_kv);
      };
      load_k_and_bias(n);
      bool ending = false;
#pragma unroll 1
      while (keys.exists(n)) {
        const int32 next = keys.below(n);
        if (!ending && !keys.exists(next - kAskedAhead)) {
          ending = true;
          tell_end();
        }
        if (keys.exists(next)) load_k_and_bias(next);
        load<typename Storage::V>(v_ring, base + Storage::kV, p.v_map, seq.kv.begin + n * kC.block_kv, kv_head,
                                  v_batch);
        n = next;
      }
    });
  }

  // A warp that computes.
  static __forceinline__ void compute(const HopperFwdProblem& p, char* shared, uint32 base) {
    const int32 thread = int32(threadIdx.x) - 128, lane = threadIdx.x % 32;
    const int32 warpgroup = uniform(thread / 128), warp_row = thread / 32 * 16;
    typename Storage::QRing q_ring(base + Storage::kQBarriers, warpgroup);
    typename Storage::KvRing k_ring(base + Storage::kKBarriers), v_ring(base + Storage::kVBarriers);
    typename Storage::KvRing bias_ring(base + Storage::kBiasBarriers);
    auto release = [&](auto& ring, int32 by = 1) {
      if (lane == 0) ring.release();
      ring.advance(by);
    };
    // Warpgroups take turns, lest two compute exponentials at the same time; the last one lets the first begin.
    auto await_turn = [&] {
      if constexpr (kPvLags) ptx::barrier_sync(kTurn + warpgroup, 256);
    };
    auto pass_turn = [&] {
      if constexpr (kPvLags) ptx::barrier_arrive(kTurn + (warpgroup + 1 < kWarpgroups ? warpgroup + 1 : 0), 256);
    };
    if (warpgroup == kWarpgroups - 1) pass_turn();

    // A warpgroup without rows of its own lets the buffers of a unit pass, and its turns.
    auto let_pass = [&](KeyBlocks<kC>& keys, int32 n) {
      auto pass = [&](auto& ring, int32 by = 1) {
        ring.wait_full();
        __syncwarp();  // no lane is left behind to wait for what comes next time
        release(ring, by);
      };
      auto pass_k_and_bias = [&] {
        pass(k_ring);
        if constexpr (kC.bias_tiled) pass(bias_ring);
      };
      auto pass_block = [&] {
        pass_k_and_bias();
        await_turn();
        pass_turn();
      };
      pass(q_ring, kWarpgroups);
      pass_block();
#pragma unroll 1
      while (keys.exists(n = keys.below(n))) {
        pass_block();
        pass(v_ring);
      }
      pass(v_ring);
    };

    // If P V lags, that of a unit's last block, and the results, are left to be done beside the next unit's first
    // products.
    struct Results {
      uint16* o_rows;
      float* lse_rows;
      const float* sinks;
      int32 rows;  // 0: nothing is left to be done
    };
    Results due = {};
    const float factor = score_factor<kC>(p);
    Accumulator<16, kC.head_dim_v> o;
    SoftmaxState<2> state;
    uint32 probs[1][kC.block_kv / 16][4] = {};
    auto v_tile = [&] { return base + Storage::kV + v_ring.stage() * Storage::V::kBytes; };
    auto pv_gemm = [&] {
      v_ring.wait_full();
      issue_gemm<kDType, true>(o, probs, ColsOperand<typename Storage::V>(v_tile()));
    };
    auto write_results = [&](const SoftmaxState<2>& state) {
      float sinks[2], normalizer[2], lse[2];
#pragma unroll
      for (int32 r = 0; r < 2; ++r) sinks[r] = sink_of(p, due.sinks, min_of(warp_row + 8 * r + lane / 4, due.rows - 1));
      finish_softmax<16, kC.head_dim_v>(state, o, factor, sinks, normalizer, lse);
#pragma unroll
      for (int32 r = 0; r < 2; ++r) {
        const int32 row = warp_row + 8 * r + lane / 4;
        if (lane % 4 == 0 && row < due.rows) due.lse_rows[row] = lse[r] * kLn2;
      }
      const float dropout_scale = 256.0f / float(p.options.keep_threshold);
      store_rows<kDType>(o, due.o_rows, p.o.row_stride, warp_row, due.rows, int32(p.head_dim_v),
                         [&](int32 h) { return normalizer[h] * dropout_scale; });
    };
    auto finish = [&] {
      if (!kPvLags || due.rows == 0) return;
      pv_gemm();
      wait_gemm<0>(o);
      release(v_ring);
      write_results(state);
      due.rows = 0;
    };

    auto attend = [&](const Unit& unit) {
      const Sequence& seq = unit.seq;
      const int32 q_row = unit.q_row, q_end = unit.q_end;
      const int32 rows = min_of(q_end, seq.q.used) - q_row;  // that take part
      const ScoreInputs<kC> in(p, seq, unit.head);
      KeyBlocks<kC> keys = keys_of(in, unit);
      int32 n = keys.last();
      const int32 seeing = keys.exists(n) ? rows : 0;             // of those that take part, all or none
      const int32 slot_rows = min_of(q_end, seq.q.size) - q_row;  // that must be written
      if (seeing < slot_rows) {
        store_zeros<kComputingThreads>(thread, unit.o, p.o.row_stride, seeing, slot_rows, int32(p.head_dim_v));
#pragma unroll 1
        for (int32 r = seeing + thread; r < slot_rows; r += kComputingThreads)
          unit.lse[r] = r < rows ? sink_of(p, unit.sinks, r) * kLn2 : -kInfinity;
      }
      const bool is_last = q_end == 0;
      if (seeing == 0 && !is_last) return;
      if (64 * warpgroup >= rows) {
        finish();
        if (!is_last) let_pass(keys, n);
        __syncwarp();  // else the compiler takes what follows for divergent, and keeps addresses in threads' registers
        return;
      }

      const uint32 q_tile = base + Storage::kQ + q_ring.stage() * Storage::Q::kBytes;
      const RowsOperand<typename Storage::Q> q_outside(q_tile);
      // In front of the loop the compiler would compute all of Q's descriptors, which for large ones do not fit.
      auto q = [&] {
        if constexpr (kC.head_dim <= 128) return q_outside;
        return RowsOperand<typename Storage::Q>(q_tile);
      };
      Accumulator<16, kC.block_kv> s;
      float rescale[2];
      auto bias_tile = [&] {
        if constexpr (kC.bias_tiled) {
          bias_ring.wait_full();
          const int32 tile = Storage::kBias + bias_ring.stage() * Storage::kBiasBytes;
          return RowsOfA<typename Storage::Bias>{{base, tile, warp_row}};
        } else {
          return NoBiasTile{};
        }
      };
      constexpr bool kRawScores = !kScoresInLog2<kC> && !kDataMasks<kC>;  // where the positional mask shows all
      auto scores = [&]<bool kMasked>(int32 n) {
        if constexpr (kMasked || !kRawScores)
          apply_scores<kC, false, kMasked>(s, p, in, q_row + warp_row, n * kC.block_kv, bias_tile(),
                                           [](int32, int32, int32, float) {});
        if constexpr (kC.bias_tiled) {
          __syncwarp();  // all lanes have read
          release(bias_ring);
        }
      };
      // What all steps begin with: Q K^T is issued, and when it is done, its scores follow. `last`: block of the unit.
      auto issue_qk = [&]<bool kFirst>() {
        if constexpr (kFirst) q_ring.wait_full();
        k_ring.wait_full();
        await_turn();
        issue_gemm<kDType, kC.head_dim, false>(
            s, q(), RowsOperand<typename Storage::K>(base + Storage::kK + k_ring.stage() * Storage::K::kBytes));
      };
      auto finish_scores = [&]<bool kMasked, bool kFirst>(int32 n, bool last) {
        release(k_ring);
        if (last) release(q_ring, kWarpgroups);
        if (!kFirst || !kRawScores || !keys.is_full(n)) scores.template operator()<kMasked>(n);
      };
      auto begin_results = [&](int32 n) {
        o.clear();
        due = {unit.o, unit.lse, unit.sinks, rows};
        hide_rows_behind(p, seq, v_tile(), v_ring, n, warpgroup, thread % 128);
      };
      // Q K^T of block n and P V of the block before it, the last one of the unit before if kFirst.
      auto lagging_step = [&]<bool kMasked, bool kFirst>(int32 n, bool last) {
        constexpr bool kGuard = kMasked || kDataMasks<kC>;
        issue_qk.template operator()<kFirst>();
        // Where nothing is due, weights of anything: around a branch the compiler would wait for every product.
        pv_gemm();
        if constexpr (!kTurnHasMaximum) pass_turn();
        wait_gemm<1>(s);
        const SoftmaxState<2> before = state;
        finish_scores.template operator()<kMasked, kFirst>(n, last);
        bool grows = false;
        auto pass_turn_late = [&] {
          if constexpr (kTurnHasMaximum) pass_turn();
        };
        if constexpr (kFirst) {
          pass_turn_late();
          first_maximum(s, state);
        } else {
          grows = raise_maximum(s, state, rescale, factor, pass_turn_late);
        }
        // P V reads the last block's weights until it is done: those of this one can be packed only behind it, and best
        // beside the exponentials.
        wait_gemm<0>(o);
        if constexpr (kFirst) {
          if (due.rows > 0) {
            release(v_ring);
            write_results(before);
          }
        } else {
          release(v_ring);
          if (grows) scale_rows(o, rescale);
        }
        weigh<kGuard, 0, kC.block_kv>(s, state, factor);
        if constexpr (kC.dropout)
          for_each_dropout_bit<false, 16, kC.block_kv>(
              in.dropout, p.options.keep_threshold, q_row + warp_row, n * kC.block_kv,
              [&](int32 m, int32 t, int32 e, bool keep) { s.x[m][t][e] = keep ? s.x[m][t][e] : 0.0f; });
        pack<kDType>(probs, s);
        if constexpr (kFirst) begin_results(n);
      };
      // Q K^T of block n, then its P V: that of the first half beside the exponentials of the second one.
      auto halved_step = [&]<bool kMasked, bool kFirst>(int32 n, bool last) {
        constexpr bool kGuard = kMasked || kDataMasks<kC>;
        constexpr int32 kHalf = kC.block_kv / 32 * 16;
        issue_qk.template operator()<kFirst>();
        wait_gemm<0>(s);
        finish_scores.template operator()<kMasked, kFirst>(n, last);
        if constexpr (kFirst) {
          first_maximum(s, state);
          begin_results(n);
        } else if (raise_maximum(s, state, rescale, factor, [] {})) {
          scale_rows(o, rescale);
        }
        weigh<kGuard, 0, kHalf>(s, state, factor);
        pack<kDType, 0, kHalf>(probs, s);
        v_ring.wait_full();
        const ColsOperand<typename Storage::V> v(v_tile());
        issue_gemm<kDType, true, 0, kHalf>(o, probs, v);
        weigh<kGuard, kHalf, kC.block_kv>(s, state, factor);
        ptx::compute_now(state.sum[0] + state.sum[1]);  // beside P V
        pack<kDType, kHalf, kC.block_kv>(probs, s);
        issue_gemm<kDType, true, kHalf, kC.block_kv>(o, probs, v);
        wait_gemm<0>(o);
        release(v_ring);
      };
      auto step = [&]<bool kMasked, bool kFirst>(int32 n, bool last) {
        if constexpr (kPvLags)
          lagging_step.template operator()<kMasked, kFirst>(n, last);
        else
          halved_step.template operator()<kMasked, kFirst>(n, last);
      };
      int32 next = keys.below(n);
      step.template operator()<true, true>(n, !keys.exists(next));
      // Blocks that the mask shows whole have a loop of their own, without a branch to the other step.
      while (keys.exists(n = next)) {
        if (keys.is_full(n)) {
          do {
            next = keys.below(n);
            step.template operator()<false, false>(n, !keys.exists(next));
          } while (keys.is_full_below(n = next));
        } else {
          next = keys.below(n);
          step.template operator()<true, false>(n, !keys.exists(next));
        }
      }
      if constexpr (!kPvLags) {
        write_results(state);
        __syncwarp();  // as above
      }
    };
    if constexpr (kPvLags && ptx::kAccumulatorsMustBeDefined) o.clear();  // others spill more for it
    for_each_unit(shared, base, attend);
  }

  // Zeros the rows of V that lie behind the keys in use: their weights are 0, which NaN would turn into NaN. The copy
  // engine has done so behind the end of the tensor. Each warpgroup does it for itself.
  static __forceinline__ void hide_rows_behind(const HopperFwdProblem& p, const Sequence& seq, uint32 tile,
                                               const typename Storage::KvRing& v_ring, int32 n, int32 warpgroup,
                                               int32 thread) {
    const int32 used = seq.kv.used - n * kC.block_kv;
    if (used >= kC.block_kv || !(p.kv_lens.data || p.cu_seqlens_kv.data)) return;
    v_ring.wait_full();
    zero_rows<typename Storage::V>(tile, used, kC.block_kv, thread, 128);
    ptx::fence_proxy_async();
    __syncwarp();
    ptx::barrier_sync(kWarpgroup + warpgroup, 128);
  }
};

// Zeros the counter of units. The thread blocks of the kernel come beside it, which they would not beside a memset.
template <KernelConfig kC>
__forceinline__ void fwd_prepare(const FwdProblem& p) {
  ptx::let_next_grid_start();
  if (threadIdx.x == 0) *static_cast<int32*>(p.next_unit.data) = 0;
}

template <KernelConfig kC>
__forceinline__ void fwd(const HopperFwdProblem& p) {
  extern __shared__ __align__(1024) char shared[];
  Fwd<kC>::run(p, shared);
}

}  // namespace flash::sm90
