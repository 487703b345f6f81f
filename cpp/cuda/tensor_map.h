// Tensor maps: what the copy engine of a GPU must know about an operand.
#pragma once

#include "common/problem.h"

namespace flash::cuda {

// Of an operand [batch, row, head, head dim] with one batch axis, whose head dim is tiled to `cols` columns. It is
// copied in boxes of box_rows rows of one head, one panel of the tile wide and swizzled like it.
TensorMap tensor_map_of(const View& view, int64 batch, int64 rows, int64 heads, int64 head_dim, int32 cols,
                        int32 box_rows);

}  // namespace flash::cuda
