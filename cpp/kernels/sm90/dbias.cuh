// The gradient of the bias for Hopper, where tiles of the bias may be copied. docs/hopper_backward.md says why it looks
// as it does.
//
// A thread block has block_q queries and block_kv keys of one head of the bias, and goes through all batch entries and
// heads that share it. One warp copies the tile of the bias, which they all share, and pairs of tiles into a ring: K
// and Q of a sharer, then its V and dO. Two warpgroups compute, with 64 keys each and all queries: S^T and dP^T again,
// as in the backward kernel, and the sums of dS^T in registers. There are no atomic additions, and each element is
// written once, the sum of always the same order.
#pragma once

#include "common/config.h"
#include "common/problem.h"
#include "kernels/ptx/compiler.cuh"
#include "kernels/ptx/tma.cuh"
#include "kernels/ptx/warpgroup.cuh"
#include "kernels/tile/bias_gradient.cuh"
#include "kernels/tile/gradient.cuh"
#include "kernels/tile/pipeline.cuh"
#include "kernels/tile/scores.cuh"
#include "kernels/tile/sequence.cuh"
#include "kernels/tile/warpgroup_gemm.cuh"

namespace flash::sm90 {

template <KernelConfig kC>
struct DbiasStorage {
  using K = Tile<kC.block_kv, kC.head_dim>;
  using V = Tile<kC.block_kv, kC.head_dim_v>;
  using Q = Tile<kC.block_q, kC.head_dim>;
  using O = Tile<kC.block_q, kC.head_dim_v>;
  using Bias = BiasTile<kC>;
  using Pairs = Ring<kC.num_stages>;
  // Offsets in bytes. lse and delta of all queries lie one behind the other, once for each warpgroup.
  static constexpr int32 kPairs = 0, kPairBytes = max_of(K::kBytes + Q::kBytes, V::kBytes + O::kBytes);
  static constexpr int32 kBias = kPairs + kC.num_stages * kPairBytes;
  static constexpr int32 kStatistics = kBias + Bias::kBytes, kStatisticsBytes = 8 * kC.block_q;
  static constexpr int32 kPairBarriers = kStatistics + 2 * kStatisticsBytes;
  static_assert(Pairs::kBytes <= kBarrierBytes);
  static_assert(kPairBarriers + kBarrierBytes == shared_bytes(kC));
  // At last the sums come to where pairs and bias were.
  static_assert(BiasGradientWriter<kC>::kBytes <= kStatistics);
};

// Of all that compute, and of each warpgroup.
enum DbiasBarrier : int32 { kSums = 1, kOwnWarpgroup = 2 };

template <KernelConfig kC>
struct Dbias {
  using Storage = DbiasStorage<kC>;
  static constexpr int32 kBatchAxes = kC.num_batch_axes;
  static constexpr int32 kComputingThreads = 256;
  static constexpr DType kDType = kC.dtype;
  // Registers per thread of the copying warpgroup and of the others.
  static constexpr int32 kCopyingRegisters = 24, kComputingRegisters = 240;
  static_assert(128 * kCopyingRegisters + kComputingThreads * kComputingRegisters <=
                registers_at_start(kC) * num_threads(kC));
  static_assert(kC.num_warps == 8 && kC.block_q == 128 && kC.block_kv == 128 && kC.bias_tiled);

  const HopperDbiasProblem& p;
  char* shared;
  uint32 base;  // of `shared`
  BiasBlock<kC> block;

  __forceinline__ void run() const {
    uint32 first = 0;
    block.find(first);
    if (first == block.num_sharers) {  // as in almost half of the blocks of a causal mask
      if (threadIdx.x < kComputingThreads) BiasGradientWriter<kC>(block, shared, int32(threadIdx.x)).write_zeros();
      return;
    }
    if (threadIdx.x == 0) {
      Storage::Pairs::init(base + Storage::kPairBarriers, kC.num_warps);
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
      ptx::setmaxnreg_dec<kCopyingRegisters>();
      if (threadIdx.x < 32) copy();
    } else {
      ptx::setmaxnreg_inc<kComputingRegisters>();
      compute();
    }
  }

  // The copying warp. Its first lane does all that touches memory.
  __forceinline__ void copy() const {
    typename Storage::Pairs pairs(base + Storage::kPairBarriers);
    // A tile of keys and one of queries, of one head dim.
    auto load_pair = [&]<class Keys, class Queries>(const Sharer& s, const View& keys, const TensorMap& keys_map,
                                                    const View& queries, const TensorMap& queries_map, bool with_bias) {
      if (threadIdx.x == 0) {
        const int32 kv_head = s.head / int32(p.num_heads / p.num_heads_kv);
        const uint32 tile = base + Storage::kPairs + pairs.stage() * Storage::kPairBytes;
        auto coordinate = [&](const View& view) { return view.batch_stride[0] ? int32(s.seq.batch) : 0; };
        pairs.wait_empty();
        ptx::mbarrier_arrive_expect_tx(pairs.full(),
                                       Keys::kBytes + Queries::kBytes + (with_bias ? Storage::Bias::kBytes : 0));
        load_panels<Keys>(tile, pairs.full(), keys_map, block.kv_row, kv_head, coordinate(keys));
        load_panels<Queries>(tile + Keys::kBytes, pairs.full(), queries_map, block.q_row, s.head, coordinate(queries));
        if (with_bias)
          load_panels<typename Storage::Bias>(base + Storage::kBias, pairs.full(), p.bias_map, block.q_row,
                                              int32(block.head), int32(block.entry), block.kv_row);
      }
      pairs.advance();
    };
    uint32 index = 0;
    bool is_first = true;
#pragma unroll 1
    for (Sharer s = block.find(index); index < block.num_sharers; s = block.find(++index)) {
      load_pair.template operator()<typename Storage::K, typename Storage::Q>(s, p.k, p.k_map, p.q, p.q_map, false);
      // The bias is first needed when S^T is there.
      load_pair.template operator()<typename Storage::V, typename Storage::O>(s, p.v, p.v_map, p.d_o, p.d_o_map,
                                                                              is_first);
      is_first = false;
    }
  }

  using Sums = Accumulator<16, kC.block_q>;

  // A warp that computes.
  __forceinline__ void compute() const {
    const int32 thread = int32(threadIdx.x) - 128, warpgroup = uniform(thread / 128), warp_key = thread / 32 * 16;
    typename Storage::Pairs pairs(base + Storage::kPairBarriers);
    Sums sums;
    sums.clear();
    uint32 index = 0;
    Sharer now = block.find(index);
    store(statistics_of(now, thread % 128), warpgroup, thread % 128);
#pragma unroll 1
    while (index < block.num_sharers) {
      const Sharer next = block.find(++index);
      const Statistics ahead = statistics_of(next, thread % 128);
      add(now, warpgroup, warp_key, pairs, sums);
      store(ahead, warpgroup, thread % 128);
      now = next;
    }
    auto sync = [] { ptx::barrier_sync(kSums, kComputingThreads); };
    sync();  // all are done with the memory that now takes the sums
    BiasGradientWriter<kC>(block, shared, thread).write(sums, warp_key, 0, sync);
  }

  // What a thread of each computing warpgroup brings of a sharer, for one of the queries.
  struct Statistics {
    float lse, delta;
  };

  // Of what follows the last sharer nobody needs them, but they can be read.
  __forceinline__ Statistics statistics_of(const Sharer& s, int32 query) const {
    const int32 row = block.q_row + query;
    if (row >= s.seq.q.used) return {-kInfinity, 0.0f};
    return {address_of<const float, kBatchAxes>(p, p.lse, s.seq.batch, s.head, 0)[row],
            address_of<const float, kBatchAxes>(p, p.delta, s.seq.batch, s.head, 0)[row]};
  }

  // Where the warpgroup's lse of the block's queries lie, and behind them delta.
  __forceinline__ float* statistics_at(int32 warpgroup) const {
    return reinterpret_cast<float*>(shared + Storage::kStatistics + warpgroup * Storage::kStatisticsBytes);
  }

  // Puts them in place of those of the sharer before.
  __forceinline__ void store(const Statistics& x, int32 warpgroup, int32 query) const {
    float* target = statistics_at(warpgroup) + query;
    ptx::barrier_sync(kOwnWarpgroup + warpgroup, 128);  // all have read those
    target[0] = lse_in_log2(x.lse);
    target[kC.block_q] = x.delta;
    ptx::barrier_sync(kOwnWarpgroup + warpgroup, 128);
  }

  // Lest the compiler moves the exponentials behind dP^T. Weights are never negative, nor is what has all their bits.
  static __forceinline__ void compute_now(const Sums& weights) {
    uint32 bits = 0;
#pragma unroll
    for (int32 n = 0; n < kC.block_q / 8; ++n)
#pragma unroll
      for (int32 e = 0; e < 4; ++e) bits |= __builtin_bit_cast(uint32, weights.x[0][n][e]);
    ptx::compute_now(__builtin_bit_cast(float, bits));
  }

  // Adds a sharer's dS^T.
  __forceinline__ void add(const Sharer& s, int32 warpgroup, int32 warp_key, typename Storage::Pairs& pairs,
                           Sums& sums) const {
    using K = typename Storage::K;
    using V = typename Storage::V;
    using Q = typename Storage::Q;
    using O = typename Storage::O;
    const int32 lane = threadIdx.x % 32;
    const ScoreInputs<kC> in(p, s.seq, s.head);
    auto tile_of = [&](const typename Storage::Pairs& pair) {
      return base + Storage::kPairs + pair.stage() * Storage::kPairBytes;
    };
    auto release = [&](const typename Storage::Pairs& pair) {
      if (lane == 0) pair.release();
    };
    const typename Storage::Pairs k_and_q = pairs;
    pairs.advance();
    const typename Storage::Pairs v_and_do = pairs;
    pairs.advance();

    Sums scores, ds;
    k_and_q.wait_full();
    issue_gemm<kDType, kC.head_dim, false>(scores, RowsOperand<K>(tile_of(k_and_q), 64 * warpgroup),
                                           RowsOperand<Q>(tile_of(k_and_q) + K::kBytes));
    v_and_do.wait_full();
    issue_gemm<kDType, kC.head_dim_v, false>(ds, RowsOperand<V>(tile_of(v_and_do), 64 * warpgroup),
                                             RowsOperand<O>(tile_of(v_and_do) + V::kBytes));
    TileGradient<kC, 16, kC.block_q> gradient;
    const float* statistics = statistics_at(warpgroup);
    auto pair_of = [&](int32 first, int32 n) {
      return *reinterpret_cast<const float2*>(statistics + first + 8 * n + lane % 4 * 2);
    };
    wait_gemm<1>(scores);
    release(k_and_q);
    gradient.weights(
        scores, p, in, s.kind != BlockKind::kFull, block.kv_row + warp_key, block.q_row,
        ColsOfA<typename Storage::Bias>{{base, Storage::kBias, 0, warp_key}}, [&](int32 n) { return pair_of(0, n); },
        score_factor<kC>(p));
    compute_now(scores);  // beside dP^T
    wait_gemm<0>(ds);
    release(v_and_do);
    gradient.capped_scores(ds, scores, p, [&](int32 n) { return pair_of(kC.block_q, n); });
#pragma unroll
    for (int32 n = 0; n < kC.block_q / 8; ++n)
#pragma unroll
      for (int32 e = 0; e < 4; ++e) {
        // What stands behind a length, or in a query that sees no key, may be NaN also when multiplied by a weight of
        // 0.
        sums.x[0][n][e] += scores.x[0][n][e] != 0.0f ? ds.x[0][n][e] : 0.0f;
      }
  }
};

template <KernelConfig kC>
__forceinline__ void dbias(const HopperDbiasProblem& p) {
  extern __shared__ __align__(1024) char shared[];
  Dbias<kC>{p, shared, ptx::shared_address(shared), BiasBlock<kC>(p)}.run();
}

}  // namespace flash::sm90
