// After the backward: dq = scale * dq_accum, rounded to the query's dtype.
#pragma once

#include "common/config.h"
#include "common/problem.h"
#include "kernels/ptx/convert.cuh"
#include "kernels/tile/sequence.cuh"

namespace flash {

inline constexpr int32 kPostprocessRows = 64;  // per thread block of 128 threads; the launch counts on it

// Eight threads share a row; rows are those of dq in memory, [batch, row, head].
template <KernelConfig kC>
__forceinline__ void bwd_postprocess(const BwdProblem& p) {
  constexpr int32 kAxes = kC.num_batch_axes;
  const int64 total = num_batch_entries(p) * p.seqlen_q * p.num_heads;
  const float scale = p.options.scale;
#pragma unroll
  for (int32 pass = 0; pass < kPostprocessRows; pass += 16) {
    const int64 index = int64(blockIdx.x) * kPostprocessRows + pass + threadIdx.x / 8;
    if (index >= total) return;
    const int64 head = index % p.num_heads, row = index / p.num_heads % p.seqlen_q, batch = index / p.num_heads / p.seqlen_q;
    const float* sum = address_of<const float, kAxes>(p, p.dq_accum, batch, head, row);
    uint16* dq = address_of<uint16, kAxes>(p, p.dq, batch, head, row);
    if constexpr (kC.aligned) {
#pragma unroll
      for (int32 c = 0; c < kC.head_dim; c += 64) {
        const int32 col = c + threadIdx.x % 8 * 8;
        if (col >= p.head_dim) continue;
        const float4 x = *reinterpret_cast<const float4*>(sum + col), y = *reinterpret_cast<const float4*>(sum + col + 4);
        *reinterpret_cast<uint4*>(dq + col) = {
            ptx::pack<kC.dtype>(x.x * scale, x.y * scale), ptx::pack<kC.dtype>(x.z * scale, x.w * scale),
            ptx::pack<kC.dtype>(y.x * scale, y.y * scale), ptx::pack<kC.dtype>(y.z * scale, y.w * scale)};
      }
    } else {
      for (int32 c = threadIdx.x % 8; c < p.head_dim; c += 8) dq[c] = uint16(ptx::pack<kC.dtype>(sum[c] * scale, 0.0f));
    }
  }
}

}  // namespace flash
