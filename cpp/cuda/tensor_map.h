// Tensor maps: what the copy engine of a GPU must know about an operand.
#pragma once

#include "common/config.h"
#include "common/problem.h"

namespace flash::cuda {

// Of an operand with one batch axis, of so many rows and columns (the head dim; keys, of a bias). It is copied in boxes
// of box_rows rows of one head. Of 16 bits, these are one panel of a tile wide and swizzled like it; float32 is copied
// as it lies. Batch and heads may be broadcast.
TensorMap tensor_map_of(const View& view, int64 batch, int64 rows, int64 heads, int64 cols, int32 box_cols,
                        int32 box_rows);

// All maps of what one of Hopper's kernels takes: those of q, k, v and, if it has one, dO; of the bias if it is tiled.
template <class HopperProblem>
void encode_tensor_maps(HopperProblem& p, const KernelConfig& c) {
  const int64 batch = num_batch_entries(p);
  const int32 panel = panel_cols_of_q(c), panel_v = panel_cols(int32(c.head_dim_v));
  const int32 box_q = c.direction == Direction::kFwd ? 64 : c.block_q;  // of a warpgroup, or of all
  p.q_map = tensor_map_of(p.q, batch, p.seqlen_q, p.num_heads, p.head_dim, panel, box_q);
  p.k_map = tensor_map_of(p.k, batch, p.seqlen_kv, p.num_heads_kv, p.head_dim, panel, c.block_kv);
  p.v_map = tensor_map_of(p.v, batch, p.seqlen_kv, p.num_heads_kv, p.head_dim_v, panel_v, c.block_kv);
  if constexpr (requires { p.d_o_map; })
    p.d_o_map = tensor_map_of(p.d_o, batch, p.seqlen_q, p.num_heads, p.head_dim_v, panel_v, box_q);
  if constexpr (requires { p.statistics_map; }) {
    constexpr int32 kFloats = 2 * kStatisticsRows;
    View rows = p.statistics;
    rows.row_stride = kFloats;
    p.statistics_map = tensor_map_of(rows, batch, num_statistics_blocks(p) * (kStatisticsBlock / kStatisticsRows),
                                     p.num_heads, kFloats, kFloats, c.block_q / kStatisticsRows);
  }
  if (c.bias_tiled)
    p.bias_map = tensor_map_of(p.bias, batch, p.seqlen_q, p.num_heads, p.seqlen_kv, panel_cols(c.block_kv), c.block_q);
}

}  // namespace flash::cuda
