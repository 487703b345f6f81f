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
  static constexpr int32 kScoreTiles = kC.warps_d > 1 ? 2 : 1;
  char k[K::kBytes];
  char v[V::kBytes];
  char q[kC.num_stages][Q::kBytes];
  char d_o[kC.num_stages][O::kBytes];
  char scores[kScoreTiles][S::kBytes];  // dS^T, then P^T
  float lse[kC.num_stages][kC.block_q];
  float delta[kC.num_stages][kC.block_q];
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
  static_assert(sizeof(Storage) == shared_bytes(kC));
  static_assert(kKeys == 16 || kKeys == 32);
  static_assert(kC.head_dim % (16 * kWarpsCols) == 0 && kC.head_dim % (16 * kWarpsD) == 0);

  static __forceinline__ void run(const BwdProblem& p, char* shared, const Sequence& seq, int64 kv_head, int32 kv_row) {
    Storage& storage = *reinterpret_cast<Storage*>(shared);
    const int32 head_dim = int32(p.head_dim), head_dim_v = int32(p.head_dim_v);
    const int32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
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

    // Blocks of queries [first, end) of each head of the group, one head after the other.
    const MaskRule rule = mask_rule_of(p, seq);
    const Range any = {visible_rows(rule, kv_row).begin, visible_rows(rule, kv_row + keys - 1).end};
    const int32 first = any.begin / kC.block_q, end = any.begin < any.end ? (any.end - 1) / kC.block_q + 1 : first;
    const int32 blocks = end - first, steps = blocks * group;

    const uint32 k_tile = ptx::shared_address(storage.k), v_tile = ptx::shared_address(storage.v);
    const uint32 ds_tile = ptx::shared_address(storage.scores[0]);
    const uint32 p_tile = ptx::shared_address(storage.scores[Storage::kScoreTiles - 1]);
    auto q_tile = [&](int32 stage) { return ptx::shared_address(storage.q[stage]); };
    auto do_tile = [&](int32 stage) { return ptx::shared_address(storage.d_o[stage]); };
    auto load_queries = [&](int32 step) {
      const int32 stage = step % kC.num_stages, row = (first + step % blocks) * kC.block_q;
      const int64 head = kv_head * group + step / blocks;
      load_tile<typename Storage::Q, kC.aligned, kThreads>(
          q_tile(stage),
          StridedRows{address_of<const uint16, kBatchAxes>(p, p.q, seq.batch, head, seq.q.begin), p.q.row_stride}, row,
          seq.q.used, head_dim);
      load_tile<typename Storage::O, kC.aligned, kThreads>(
          do_tile(stage),
          StridedRows{address_of<const uint16, kBatchAxes>(p, p.d_o, seq.batch, head, seq.q.begin), p.d_o.row_stride},
          row, seq.q.used, head_dim_v);
      for (int32 r = threadIdx.x; r < kC.block_q; r += kThreads) {
        const int32 bytes = row + r < seq.q.used ? 4 : 0;
        const int64 at = seq.q.begin + row + r;
        ptx::cp_async_4(ptx::shared_address(&storage.lse[stage][r]),
                        address_of<const float, kBatchAxes>(p, p.lse, seq.batch, head, at), bytes);
        ptx::cp_async_4(ptx::shared_address(&storage.delta[stage][r]),
                        address_of<const float, kBatchAxes>(p, p.delta, seq.batch, head, at), bytes);
      }
      ptx::cp_async_commit();
    };

    Accumulator<kKeys, kC.head_dim / kWarpsD> dk_sum;
    Accumulator<kKeys, kC.head_dim_v / kWarpsD> dv_sum;
    dk_sum.clear();
    dv_sum.clear();

    load_tile<typename Storage::K, kC.aligned, kThreads>(
        k_tile,
        StridedRows{address_of<const uint16, kBatchAxes>(p, p.k, seq.batch, kv_head, seq.kv.begin), p.k.row_stride},
        kv_row, seq.kv.used, head_dim);
    load_tile<typename Storage::V, kC.aligned, kThreads>(
        v_tile,
        StridedRows{address_of<const uint16, kBatchAxes>(p, p.v, seq.batch, kv_head, seq.kv.begin), p.v.row_stride},
        kv_row, seq.kv.used, head_dim_v);
    ptx::cp_async_commit();
    if (steps > 0) load_queries(0);

    const RowsOfA<typename Storage::K> k_rows(k_tile, key_row);
    const RowsOfA<typename Storage::V> v_rows(v_tile, key_row);
    const ColsOfB<typename Storage::K, kWarpsCols> k_cols(k_tile, warp_col);
    constexpr int32 kDqRows = kC.block_q / kWarpsQ;
    const ColsOfA<typename Storage::S> ds_cols(ds_tile, warp_q * kDqRows);
    const float dropout_scale = 256.0f / float(p.options.keep_threshold);

    // kMasked: the mask cuts this block.
    auto body = [&]<bool kMasked>(int32 head, int32 q_row, int32 stage) {
      const ScoreInputs<kC> in(p, seq, head);
      const float factor = score_factor(in);
      Accumulator<kKeys, kQueries> s, ds;
      s.clear();
      ds.clear();
      gemm<kDType, kC.head_dim>(s, k_rows, RowsOfB<typename Storage::Q>(q_tile(stage), query_col));
      gemm<kDType, kC.head_dim_v>(ds, v_rows, RowsOfB<typename Storage::O>(do_tile(stage), query_col));

      // From S^T and dP^T to P^T (dropped, not yet rescaled) and dS^T of the uncapped scores, without the scale.
      uint32 kept[kKeys / 16][(kQueries + 63) / 64] = {};  // bit 4 n + e of the fragments m
      if constexpr (kC.dropout)
        for_each_dropout_bit<true, kKeys, kQueries>(
            in.dropout, p.options.keep_threshold, kv_row + key_row, q_row + query_col,
            [&](int32 m, int32 n, int32 e, bool keep) { kept[m][n / 8] |= uint32(keep) << (n % 8 * 4 + e); });
      [[maybe_unused]] Accumulator<kC.softcap ? kKeys : 16, kC.softcap ? kQueries : 16> cap_slope;
      if constexpr (kMasked || kScoresInLog2<kC> || kDataMasks<kC>)
        apply_scores<kC, true, kMasked>(s, p, in, kv_row + key_row, q_row + query_col,
                                        [&](int32 m, int32 n, int32 e, float y) {
                                          if constexpr (kC.softcap) cap_slope.x[m][n][e] = 1.0f - y * y;
                                        });
#pragma unroll
      for (int32 n = 0; n < kQueries / 8; ++n) {
        const int32 col = query_col + 8 * n + lane % 4 * 2;
        const float2 lse = *reinterpret_cast<const float2*>(&storage.lse[stage][col]);
        const float2 delta = *reinterpret_cast<const float2*>(&storage.delta[stage][col]);
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
      if constexpr (kC.bias) add_to_dbias(p, seq, head, ds, kv_row + key_row, q_row + query_col);
      if constexpr (kC.softcap) {
#pragma unroll
        for (int32 m = 0; m < kKeys / 16; ++m)
#pragma unroll
          for (int32 n = 0; n < kQueries / 8; ++n)
#pragma unroll
            for (int32 e = 0; e < 4; ++e) ds.x[m][n][e] *= cap_slope.x[m][n][e];
      }

      auto one = [](int32, int32) { return 1.0f; };
      store<kDType, typename Storage::S>(ds, ds_tile, key_row, query_col, 0, one);
      const ColsOfB<typename Storage::O, kWarpsD> do_cols(do_tile(stage), warp_d);
      const ColsOfB<typename Storage::Q, kWarpsD> q_cols(q_tile(stage), warp_d);
      if constexpr (kWarpsD == 1) {
        uint32 fragments[kKeys / 16][kQueries / 16][4];
        pack<kDType>(fragments, s);
        gemm<kDType, kC.block_q>(dv_sum, RegistersOfA<kKeys, kQueries>{fragments}, do_cols);
        __syncthreads();
        pack<kDType>(fragments, ds);
        gemm<kDType, kC.block_q>(dk_sum, RegistersOfA<kKeys, kQueries>{fragments}, q_cols);
      } else {
        store<kDType, typename Storage::S>(s, p_tile, key_row, query_col, 0, one);
        __syncthreads();
        gemm<kDType, kC.block_q>(dv_sum, RowsOfA<typename Storage::S>(p_tile, key_row), do_cols);
        gemm<kDType, kC.block_q>(dk_sum, RowsOfA<typename Storage::S>(ds_tile, key_row), q_cols);
      }

      Accumulator<kDqRows, kC.head_dim / kWarpsCols> dq;
      dq.clear();
      gemm<kDType, kC.block_kv>(dq, ds_cols, k_cols);
      add_to_dq(p, seq, rule, head, dq, kv_row / kC.block_kv, q_row, warp_q * kDqRows, warp_col);
    };

    for (int32 step = 0; step < steps; ++step) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // this step's queries are there for all, and all are done with the last one's
      if (kC.num_stages > 1 && step + 1 < steps) load_queries(step + 1);
      const int32 q_row = (first + step % blocks) * kC.block_q, q_end = q_row + kC.block_q;
      const int32 head = int32(kv_head) * group + step / blocks, stage = step % kC.num_stages;
      if (!kDataMasks<kC> && q_end <= rule.seqlen_q &&
          classify_block(rule, q_row, q_end, kv_row, kv_row + kC.block_kv) == BlockKind::kFull)
        body.template operator()<false>(head, q_row, stage);
      else
        body.template operator()<true>(head, q_row, stage);
      if (kC.num_stages == 1 && step + 1 < steps) {
        __syncthreads();
        load_queries(step + 1);
      }
    }

    // dk and dv leave through the memory of k and v.
    ptx::cp_async_wait<0>();
    __syncthreads();
    store<kDType, typename Storage::K, kWarpsD>(dk_sum, k_tile, key_row, 0, warp_d,
                                                [&](int32, int32) { return p.options.scale; });
    store<kDType, typename Storage::V, kWarpsD>(dv_sum, v_tile, key_row, 0, warp_d,
                                                [&](int32, int32) { return dropout_scale; });
    __syncthreads();
    store_tile<typename Storage::K, kC.aligned, kThreads>(storage.k, dk, p.dk.row_stride, keys, head_dim);
    store_tile<typename Storage::V, kC.aligned, kThreads>(storage.v, dv, p.dv.row_stride, keys, head_dim_v);
  }

  // Adds the block's share to dq_accum. If deterministic, the blocks of keys that a block of queries sees take turns.
  static __forceinline__ void add_to_dq(const BwdProblem& p, const Sequence& seq, const MaskRule& rule, int64 head,
                                        const Accumulator<kC.block_q / kWarpsQ, kC.head_dim / kWarpsCols>& dq,
                                        int32 kv_block, int32 q_row, int32 warp_row, int32 warp_col) {
    const int32 lane = threadIdx.x % 32;
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
    float* rows = address_of<float, kBatchAxes>(p, p.dq_accum, seq.batch, head, seq.q.begin + q_row);
    const bool vectors = p.head_dim % 4 == 0;
#pragma unroll
    for (int32 m = 0; m < kC.block_q / kWarpsQ / 16; ++m)
#pragma unroll
      for (int32 n = 0; n < kC.head_dim / kWarpsCols / 8; ++n) {
        // Neighbours exchange halves: an even lane then has four columns of the upper row, an odd one of the lower row.
        const float(&x)[4] = dq.x[m][n];
        const bool odd = lane % 2;
        const float first = __shfl_xor_sync(~0u, odd ? x[0] : x[2], 1), second = __shfl_xor_sync(~0u, odd ? x[1] : x[3], 1);
        const float y[4] = {odd ? first : x[0], odd ? second : x[1], odd ? x[2] : first, odd ? x[3] : second};
        const int32 row = warp_row + 16 * m + lane / 4 + 8 * odd;
        const int32 col = dealt_column<kWarpsCols>(n, warp_col) + lane % 4 / 2 * 4;
        float* target = rows + row * p.dq_accum.row_stride + col;
        if (q_row + row >= rule.seqlen_q) continue;
        if (vectors) {
          if (col < p.head_dim) ptx::red_add_x4(target, y[0], y[1], y[2], y[3]);
        } else {
#pragma unroll
          for (int32 i = 0; i < 4; ++i)
            if (col + i < p.head_dim) ptx::red_add(target + i, y[i]);
        }
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

// The grid is [batch entry, sequence, key head, block of keys], then, if packed, blocks of rows of batch entries to look
// for keys that lie in no sequence.
template <KernelConfig kC>
__forceinline__ void bwd(const BwdProblem& p) {
  extern __shared__ __align__(1024) char shared[];
  constexpr int32 kThreads = num_threads(kC);
  const uint32 kv_blocks = uint32(ceil_div(p.max_seqlen_kv, kC.block_kv)), num_heads = uint32(p.num_heads_kv);
  const uint32 num_sequences = uint32(p.num_sequences), units = kv_blocks * num_heads * num_sequences * num_batch_entries(p);
  uint32 unit = blockIdx.x;
  if (unit < units) {
    const uint32 block = unit % kv_blocks, head = unit / kv_blocks % num_heads;
    unit /= kv_blocks * num_heads;
    const Sequence seq = sequence_of<kC.num_batch_axes>(p, unit / num_sequences, int32(unit % num_sequences));
    // More than once only if max_seqlen_kv was too small.
    for (int64 row = int64(block) * kC.block_kv; row < seq.kv.size; row += int64(kv_blocks) * kC.block_kv) {
      BwdBlock<kC>::run(p, shared, seq, head, int32(row));
      __syncthreads();
    }
  } else {
    unit -= units;
    const uint32 blocks = uint32(ceil_div(p.seqlen_kv, kThreads)), batch = unit / blocks;
    const int64 row = int64(unit % blocks) * kThreads + threadIdx.x;
    if (row >= p.seqlen_kv || !outside_all_sequences<kC.num_batch_axes>(p, p.cu_seqlens_kv, batch, int32(row))) return;
    for (int64 head = 0; head < p.num_heads_kv; ++head) {
      uint16* dk = address_of<uint16, kC.num_batch_axes>(p, p.dk, batch, head, row);
      uint16* dv = address_of<uint16, kC.num_batch_axes>(p, p.dv, batch, head, row);
      for (int64 c = 0; c < p.head_dim; ++c) dk[c] = 0;
      for (int64 c = 0; c < p.head_dim_v; ++c) dv[c] = 0;
    }
  }
}

}  // namespace flash::sm80
