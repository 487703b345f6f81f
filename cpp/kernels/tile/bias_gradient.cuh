// What the kernels for the gradient of a bias share: the block of the bias that a thread block has, the batch entries
// and heads over which it sums, and how the sums are written.
#pragma once

#include "common/config.h"
#include "common/problem.h"
#include "kernels/ptx/convert.cuh"
#include "kernels/tile/layout.cuh"
#include "kernels/tile/scores.cuh"
#include "kernels/tile/sequence.cuh"

namespace flash {

// One of the batch entries and heads that share a block of the bias.
struct Sharer {
  Sequence seq;
  int32 head;
  BlockKind kind;  // how much of the block its positional mask shows
};

// Block blockIdx.x of the bias: block_q queries and block_kv keys of one of its heads.
template <KernelConfig kC>
struct BiasBlock {
  const DbiasProblem& p;
  uint32 entry, head;   // of the bias
  int32 q_row, kv_row;  // where the block starts
  uint32 shared_heads;  // query heads that share a head of the bias
  uint32 num_sharers;   // of all batch entries
  bool is_alike;        // to all of them: none has lengths of its own
  BlockKind common;     // if so

  __forceinline__ explicit BiasBlock(const DbiasProblem& problem) : p(problem) {
    // Neighbouring thread blocks have the same queries.
    const uint32 kv_blocks = uint32(ceil_div(p.seqlen_kv, kC.block_kv)),
                 q_blocks = uint32(ceil_div(p.seqlen_q, kC.block_q)), heads = uint32(num_bias_heads(p));
    const uint32 entry_and_head = blockIdx.x / kv_blocks / q_blocks;
    entry = entry_and_head / heads, head = entry_and_head % heads;
    q_row = int32(blockIdx.x / kv_blocks % q_blocks) * kC.block_q;
    kv_row = int32(blockIdx.x % kv_blocks) * kC.block_kv;
    shared_heads = uint32(p.num_heads) / heads;
    num_sharers = uint32(num_batch_entries(p)) / uint32(num_bias_entries(p)) * shared_heads;
    is_alike = !p.q_lens.data && !p.kv_lens.data;
    common = is_alike ? kind_for(sequence_of<kC.num_batch_axes>(p, 0, 0)) : BlockKind::kNone;
  }

  // The first from `index` on of which the positional mask shows something. Leaves num_sharers in `index` if none is
  // left.
  __forceinline__ Sharer find(uint32& index) const {
    Sharer s = {};
    if (is_alike && common == BlockKind::kNone) index = num_sharers;
    for (; index < num_sharers; ++index) {
      s = sharer(index);
      if (s.kind != BlockKind::kNone) break;
    }
    return s;
  }

 private:
  __forceinline__ Sharer sharer(uint32 index) const {
    const Sequence seq =
        sequence_of<kC.num_batch_axes>(p, entry_sharing_bias(p, kC.num_batch_axes, entry, index / shared_heads), 0);
    return {seq, int32(head + index % shared_heads), is_alike ? common : kind_for(seq)};
  }

  __forceinline__ BlockKind kind_for(const Sequence& seq) const {
    const int32 row_end = min_of(q_row + kC.block_q, seq.q.used), key_end = kv_row + kC.block_kv;
    if (q_row >= row_end) return BlockKind::kNone;
    const BlockKind kind = classify_block(mask_rule_of(p, seq), q_row, row_end, kv_row, key_end);
    // The rule knows where keys end, not where queries do.
    return kind == BlockKind::kFull && row_end < q_row + kC.block_q ? BlockKind::kPartial : kind;
  }
};

// Writes the sums over the sharers, by way of shared memory, so that neighbours in a row are written by neighbouring
// lanes. By all threads that compute; sync() is a barrier of theirs.
template <KernelConfig kC>
class BiasGradientWriter {
  // A row for each query, so long that a warp's writes meet no bank twice.
  static constexpr int32 kRow = kC.block_kv + 4, kThreads = 32 * kC.num_warps;
  static_assert(kC.block_q % kBiasBlock == 0 && kC.block_kv % kBiasBlock == 0);

 public:
  static constexpr int32 kBytes = 4 * kC.block_q * kRow;  // of shared memory

  // `thread` is this one's number among those that compute.
  __forceinline__ BiasGradientWriter(const BiasBlock<kC>& block, char* shared, int32 thread)
      : block_(block), p_(block.p), x_(reinterpret_cast<float*>(shared)), thread_(thread) {}

  // The warp's sums are [key, query], from this place in the block on.
  template <int32 kKeys, int32 kQueries, class Sync>
  __forceinline__ void write(const Accumulator<kKeys, kQueries>& sums, int32 warp_key, int32 warp_query,
                             Sync sync) const {
    const int32 lane = threadIdx.x % 32;
#pragma unroll
    for (int32 m = 0; m < kKeys / 16; ++m)
#pragma unroll
      for (int32 n = 0; n < kQueries / 8; ++n)
#pragma unroll
        for (int32 e = 0; e < 4; ++e)
          x_[(warp_query + 8 * n + lane % 4 * 2 + e % 2) * kRow + warp_key + 16 * m + lane / 4 + e / 2 * 8] =
              sums.x[m][n][e];
    sync();
    if (kC.bias_tiled || (p_.bias.row_stride && p_.bias.col_stride))
      write_blocks<1, 1>(sync);
    else if (p_.bias.row_stride)
      write_blocks<1, kBiasBlock>(sync);
    else if (p_.bias.col_stride)
      write_blocks<kBiasBlock, 1>(sync);
    else
      write_blocks<kBiasBlock, kBiasBlock>(sync);
  }

  // Of a block of which no sharer sees anything. Only if kC.bias_tiled.
  __forceinline__ void write_zeros() const {
    constexpr int32 kLanes = kC.block_kv / 8;
    for (int32 i = thread_; i < kC.block_q * kLanes; i += kThreads) {
      const int32 row = block_.q_row + i / kLanes, col = block_.kv_row + i % kLanes * 8;
      if (row < p_.seqlen_q && col < p_.seqlen_kv)
        *reinterpret_cast<uint4*>(head_of<uint16>() + row * p_.dbias.row_stride + col) = {0, 0, 0, 0};
    }
  }

 private:
  // The gradient of the head of the bias that the block is of.
  template <class T>
  __forceinline__ T* head_of() const {
    return static_cast<T*>(p_.dbias.data) + (block_.entry * num_bias_heads(p_) + block_.head) * p_.dbias.head_stride;
  }

  // Writes the sums over blocks of kRows by kCols, which first come together where a block starts.
  template <int32 kRows, int32 kCols, class Sync>
  __forceinline__ void write_blocks(Sync sync) const {
    if constexpr (kRows > 1) {
      for (int32 i = thread_; i < kC.block_q / kRows * kC.block_kv; i += kThreads)
        sum_in_place(x_ + i / kC.block_kv * kRows * kRow + i % kC.block_kv, kRow);
      sync();
    }
    if constexpr (kCols > 1) {
      constexpr int32 kCount = kC.block_q / kRows;
      for (int32 i = thread_; i < kC.block_kv / kCols * kCount; i += kThreads)
        sum_in_place(x_ + i % kCount * kRows * kRow + i / kCount * kCols, 1);
      sync();
    }

    // In 16 bits a lane writes eight at a time where rows allow it.
    constexpr bool kFloat = kC.bias_dtype == DType::kF32 || kRows * kCols > 1;
    constexpr int32 kWidth = kC.bias_tiled && !kFloat ? 8 : 1, kLanes = kC.block_kv / kCols / kWidth;
    using Element = typename StorageOf<kFloat ? DType::kF32 : kC.bias_dtype>::Type;
    Element* target = head_of<Element>() + block_.q_row / kRows * p_.dbias.row_stride + block_.kv_row / kCols;
    for (int32 i = thread_; i < kC.block_q / kRows * kLanes; i += kThreads) {
      const int32 row = i / kLanes, col = i % kLanes * kWidth;
      if (block_.q_row + row * kRows >= p_.seqlen_q || block_.kv_row + col * kCols >= p_.seqlen_kv) continue;
      const float* source = x_ + row * kRows * kRow + col * kCols;
      Element* data = target + row * p_.dbias.row_stride + col;
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

  const BiasBlock<kC>& block_;
  const DbiasProblem& p_;
  float* x_;
  int32 thread_;
};

}  // namespace flash
