// After the backward: dq = scale * dq_accum, as rows and rounded to the query's dtype.
#pragma once

#include "common/config.h"
#include "common/problem.h"
#include "kernels/ptx/convert.cuh"
#include "kernels/ptx/grid.cuh"
#include "kernels/tile/layout.cuh"
#include "kernels/tile/rows.cuh"
#include "kernels/tile/sequence.cuh"

namespace flash {

template <KernelConfig kC>
__forceinline__ void bwd_postprocess(const BwdProblem& p) {
  constexpr int32 kAxes = kC.num_batch_axes;
  const float scale = p.options.scale;
  const int32 head_dim = int32(p.head_dim), lane = threadIdx.x % 32;
  ptx::wait_for_last_grid();
  auto on_block = [&](const Sequence& s, int32 head, int32 row) {
    // A warp has 64 columns of 16 rows at a time, or all: it reads what lies side by side, and writes whole lines.
    constexpr int32 kCols = kC.head_dim % 64 == 0 ? 64 : kC.head_dim, kParts = kC.head_dim / kCols;
    for (uint32 part = threadIdx.x / 32; part < kRowKernelRows / kAccumRows * kParts; part += kRowKernelThreads / 32) {
      const int32 block = int32(part / kParts), first_col = int32(part - block * kParts) * kCols;
      const int32 first_row = row + block * kAccumRows;
      const int32 rows = s.q.size - first_row, cols = head_dim - first_col;
      if (rows <= 0) break;
      const float4* sums =
          reinterpret_cast<const float4*>(accum_block_of<kAxes>(p, s, head, first_row)) + first_col * 4 + lane;
      Accumulator<16, kCols> dq;
#pragma unroll
      for (int32 n = 0; n < kCols / 8; ++n) {
        const float4 sum = 8 * n < cols ? sums[32 * n] : float4{0.0f, 0.0f, 0.0f, 0.0f};
        dq.x[0][n][0] = sum.x, dq.x[0][n][1] = sum.y, dq.x[0][n][2] = sum.z, dq.x[0][n][3] = sum.w;
      }
#pragma unroll
      for (int32 h = 0; h < 2; ++h) {
        const int32 i = first_row + lane / 4 + 8 * h;
        const bool seen =
            i < s.q.used && *address_of<const float, kAxes>(p, p.lse, s.batch, head, s.q.begin + i) != -kInfinity;
        // Rows that see no key get 0, also where 0 times a NaN of K that other rows see has been added.
#pragma unroll
        for (int32 n = 0; n < kCols / 8; ++n)
#pragma unroll
          for (int32 e = 2 * h; e < 2 * h + 2; ++e) dq.x[0][n][e] = seen ? dq.x[0][n][e] * scale : 0.0f;
      }
      uint16* target = address_of<uint16, kAxes>(p, p.dq, s.batch, head, s.q.begin + first_row);
      if constexpr (kC.aligned) {
        store_rows<kC.dtype>(dq, target + first_col, p.dq.row_stride, 0, rows, cols, [](int32) { return 1.0f; });
      } else {
#pragma unroll
        for (int32 i = 0; i < kCols / 2; ++i) {
          const int32 r = lane / 4 + i / 2 % 2 * 8, c = i / 4 * 8 + lane % 4 * 2 + i % 2;
          if (r < rows && c < cols)
            target[r * p.dq.row_stride + first_col + c] = uint16(ptx::pack<kC.dtype>(dq.x[0][i / 4][i % 4], 0.0f));
        }
      }
    }
  };
  for_each_block<kAxes, Side::kQueries, kRowKernelRows, kRowKernelThreads, false>(
      p, on_block,
      [&](int64 batch, int64 row) {
        for (int64 head = 0; head < p.num_heads; ++head) zero_row<kAxes>(p, p.dq, batch, head, row, head_dim);
      },
      uint32(p.num_heads));
}

}  // namespace flash
