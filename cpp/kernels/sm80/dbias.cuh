// The gradient of the bias with mma.sync and cp.async: every GPU from Ampere on.
//
// A thread block has block_q queries and block_kv keys of one head of the bias, and goes through all batch entries and
// heads that share it. Scores are formed again as in the backward kernel, transposed, and dS^T is summed in registers:
// there are no atomic additions, and each element is written once, the sum of always the same order. Where the bias
// has one row for all queries, or one column for all keys, the block sums over kBiasBlock of them before it writes.
#pragma once

#include "common/config.h"
#include "common/problem.h"
#include "kernels/tile/bias_gradient.cuh"
#include "kernels/tile/copy.cuh"
#include "kernels/tile/gradient.cuh"
#include "kernels/tile/scores.cuh"
#include "kernels/tile/sequence.cuh"

namespace flash::sm80 {

template <KernelConfig kC>
struct DbiasStorage {
  using K = Tile<kC.block_kv, kC.head_dim>;
  using V = Tile<kC.block_kv, kC.head_dim_v>;
  using Q = Tile<kC.block_q, kC.head_dim>;
  using O = Tile<kC.block_q, kC.head_dim_v>;
  // Offsets in bytes. With one stage v and dO come to where k and q were.
  static constexpr int32 kK = 0, kQ = kK + K::kBytes, kV = kC.num_stages > 1 ? kQ + Q::kBytes : 0, kDo = kV + V::kBytes;
  static constexpr int32 kLse = max_of(kQ + Q::kBytes, kDo + O::kBytes), kDelta = kLse + 4 * kC.block_q;
  static constexpr int32 kBias = kDelta + 4 * kC.block_q;
  // At last the sums, in place of everything.
  static constexpr int32 kEnd =
      max_of(kBias + (kC.bias_tiled ? BiasTile<kC>::kBytes : 0), BiasGradientWriter<kC>::kBytes);
  static_assert(kEnd == shared_bytes(kC));
};

template <KernelConfig kC>
struct Dbias {
  static constexpr int32 kThreads = num_threads(kC);
  static constexpr int32 kBatchAxes = kC.num_batch_axes;
  static constexpr DType kDType = kC.dtype;
  // Rows of warps, of keys, and warps side by side, of queries.
  static constexpr int32 kWarpsQ = kC.warps_d, kWarpsKv = kC.num_warps / kWarpsQ;
  static constexpr int32 kKeys = kC.block_kv / kWarpsKv, kQueries = kC.block_q / kWarpsQ;
  using Storage = DbiasStorage<kC>;
  using Sums = Accumulator<kKeys, kQueries>;

  const DbiasProblem& p;
  char* shared;
  uint32 base;  // of `shared`
  BiasBlock<kC> block;
  int32 warp_key, warp_query;  // where in the block the warp's part starts

  // Starts the copies of a tile of keys and of one of queries, of one head dim.
  template <class Keys, class Queries>
  __forceinline__ void load_pair(const Sharer& s, const View& keys, int32 keys_tile, const View& queries,
                                 int32 queries_tile, int64 dim) const {
    const int64 kv_head = s.head / int32(p.num_heads / p.num_heads_kv);
    const StridedRows k = {address_of<const uint16, kBatchAxes>(p, keys, s.seq.batch, kv_head, 0), keys.row_stride};
    const StridedRows q = {address_of<const uint16, kBatchAxes>(p, queries, s.seq.batch, s.head, 0),
                           queries.row_stride};
    load_tile<Keys, kC.aligned, kC.exact, kThreads>(base + keys_tile, k, block.kv_row, s.seq.kv.used, int32(dim));
    load_tile<Queries, kC.aligned, kC.exact, kThreads>(base + queries_tile, q, block.q_row, s.seq.q.used, int32(dim));
  }

  __forceinline__ void load_k_and_q(const Sharer& s) const {
    load_pair<typename Storage::K, typename Storage::Q>(s, p.k, Storage::kK, p.q, Storage::kQ, p.head_dim);
    ptx::cp_async_commit();
  }

  // With lse and delta.
  __forceinline__ void load_v_and_do(const Sharer& s) const {
    load_pair<typename Storage::V, typename Storage::O>(s, p.v, Storage::kV, p.d_o, Storage::kDo, p.head_dim_v);
    if (threadIdx.x < kC.block_q) {
      const int64 row = block.q_row + int32(threadIdx.x);
      const int32 bytes = row < s.seq.q.used ? 4 : 0;
      const uint32 target = base + 4 * threadIdx.x;
      ptx::cp_async_4(target + Storage::kLse,
                      address_of<const float, kBatchAxes>(p, p.lse, s.seq.batch, s.head, 0) + row, bytes);
      ptx::cp_async_4(target + Storage::kDelta,
                      address_of<const float, kBatchAxes>(p, p.delta, s.seq.batch, s.head, 0) + row, bytes);
    }
    ptx::cp_async_commit();
  }

  // The pair of columns 8 n + 2 (lane % 4) of the warp's part of lse or delta.
  __forceinline__ float2 pair_of(int32 statistics, int32 n) const {
    return *reinterpret_cast<const float2*>(shared + statistics +
                                            4 * (warp_query + 8 * n + int32(threadIdx.x % 4) * 2));
  }

  // Adds a sharer's dS^T, of which k and q are on their way, and starts to load those of the next one.
  // kMasked: the positional mask cuts this block.
  template <bool kMasked>
  __forceinline__ void add(Sums& sums, const Sharer& now, bool has_next, const Sharer& next) const {
    using K = typename Storage::K;
    using V = typename Storage::V;
    using Q = typename Storage::Q;
    using O = typename Storage::O;
    const ScoreInputs<kC> in(p, now.seq, now.head);
    ptx::cp_async_wait<0>();
    __syncthreads();  // k and q are there for all, and all are done with the last v and dO
    if constexpr (kC.num_stages > 1) load_v_and_do(now);
    Sums s, ds;
    s.clear();
    ds.clear();
    gemm<kDType, kC.head_dim>(s, RowsOfA<K>{{base, Storage::kK, warp_key}},
                              RowsOfB<Q>{{base, Storage::kQ, warp_query}});
    if constexpr (kC.num_stages == 1) {
      __syncthreads();
      load_v_and_do(now);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // v and dO are there for all, and all are done with k and q
    if (kC.num_stages > 1 && has_next) load_k_and_q(next);
    TileGradient<kC, kKeys, kQueries> gradient;
    const ColsOfA<BiasTile<kC>> bias{{base, Storage::kBias, warp_query, warp_key}};
    auto lse = [&](int32 n) {
      const float2 pair = pair_of(Storage::kLse, n);
      return float2{lse_in_log2(pair.x), lse_in_log2(pair.y)};
    };
    gradient.weights(s, p, in, kMasked, block.kv_row + warp_key, block.q_row + warp_query, bias, lse,
                     score_factor<kC>(p));
    gemm<kDType, kC.head_dim_v>(ds, RowsOfA<V>{{base, Storage::kV, warp_key}},
                                RowsOfB<O>{{base, Storage::kDo, warp_query}});
    gradient.capped_scores(ds, s, p, [&](int32 n) { return pair_of(Storage::kDelta, n); });
#pragma unroll
    for (int32 n = 0; n < kQueries / 8; ++n) {
      // Queries that see no key have no gradient, and what stands there may be NaN.
      const float2 lse = pair_of(Storage::kLse, n);
      const bool sees[2] = {lse.x != -kInfinity, lse.y != -kInfinity};
#pragma unroll
      for (int32 m = 0; m < kKeys / 16; ++m)
#pragma unroll
        for (int32 e = 0; e < 4; ++e) sums.x[m][n][e] += sees[e % 2] ? ds.x[m][n][e] : 0.0f;
    }
    if constexpr (kC.num_stages == 1) {
      __syncthreads();  // all are done with v and dO
      if (has_next) load_k_and_q(next);
    }
  }

  __forceinline__ void run() const {
    Sums sums;
    sums.clear();
    uint32 index = 0;
    Sharer now = block.find(index);
    if (index < block.num_sharers) {
      if constexpr (kC.bias_tiled)
        load_bias<kC>(p, reinterpret_cast<const uint16*>(ScoreInputs<kC>(p, now.seq, now.head).bias),
                      base + Storage::kBias, block.q_row, block.kv_row);
      load_k_and_q(now);
    }
    while (index < block.num_sharers) {
      const Sharer next = block.find(++index);
      if (now.kind == BlockKind::kFull)
        add<false>(sums, now, index < block.num_sharers, next);
      else
        add<true>(sums, now, index < block.num_sharers, next);
      now = next;
    }
    __syncthreads();  // all are done with the memory that now takes the sums
    BiasGradientWriter<kC>(block, shared, threadIdx.x).write(sums, warp_key, warp_query, [] { __syncthreads(); });
  }
};

template <KernelConfig kC>
__forceinline__ void dbias(const DbiasProblem& p) {
  extern __shared__ __align__(1024) char shared[];
  using Kernel = Dbias<kC>;
  const int32 warp = threadIdx.x / 32;
  Kernel{p,
         shared,
         ptx::shared_address(shared),
         BiasBlock<kC>(p),
         warp / Kernel::kWarpsQ * Kernel::kKeys,
         warp % Kernel::kWarpsQ * Kernel::kQueries}
      .run();
}

}  // namespace flash::sm80
