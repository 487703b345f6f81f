// Attention forward with mma.sync and cp.async: every GPU from Ampere on. FlashAttention-2 (Dao, 2023, arXiv
// 2307.08691).
//
// A thread block has block_q queries of one head; each warp owns 16 or 32 of them, all their scores and their part of
// O. Keys and values come in blocks of block_kv, from the last to the first. V's copy runs beside Q K^T, the next K's
// beside softmax and P V.
#pragma once

#include "common/config.h"
#include "common/problem.h"
#include "kernels/tile/copy.cuh"
#include "kernels/tile/scores.cuh"
#include "kernels/tile/segments.cuh"
#include "kernels/tile/sequence.cuh"
#include "kernels/tile/softmax.cuh"

namespace flash::sm80 {

template <KernelConfig kC>
struct FwdStorage {
  using Q = Tile<kC.block_q, kC.head_dim>;
  using K = Tile<kC.block_kv, kC.head_dim>;
  using V = Tile<kC.block_kv, kC.head_dim_v>;
  using O = Tile<kC.block_q, kC.head_dim_v>;
  // Offsets in bytes. O on its way out takes Q's place.
  static constexpr int32 kQ = 0, kK = max_of(Q::kBytes, O::kBytes), kV = kK + K::kBytes, kBias = kV + V::kBytes;
  static constexpr int32 kEnd = kBias + (kC.bias_tiled ? BiasTile<kC>::kBytes : 0);
  static_assert(kEnd == shared_bytes(kC));
};

template <KernelConfig kC>
struct FwdBlock {
  static constexpr int32 kThreads = num_threads(kC);
  static constexpr int32 kRowsPerWarp = kC.block_q / kC.num_warps;
  static constexpr int32 kBatchAxes = kC.num_batch_axes;
  static constexpr DType kDType = kC.dtype;
  using Storage = FwdStorage<kC>;
  static_assert(kRowsPerWarp == 16 || kRowsPerWarp == 32);

  // One block of queries, from row `q_row` of the sequence on.
  static __forceinline__ void run(const FwdProblem& p, char* shared, const Sequence& seq, int64 head, int32 q_row) {
    const uint32 base = ptx::shared_address(shared);
    const int32 head_dim = int32(p.head_dim), head_dim_v = int32(p.head_dim_v);
    const int32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_row = warp * kRowsPerWarp;
    const int32 rows = min_of(kC.block_q, seq.q.used - q_row);  // that take part

    const int64 o_row = seq.q.begin + q_row;
    uint16* o_rows = address_of<uint16, kBatchAxes>(p, p.o, seq.batch, head, o_row);
    float* lse_rows = address_of<float, kBatchAxes>(p, p.lse, seq.batch, head, o_row);
    const int32 slot_rows = min_of(kC.block_q, seq.q.size - q_row);  // that must be written
    if (rows < slot_rows) {
      store_zeros<kThreads>(threadIdx.x, o_rows, p.o.row_stride, max_of(rows, 0), slot_rows, head_dim_v);
      for (int32 r = max_of(rows, 0) + threadIdx.x; r < slot_rows; r += kThreads) lse_rows[r] = -kInfinity;
    }
    if (rows <= 0) return;

    const ScoreInputs<kC> in(p, seq, head);
    const int64 kv_head = head / (p.num_heads / p.num_heads_kv);
    auto rows_of = [&](const View& view) {
      if constexpr (kC.paged)
        return PagedRows{address_of<const uint16, kBatchAxes>(p, view, seq.batch, kv_head, 0),
                         address_of<const int32, kBatchAxes>(p, p.page_table, seq.batch, 0, seq.index),
                         int32(p.page_size),
                         int32(p.num_pages),
                         max_of(seq.kv.used - 1, 0),
                         view.row_stride};
      else
        return StridedRows{address_of<const uint16, kBatchAxes>(p, view, seq.batch, kv_head, seq.kv.begin),
                           view.row_stride};
    };
    const auto k_rows = rows_of(p.k);
    const auto v_rows = rows_of(p.v);
    auto load_k = [&](int32 n) {
      load_tile<typename Storage::K, kC.aligned, kC.exact, kThreads>(base + Storage::kK, k_rows, n * kC.block_kv,
                                                                     seq.kv.used, head_dim);
      if constexpr (kC.bias_tiled)
        load_bias<kC>(p, reinterpret_cast<const uint16*>(in.bias), base + Storage::kBias, q_row, n * kC.block_kv);
      ptx::cp_async_commit();
    };
    auto load_v = [&](int32 n) {
      load_tile<typename Storage::V, kC.aligned, kC.exact, kThreads>(base + Storage::kV, v_rows, n * kC.block_kv,
                                                                     seq.kv.used, head_dim_v);
      ptx::cp_async_commit();
    };

    const StridedRows q_rows = {address_of<const uint16, kBatchAxes>(p, p.q, seq.batch, head, seq.q.begin),
                                p.q.row_stride};
    load_tile<typename Storage::Q, kC.aligned, kC.exact, kThreads>(base + Storage::kQ, q_rows, q_row, seq.q.used,
                                                                   head_dim);
    ptx::cp_async_commit();

    KeyBlocks<kC> keys(in, seq, q_row, rows);
    int32 n = keys.last();
    if (keys.exists(n)) load_k(n);

    const RowsOfA<typename Storage::Q> q{{base, Storage::kQ, warp_row}};
    const RowsOfB<typename Storage::K> k{{base, Storage::kK, 0}};
    const ColsOfB<typename Storage::V> v{{base, Storage::kV, 0}};
    const RowsOfA<BiasTile<kC>> bias{{base, Storage::kBias, warp_row}};
    const float factor = score_factor<kC>(p);
    Accumulator<kRowsPerWarp, kC.head_dim_v> o;
    SoftmaxState<kRowsPerWarp / 8> state;
    o.clear();
#pragma unroll
    for (int32 r = 0; r < kRowsPerWarp / 8; ++r) state.max[r] = -kInfinity, state.sum[r] = 0.0f;

    auto scores = [&]<bool kMasked>(Accumulator<kRowsPerWarp, kC.block_kv>& s, int32 n) {
      if constexpr (kMasked || kScoresInLog2<kC> || kDataMasks<kC>)
        apply_scores<kC, false, kMasked>(s, p, in, q_row + warp_row, n * kC.block_kv, bias,
                                         [](int32, int32, int32, float) {});
    };
    auto step = [&]<bool kMasked>(int32 n, int32 next) {
      ptx::cp_async_wait<0>();  // K of this block
      __syncthreads();          // is there for all, and all are done with V of the last one
      load_v(n);
      Accumulator<kRowsPerWarp, kC.block_kv> s;
      s.clear();
      gemm<kDType, kC.head_dim>(s, q, k);
      scores.template operator()<kMasked>(s, n);
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (keys.exists(next)) load_k(next);
      constexpr bool kGuard = kMasked || kDataMasks<kC>;
      float rescale[kRowsPerWarp / 8];
      if (online_softmax<kGuard>(s, state, rescale, factor)) scale_rows(o, rescale);
      if constexpr (kC.dropout)
        for_each_dropout_bit<false, kRowsPerWarp, kC.block_kv>(
            in.dropout, p.options.keep_threshold, q_row + warp_row, n * kC.block_kv,
            [&](int32 m, int32 n, int32 e, bool keep) { s.x[m][n][e] = keep ? s.x[m][n][e] : 0.0f; });
      uint32 probs[kRowsPerWarp / 16][kC.block_kv / 16][4];
      pack<kDType>(probs, s);
      gemm<kDType, kC.block_kv>(o, RegistersOfA<kRowsPerWarp, kC.block_kv>{probs}, v);
    };
    while (keys.exists(n)) {
      const int32 next = keys.below(n);
      if (keys.is_full(n))
        step.template operator()<false>(n, next);
      else
        step.template operator()<true>(n, next);
      n = next;
    }

    // Epilogue: o / sum, and lse = max + log(sum), both with the sink in the sum if there is one.
    ptx::cp_async_wait<0>();
    __syncthreads();  // all are done with Q's memory
    const float* head_sinks = address_of<const float, kBatchAxes>(p, p.sinks, seq.batch, head, q_row);
    float sinks[kRowsPerWarp / 8];
#pragma unroll
    for (int32 r = 0; r < kRowsPerWarp / 8; ++r)
      sinks[r] = sink_of(p, head_sinks, min_of(warp_row + 8 * r + lane / 4, rows - 1));
    float normalizer[kRowsPerWarp / 8], lse[kRowsPerWarp / 8];
    finish_softmax<kRowsPerWarp, kC.head_dim_v>(state, o, factor, sinks, normalizer, lse);
    const float dropout_scale = 256.0f / float(p.options.keep_threshold);
#pragma unroll
    for (int32 r = 0; r < kRowsPerWarp / 8; ++r) {
      const int32 row = warp_row + 8 * r + lane / 4;
      if (lane % 4 == 0 && row < rows) lse_rows[row] = lse[r] * kLn2;
    }
    TileWriter<typename Storage::O>(base, Storage::kQ, warp_row).template store<kDType>(o, [&](int32 m, int32 h) {
      return normalizer[2 * m + h] * dropout_scale;
    });
    __syncthreads();
    store_tile<typename Storage::O, kC.aligned, kThreads>(shared + Storage::kQ, o_rows, p.o.row_stride, rows,
                                                          head_dim_v);

    if constexpr (kC.return_softmax) {  // a testing aid: a second pass, as only now the sums are known
      __syncthreads();
      load_tile<typename Storage::Q, kC.aligned, kC.exact, kThreads>(base + Storage::kQ, q_rows, q_row, seq.q.used,
                                                                     head_dim);
      ptx::cp_async_commit();
      for (int32 n = keys.last(); keys.exists(n); n = keys.below(n)) {
        __syncthreads();
        load_k(n);
        ptx::cp_async_wait<0>();
        __syncthreads();
        Accumulator<kRowsPerWarp, kC.block_kv> s;
        s.clear();
        gemm<kDType, kC.head_dim>(s, q, k);
        scores.template operator()<true>(s, n);
        float* probs =
            address_of<float, kBatchAxes>(p, p.probs, seq.batch, head, 0) + seq.index * p.probs_sequence_stride;
        auto write = [&](int32 m, int32 t, int32 e, bool keep) {
          const int32 i = q_row + warp_row + 16 * m + e / 2 * 8 + lane / 4;
          const int32 j = n * kC.block_kv + 8 * t + lane % 4 * 2 + e % 2;
          const float x = s.x[m][t][e];
          if (x == -kInfinity || i >= min_of(seq.q.used, int32(p.probs_rows)) || j >= p.probs_cols) return;
          const float probability = ptx::ex2_approx(x * factor - lse[2 * m + e / 2]);
          probs[i * p.probs.row_stride + j] = keep ? probability : -probability;
        };
        if constexpr (kC.dropout) {
          for_each_dropout_bit<false, kRowsPerWarp, kC.block_kv>(in.dropout, p.options.keep_threshold, q_row + warp_row,
                                                                 n * kC.block_kv, write);
        } else {
#pragma unroll
          for (int32 m = 0; m < kRowsPerWarp / 16; ++m)
#pragma unroll
            for (int32 t = 0; t < kC.block_kv / 8; ++t)
#pragma unroll
              for (int32 e = 0; e < 4; ++e) write(m, t, e, true);
        }
      }
    }
  }
};

template <KernelConfig kC>
__forceinline__ void fwd(const FwdProblem& p) {
  extern __shared__ __align__(1024) char shared[];
  constexpr int32 kAxes = kC.num_batch_axes;
  for_each_block<kAxes, Side::kQueries, kC.block_q, num_threads(kC), true>(
      p, [&](const Sequence& s, int32 head, int32 row) { FwdBlock<kC>::run(p, shared, s, head, row); },
      [&](int64 batch, int64 row) { define_stray<kAxes>(p, batch, row); });
}

}  // namespace flash::sm80
