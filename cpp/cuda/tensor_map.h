// Tensor maps: what the copy engine of a GPU must know about an operand.
#pragma once

#include "common/config.h"
#include "common/problem.h"

namespace flash::cuda {

// Of a 16-bit operand with one batch axis, of so many rows and columns (the head dim; keys, of a bias). It is copied in
// boxes of box_rows rows of one head, one panel of a tile wide and swizzled like it. Batch and heads may be broadcast.
TensorMap tensor_map_of(const View& view, int64 batch, int64 rows, int64 heads, int64 cols, int32 panel_cols,
                        int32 box_rows);
// Of the bias, in boxes of block_q rows and a panel of a tile of block_kv keys.
TensorMap tensor_map_of_bias(const Problem& problem, const KernelConfig& config);

}  // namespace flash::cuda
