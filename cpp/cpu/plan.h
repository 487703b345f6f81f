// Reads lengths and cu_seqlens on the host and lays out the work: the sequences of a problem, and the rows that belong
// to none and must still be defined.
#pragma once

#include <vector>

#include "cpu/kernels.h"

namespace flash::cpu {

// Rows [begin, end) of one batch entry.
struct RowRange {
  int64 batch;
  int64 begin, end;
};

struct Plan {
  std::vector<Sequence> sequences;
  std::vector<RowRange> unused_q_rows;   // padding behind a length, and rows outside cu_seqlens
  std::vector<RowRange> unused_kv_rows;  // not filled for paged problems, which have no kv gradient
};

// Lengths are clamped to what exists and cu_seqlens to its running maximum, so that no value makes a sequence leave
// its tensor or overlap another.
Plan make_plan(const Problem& p);

}  // namespace flash::cpu
