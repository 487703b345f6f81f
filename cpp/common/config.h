// What a GPU kernel is specialised for. cuda/heuristics.cc fills it in, cuda/jit.cc prints it into the source that it
// compiles, the kernels take it as their one template argument.
//
// Facts that cost nothing at run time (lengths, causality and windows, sinks, GQA) are not here: they are read from
// the Problem, so that one kernel serves them all.
#pragma once

#include "common/types.h"

namespace flash {

enum class Direction : int32 { kFwd, kBwd, kDbias };

// Kernels for mma.sync, on every GPU from Ampere on, and for Hopper's own instructions.
enum class Family : int32 { kSm80, kSm90 };

struct KernelConfig {
  Direction direction;
  Family family;
  DType dtype;       // of q, k, v, o and their gradients: 16 bits
  int32 head_dim;    // of q and k, as tiled: a multiple of 32; what lies beyond the real one is zero
  int32 head_dim_v;  // of v and o, likewise
  int32 num_batch_axes;
  bool aligned;  // all rows of q, k, v, o start on 16 bytes and are multiples of it
  bool exact;    // head dims fill their tiles
  bool positive_scale;
  bool softcap;
  bool alibi;
  bool bias;
  DType bias_dtype;
  bool bias_tiled;  // tiles of the bias may be copied into shared memory like those of k
  bool mask;
  bool mask_wide;  // rows of the mask may be read 16 keys at a time
  bool paired;     // bias and mask may be read two keys at a time
  bool segments;
  bool dropout;
  bool paged;
  bool return_softmax;
  bool deterministic;  // backward: dq is summed in a fixed order
  bool large_blocks;   // forward: there are queries enough for large blocks of them; only decides the tiles

  int32 block_q;
  int32 block_kv;
  int32 num_warps;   // that compute; on Hopper a multiple of 4, beside a warpgroup that copies
  int32 warps_d;     // portable backward: warps side by side along the head dim of dk and dv; the others lie along the
                     // keys. Portable gradient of the bias: side by side along the queries. Elsewhere 1
  int32 num_stages;  // buffers: of q and dO in the backward (in a pair of dO, and one more of q), of k and of v in
                     // Hopper's forward, in both of Hopper's of bias tiles too; 2 in the gradient of the bias if k and
                     // v have one each, in Hopper's of pairs, which are k and q or v and dO
  int32 min_blocks;  // thread blocks per multiprocessor that registers must allow

  bool operator==(const KernelConfig&) const = default;
};

// Calls visit(name, field) for each field in order; tests hold it to the struct.
template <class Config, class Visit>
static constexpr void for_each_field(Config& c, Visit visit) {
  visit("direction", c.direction);
  visit("family", c.family);
  visit("dtype", c.dtype);
  visit("head_dim", c.head_dim);
  visit("head_dim_v", c.head_dim_v);
  visit("num_batch_axes", c.num_batch_axes);
  visit("aligned", c.aligned);
  visit("exact", c.exact);
  visit("positive_scale", c.positive_scale);
  visit("softcap", c.softcap);
  visit("alibi", c.alibi);
  visit("bias", c.bias);
  visit("bias_dtype", c.bias_dtype);
  visit("bias_tiled", c.bias_tiled);
  visit("mask", c.mask);
  visit("mask_wide", c.mask_wide);
  visit("paired", c.paired);
  visit("segments", c.segments);
  visit("dropout", c.dropout);
  visit("paged", c.paged);
  visit("return_softmax", c.return_softmax);
  visit("deterministic", c.deterministic);
  visit("large_blocks", c.large_blocks);
  visit("block_q", c.block_q);
  visit("block_kv", c.block_kv);
  visit("num_warps", c.num_warps);
  visit("warps_d", c.warps_d);
  visit("num_stages", c.num_stages);
  visit("min_blocks", c.min_blocks);
}

// Thread blocks of the backward's pre- and postprocess kernels, and the rows of queries that each looks after.
inline constexpr int32 kRowKernelThreads = 128;
inline constexpr int32 kRowKernelRows = 128;

// Hopper's backward of large head dims: a pair of thread blocks, which see each other's shared memory, has the same
// keys. One of them does all products with Q, the other one those with dO.
static constexpr bool in_pairs(Direction direction, Family family, int32 largest_head_dim) {
  return direction == Direction::kBwd && family == Family::kSm90 && largest_head_dim > 128;
}
static constexpr bool in_pairs(const KernelConfig& c) {
  return in_pairs(c.direction, c.family, max_of(c.head_dim, c.head_dim_v));
}

// Thread blocks of the main kernel that start together.
static constexpr int32 cluster_size(const KernelConfig& c) {
  return in_pairs(c) ? 2 : 1;
}

// Hopper's backward: whether a thread block, or a pair, does one unit of work after the other, as a counter hands them
// out. Not if deterministic: a unit of which others await the turn must not wait itself.
static constexpr bool stays_on_multiprocessor(const KernelConfig& c) {
  return !c.deterministic;
}

// Tiles in shared memory are stored in panels so wide; where `shares` warpgroups each have their part of the columns,
// parts are whole panels.
static constexpr int32 panel_cols(int32 cols, int32 shares = 1) {
  return cols / shares % 64 == 0 ? 64 : 32;
}

// Hopper's backward: the columns of dQ of a thread block; and its two warpgroups have 64 queries of them each, or the
// same 64 and half of the columns, in whole panels. Of three panels the first one has two, or in a pair, where a main
// loop for each would take longer, both have the one in the middle. Of one panel both have that.
static constexpr int32 block_columns_of_dq(const KernelConfig& c) {
  return c.head_dim / cluster_size(c);
}
static constexpr int32 column_shares_of_dq(const KernelConfig& c) {
  return c.block_q == 64 ? 2 : 1;
}
static constexpr int32 columns_of_dq(const KernelConfig& c, int32 warpgroup) {
  const int32 all = block_columns_of_dq(c), first = (all / column_shares_of_dq(c) + 31) / 32 * 32;
  return warpgroup == 0 || first == all || in_pairs(c) ? first : all - first;
}
// Panels of tiles with q's head dim, in all of Hopper's kernels: in the others nobody has a share.
static constexpr int32 panel_cols_of_q(const KernelConfig& c) {
  return panel_cols(block_columns_of_dq(c), column_shares_of_dq(c));
}

// Threads of the main kernel.
static constexpr int32 num_threads(const KernelConfig& c) {
  return 32 * c.num_warps + (c.family == Family::kSm90 ? 128 : 0);
}

// Registers per thread with which a kernel starts that has a multiprocessor to itself. Warps may take more only from
// what others of their thread block have given back.
static constexpr int32 registers_at_start(const KernelConfig& c) {
  return 65536 / num_threads(c) / 8 * 8;
}

// Hopper's backward: buffers of dS, which is read a step late. In one thread block, a warpgroup that writes that of
// step j has waited until both had written that of step j - 2, and so were done with step j - 3, which read j - 4's:
// hence no barrier says that a buffer is free. In a pair one does, and three buffers, where there is room, make neither
// thread block wait for the other one. dK and dV are stored through one of them.
static constexpr int32 score_buffers(const KernelConfig& c) {
  if (!in_pairs(c)) return 4;
  return max_of(c.head_dim, c.head_dim_v) <= 192 ? 3 : 2;
}
// Tiles of what one thread block of a pair sends to the other: the weights of two steps, or of one and the slopes of
// the soft cap.
inline constexpr int32 kSentTiles = 2;
static constexpr int32 weight_buffers(const KernelConfig& c) {
  return c.softcap ? kSentTiles / 2 : kSentTiles;
}

// Barriers of Hopper's kernels, and what warps tell each other.
inline constexpr int64 kBarrierBytes = 512;

// Shared memory of Hopper's forward with so many buffers of Q.
static constexpr int64 hopper_fwd_bytes(const KernelConfig& c, int32 q_buffers) {
  const int64 q = int64{2} * c.block_q * c.head_dim, kv = int64{2} * c.block_kv * (c.head_dim + c.head_dim_v);
  const int64 bias = c.bias_tiled ? int64{2} * c.block_q * c.block_kv : 0;
  return q_buffers * q + c.num_stages * (kv + bias) + kBarrierBytes;
}

// Hopper's forward: buffers of Q, two where shared memory has room, so that the next unit's comes beside this one.
static constexpr int32 q_buffers(const KernelConfig& c) {
  constexpr int64 kSharedBytes = 227 * 1024;
  return hopper_fwd_bytes(c, 2) <= kSharedBytes ? 2 : 1;
}

// Threads of the kernel in front of Hopper's forward.
inline constexpr int32 kFwdPrepareThreads = 32;

// Dynamic shared memory of the main kernel; the kernels hold their storage to it.
static constexpr int64 shared_bytes(const KernelConfig& c) {
  const int64 q = int64{2} * c.block_q * c.head_dim, k = int64{2} * c.block_kv * c.head_dim;
  const int64 v = int64{2} * c.block_kv * c.head_dim_v;
  const int64 o = int64{2} * c.block_q * c.head_dim_v, scores = int64{2} * c.block_q * c.block_kv;
  const int64 bias = c.bias_tiled ? scores : 0;
  const int64 statistics = int64{8} * c.block_q;  // lse and delta of each query
  if (c.family == Family::kSm90) {
    if (c.direction == Direction::kFwd) return hopper_fwd_bytes(c, q_buffers(c));
    if (c.direction == Direction::kDbias)
      return c.num_stages * max_of(k + q, v + o) + bias + 2 * statistics + kBarrierBytes;
    if (in_pairs(c))
      return max_of(k + (c.num_stages + 1) * (q + statistics + bias) + score_buffers(c) * scores,
                    k / 2 + v + c.num_stages * (o + statistics) + (score_buffers(c) + kSentTiles) * scores) +
             kBarrierBytes;
    return k + v + c.num_stages * (q + o + statistics + bias) + score_buffers(c) * scores + kBarrierBytes;
  }
  if (c.direction == Direction::kFwd) return max_of(q, o) + k + v + bias;
  if (c.direction == Direction::kDbias) {
    const int64 operands = c.num_stages > 1 ? k + q + v + o : max_of(k + q, v + o);
    return max_of(operands + statistics + bias, int64{4} * c.block_q * (c.block_kv + 4));
  }
  return k + v + c.num_stages * (q + o + statistics) + (c.warps_d > 1 ? 2 : 1) * scores + bias;
}

}  // namespace flash
