// Before the backward: delta = rowsum(dO * O) - dLSE, the gradient of the logsumexp's shift.
#pragma once

#include "common/config.h"
#include "common/problem.h"
#include "kernels/ptx/convert.cuh"
#include "kernels/tile/sequence.cuh"

namespace flash {

// Eight threads share a row; rows are those of o in memory, [batch, row, head].
template <KernelConfig kC>
__forceinline__ void bwd_preprocess(const BwdProblem& p) {
  constexpr int32 kAxes = kC.num_batch_axes;
  const int64 total = num_batch_entries(p) * p.seqlen_q * p.num_heads;
  const int32 part = threadIdx.x % 8;
#pragma unroll
  for (int32 pass = 0; pass < kRowKernelRows; pass += kRowKernelThreads / 8) {
    const int64 index = int64(blockIdx.x) * kRowKernelRows + pass + threadIdx.x / 8;
    const bool inside = index < total;
    const int64 head = index % p.num_heads, row = index / p.num_heads % p.seqlen_q,
                batch = index / p.num_heads / p.seqlen_q;
    float sum = 0.0f;
    if (inside) {
      const uint16* o = address_of<const uint16, kAxes>(p, p.o, batch, head, row);
      const uint16* d_o = address_of<const uint16, kAxes>(p, p.d_o, batch, head, row);
      if constexpr (kC.aligned) {
#pragma unroll
        for (int32 c = 0; c < kC.head_dim_v; c += 64) {
          const int32 col = c + part * 8;
          if (col >= p.head_dim_v) continue;
          const uint4 x = *reinterpret_cast<const uint4*>(o + col), y = *reinterpret_cast<const uint4*>(d_o + col);
          const uint32 a[4] = {x.x, x.y, x.z, x.w}, b[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
          for (int32 i = 0; i < 4; ++i) {
            sum += ptx::unpack<kC.dtype>(uint16(a[i])) * ptx::unpack<kC.dtype>(uint16(b[i]));
            sum += ptx::unpack<kC.dtype>(uint16(a[i] >> 16)) * ptx::unpack<kC.dtype>(uint16(b[i] >> 16));
          }
        }
      } else {
        for (int32 c = part; c < p.head_dim_v; c += 8)
          sum += ptx::unpack<kC.dtype>(o[c]) * ptx::unpack<kC.dtype>(d_o[c]);
      }
    }
    for (int32 lane = 1; lane < 8; lane *= 2) sum += __shfl_xor_sync(~0u, sum, lane);
    if (inside && part == 0) {
      // A row that sees no key (nor a sink) has no gradient, whatever stands in its cotangents.
      const bool empty = *address_of<const float, kAxes>(p, p.lse, batch, head, row) == -kInfinity;
      const float d_lse = *address_of<const float, kAxes>(p, p.d_lse, batch, head, row);
      *address_of<float, kAxes>(p, p.delta, batch, head, row) = empty ? 0.0f : sum - d_lse;
    }
  }
}

}  // namespace flash
