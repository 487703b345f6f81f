// The gradient of the bias with mma.sync and cp.async: every GPU from Ampere on.
//
// A thread block has block_q queries and block_kv keys of one head of the bias, and goes through all batch entries and
// heads that share it. Scores are formed again as in the backward kernel, transposed, and dS^T is summed in registers:
// there are no atomic additions, and each element is written once, the sum of always the same order. Where the bias
// has one row for all queries, or one column for all keys, the block sums over kBiasBlock of them before it writes.
#pragma once

#include "common/config.h"
#include "common/problem.h"
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
  // At last the sums, in place of everything: a row for each query, so long that a warp's writes meet no bank twice.
  static constexpr int32 kSumsRow = kC.block_kv + 4;
  static constexpr int32 kEnd = max_of(kBias + (kC.bias_tiled ? BiasTile<kC>::kBytes : 0), 4 * kC.block_q * kSumsRow);
  static_assert(kEnd == shared_bytes(kC) && kC.block_q % kBiasBlock == 0 && kC.block_kv % kBiasBlock == 0);
};

template <KernelConfig kC>
struct DbiasBlock {
  static constexpr int32 kThreads = num_threads(kC);
  static constexpr int32 kBatchAxes = kC.num_batch_axes;
  static constexpr DType kDType = kC.dtype;
  // Rows of warps, of keys, and warps side by side, of queries.
  static constexpr int32 kWarpsQ = kC.warps_d, kWarpsKv = kC.num_warps / kWarpsQ;
  static constexpr int32 kKeys = kC.block_kv / kWarpsKv, kQueries = kC.block_q / kWarpsQ;
  using Storage = DbiasStorage<kC>;
  using Sums = Accumulator<kKeys, kQueries>;

  // One of those that share the bias.
  struct Sharer {
    Sequence seq;
    int32 head;
    BlockKind kind;  // how much of this block its positional mask shows
  };

  const DbiasProblem& p;
  char* shared;
  uint32 base;                 // of `shared`
  uint32 entry, head;          // of the bias
  int32 q_row, kv_row;         // where the block starts
  int32 warp_key, warp_query;  // where in the block the warp's part starts

  __forceinline__ Sharer sharer(uint32 index) const {
    const uint32 heads = uint32(p.num_heads / num_bias_heads(p));
    const Sequence seq = sequence_of<kBatchAxes>(p, entry_sharing_bias(p, entry, index / heads), 0);
    const int32 row_end = min_of(q_row + kC.block_q, seq.q.used), key_end = kv_row + kC.block_kv;
    BlockKind kind = BlockKind::kNone;
    if (q_row < row_end) kind = classify_block(mask_rule_of(p, seq), q_row, row_end, kv_row, key_end);
    // The rule knows where keys end, not where queries do.
    if (kind == BlockKind::kFull && row_end < q_row + kC.block_q) kind = BlockKind::kPartial;
    return {seq, int32(head + index % heads), kind};
  }

  // Starts the copies of a tile of keys and of one of queries, of one head dim.
  template <class Keys, class Queries>
  __forceinline__ void load_pair(const Sharer& s, const View& keys, int32 keys_tile, const View& queries,
                                 int32 queries_tile, int64 dim) const {
    const int64 kv_head = s.head / int32(p.num_heads / p.num_heads_kv);
    const StridedRows k = {address_of<const uint16, kBatchAxes>(p, keys, s.seq.batch, kv_head, 0), keys.row_stride};
    const StridedRows q = {address_of<const uint16, kBatchAxes>(p, queries, s.seq.batch, s.head, 0),
                           queries.row_stride};
    load_tile<Keys, kC.aligned, kC.exact, kThreads>(base + keys_tile, k, kv_row, s.seq.kv.used, int32(dim));
    load_tile<Queries, kC.aligned, kC.exact, kThreads>(base + queries_tile, q, q_row, s.seq.q.used, int32(dim));
  }

  __forceinline__ void load_k_and_q(const Sharer& s) const {
    load_pair<typename Storage::K, typename Storage::Q>(s, p.k, Storage::kK, p.q, Storage::kQ, p.head_dim);
    ptx::cp_async_commit();
  }

  // With lse and delta.
  __forceinline__ void load_v_and_do(const Sharer& s) const {
    load_pair<typename Storage::V, typename Storage::O>(s, p.v, Storage::kV, p.d_o, Storage::kDo, p.head_dim_v);
    if (threadIdx.x < kC.block_q) {
      const int32 bytes = q_row + int32(threadIdx.x) < s.seq.q.used ? 4 : 0;
      const int64 row = q_row + int32(threadIdx.x);
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
    gradient.weights(s, p, in, kMasked, kv_row + warp_key, q_row + warp_query, bias, [&](int32 n) {
      const float2 lse = pair_of(Storage::kLse, n);
      return float2{lse_in_log2(lse.x), lse_in_log2(lse.y)};
    });
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
    const uint32 count = uint32(num_batch_entries(p) / num_bias_entries(p)) * uint32(p.num_heads / num_bias_heads(p));
    // The first from `index` on of which the positional mask shows something. Leaves `count` in `index` if none is
    // left.
    auto find = [&](uint32& index) {
      Sharer s = {};
      for (; index < count; ++index) {
        s = sharer(index);
        if (s.kind != BlockKind::kNone) break;
      }
      return s;
    };
    Sums sums;
    sums.clear();
    uint32 index = 0;
    Sharer now = find(index);
    if (index < count) {
      if constexpr (kC.bias_tiled)
        load_bias<kC>(p, reinterpret_cast<const uint16*>(ScoreInputs<kC>(p, now.seq, now.head).bias),
                      base + Storage::kBias, q_row, kv_row);
      load_k_and_q(now);
    }
    while (index < count) {
      const Sharer next = find(++index);
      if (now.kind == BlockKind::kFull)
        add<false>(sums, now, index < count, next);
      else
        add<true>(sums, now, index < count, next);
      now = next;
    }
    __syncthreads();  // all are done with the memory that now takes the sums
    write(sums);
  }

  // To global memory, by way of shared memory, so that neighbours in a row are written by neighbouring lanes.
  __forceinline__ void write(const Sums& sums) const {
    float* x = reinterpret_cast<float*>(shared);
    const int32 lane = threadIdx.x % 32;
#pragma unroll
    for (int32 m = 0; m < kKeys / 16; ++m)
#pragma unroll
      for (int32 n = 0; n < kQueries / 8; ++n)
#pragma unroll
        for (int32 e = 0; e < 4; ++e)
          x[(warp_query + 8 * n + lane % 4 * 2 + e % 2) * Storage::kSumsRow + warp_key + 16 * m + lane / 4 +
            e / 2 * 8] = sums.x[m][n][e];
    __syncthreads();
    if (p.bias.row_stride && p.bias.col_stride)
      write_blocks<1, 1>(x);
    else if (p.bias.row_stride)
      write_blocks<1, kBiasBlock>(x);
    else if (p.bias.col_stride)
      write_blocks<kBiasBlock, 1>(x);
    else
      write_blocks<kBiasBlock, kBiasBlock>(x);
  }

  // Writes the sums over blocks of kRows by kCols, which first come together where a block starts.
  template <int32 kRows, int32 kCols>
  __forceinline__ void write_blocks(float* x) const {
    constexpr int32 kRow = Storage::kSumsRow;
    if constexpr (kRows > 1) {
      for (int32 i = threadIdx.x; i < kC.block_q / kRows * kC.block_kv; i += kThreads)
        sum_in_place(x + i / kC.block_kv * kRows * kRow + i % kC.block_kv, kRow);
      __syncthreads();
    }
    if constexpr (kCols > 1) {
      constexpr int32 kCount = kC.block_q / kRows;
      for (int32 i = threadIdx.x; i < kC.block_kv / kCols * kCount; i += kThreads)
        sum_in_place(x + i % kCount * kRows * kRow + i / kCount * kCols, 1);
      __syncthreads();
    }

    // In 16 bits a lane writes eight at a time where rows allow it.
    constexpr bool kFloat = kC.bias_dtype == DType::kF32 || kRows * kCols > 1;
    constexpr int32 kWidth = kC.bias_tiled && !kFloat ? 8 : 1, kLanes = kC.block_kv / kCols / kWidth;
    using Element = typename StorageOf<kFloat ? DType::kF32 : kC.bias_dtype>::Type;
    Element* target = static_cast<Element*>(p.dbias.data) + (entry * num_bias_heads(p) + head) * p.dbias.head_stride +
                      q_row / kRows * p.dbias.row_stride + kv_row / kCols;
    for (int32 i = threadIdx.x; i < kC.block_q / kRows * kLanes; i += kThreads) {
      const int32 row = i / kLanes, col = i % kLanes * kWidth;
      if (q_row + row * kRows >= p.seqlen_q || kv_row + col * kCols >= p.seqlen_kv) continue;
      const float* source = x + row * kRows * kRow + col * kCols;
      Element* data = target + row * p.dbias.row_stride + col;
      if constexpr (kWidth > 1) {
        const float4 a = *reinterpret_cast<const float4*>(source), b = *reinterpret_cast<const float4*>(source + 4);
        *reinterpret_cast<uint4*>(data) = {ptx::pack<kC.bias_dtype>(a.x, a.y), ptx::pack<kC.bias_dtype>(a.z, a.w),
                                           ptx::pack<kC.bias_dtype>(b.x, b.y), ptx::pack<kC.bias_dtype>(b.z, b.w)};
      } else if constexpr (kFloat) {
        *data = *source;
      } else {
        *data = uint16(ptx::pack<kC.bias_dtype>(*source, 0.0f));
      }
    }
  }

  // The first of kBiasBlock numbers becomes the sum of all.
  static __forceinline__ void sum_in_place(float* x, int32 stride) {
    float sum = 0.0f;
#pragma unroll 8
    for (int32 i = 0; i < kBiasBlock; ++i) sum += x[i * stride];
    x[0] = sum;
  }
};

template <KernelConfig kC>
__forceinline__ void dbias(const DbiasProblem& p) {
  extern __shared__ __align__(1024) char shared[];
  using Block = DbiasBlock<kC>;
  // Neighbouring thread blocks have the same queries.
  const uint32 kv_blocks = uint32(ceil_div(p.seqlen_kv, kC.block_kv)),
               q_blocks = uint32(ceil_div(p.seqlen_q, kC.block_q));
  const uint32 heads = uint32(num_bias_heads(p)), warp = threadIdx.x / 32;
  const uint32 kv_block = blockIdx.x % kv_blocks, q_block = blockIdx.x / kv_blocks % q_blocks,
               entry_and_head = blockIdx.x / kv_blocks / q_blocks;
  Block{p,
        shared,
        ptx::shared_address(shared),
        entry_and_head / heads,
        entry_and_head % heads,
        int32(q_block) * kC.block_q,
        int32(kv_block) * kC.block_kv,
        int32(warp / Block::kWarpsQ) * Block::kKeys,
        int32(warp % Block::kWarpsQ) * Block::kQueries}
      .run();
}

}  // namespace flash::sm80
