// After the backward: dq = scale * dq_accum, as rows and rounded to the query's dtype.
#pragma once

#include "common/config.h"
#include "common/problem.h"
#include "kernels/ptx/convert.cuh"
#include "kernels/ptx/grid.cuh"
#include "kernels/tile/sequence.cuh"

namespace flash {

template <KernelConfig kC>
__forceinline__ void bwd_postprocess(const BwdProblem& p) {
  constexpr int32 kAxes = kC.num_batch_axes;
  const int32 head_dim = int32(p.head_dim), tiles = (head_dim + 7) / 8;
  const float scale = p.options.scale;
  ptx::wait_for_last_grid();
  auto on_block = [&](const Sequence& s, int32 head, int32 row) {
    // A thread has 8 columns of a row and of the eighth row below it, which lie side by side in dq_accum.
    for (int32 item = threadIdx.x; item < kRowKernelRows / 2 * tiles; item += kRowKernelThreads) {
      const int32 block_row = row + item / (8 * tiles) * kAccumRows, tile = item / 8 % tiles, r = item % 8;
      if (block_row >= s.q.size) break;
      const float4* sums =
          reinterpret_cast<const float4*>(accum_block_of<kAxes>(p, s, head, block_row)) + tile * 32 + r * 4;
      const float4 x[4] = {sums[0], sums[1], sums[2], sums[3]};
#pragma unroll
      for (int32 h = 0; h < 2; ++h) {
        const int32 i = block_row + r + 8 * h;
        if (i >= s.q.size) continue;
        // Rows that see no key get 0, also where 0 times a NaN of K that other rows see has been added.
        const bool seen =
            i < s.q.used && *address_of<const float, kAxes>(p, p.lse, s.batch, head, s.q.begin + i) != -kInfinity;
        uint32 packed[4];
#pragma unroll
        for (int32 c = 0; c < 4; ++c)
          packed[c] = !seen ? 0
                      : h   ? ptx::pack<kC.dtype>(x[c].z * scale, x[c].w * scale)
                            : ptx::pack<kC.dtype>(x[c].x * scale, x[c].y * scale);
        uint16* dq = address_of<uint16, kAxes>(p, p.dq, s.batch, head, s.q.begin + i) + tile * 8;
        if constexpr (kC.aligned) {
          *reinterpret_cast<uint4*>(dq) = {packed[0], packed[1], packed[2], packed[3]};
        } else {
#pragma unroll
          for (int32 c = 0; c < 8; ++c)
            if (tile * 8 + c < head_dim) dq[c] = uint16(packed[c / 2] >> (16 * (c % 2)));
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
