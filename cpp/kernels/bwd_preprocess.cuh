// Before the backward: what its main kernel reads of each row of queries, its lse and delta = rowsum(dO * O) - dLSE,
// the gradient of the logsumexp's shift; and zeros where it sums up, takes turns and hands out units of work.
#pragma once

#include "common/config.h"
#include "common/problem.h"
#include "kernels/ptx/convert.cuh"
#include "kernels/ptx/grid.cuh"
#include "kernels/tile/sequence.cuh"

namespace flash {

// The part of rowsum(dO * O) of one of the eight threads that share a row.
template <KernelConfig kC>
__forceinline__ float partial_product(const BwdProblem& p, const uint16* o, const uint16* d_o, int32 part) {
  float sum = 0.0f;
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
    for (int32 c = part; c < p.head_dim_v; c += 8) sum += ptx::unpack<kC.dtype>(o[c]) * ptx::unpack<kC.dtype>(d_o[c]);
  }
  return sum;
}

template <KernelConfig kC>
__forceinline__ void bwd_preprocess(const BwdProblem& p) {
  constexpr int32 kAxes = kC.num_batch_axes;
  ptx::let_next_grid_start();
  if (blockIdx.x == 0 && threadIdx.x == 0) *static_cast<int32*>(p.next_unit.data) = 0;
  auto on_block = [&](const Sequence& s, int32 head, int32 row) {
    auto address = [&]<class T>(const View& view, int32 i) {
      return address_of<T, kAxes>(p, view, s.batch, head, s.q.begin + i);
    };
    // Eight threads share a row in each of eight passes, and then each thread has one of their rows. All loads come
    // first.
    constexpr int32 kRows = kRowKernelThreads / 8, kPasses = kRowKernelRows / kRows;
    static_assert(kPasses == 8 && kRowKernelRows == kStatisticsBlock);
    const int32 part = threadIdx.x % 8, first_row = threadIdx.x / 8, own_row = first_row + part * kRows;
    const int32 own = row + own_row;
    float lse = -kInfinity, d_lse = 0.0f;
    if (own < s.q.used) {
      lse = *address.template operator()<const float>(p.lse, own);
      d_lse = *address.template operator()<const float>(p.d_lse, own);
    }
    float products[kPasses];
#pragma unroll
    for (int32 pass = 0; pass < kPasses; ++pass) {
      const int32 i = row + first_row + pass * kRows;
      products[pass] = 0.0f;
      if (i < s.q.used)
        products[pass] = partial_product<kC>(p, address.template operator()<const uint16>(p.o, i),
                                             address.template operator()<const uint16>(p.d_o, i), part);
    }
    float sum = 0.0f;
#pragma unroll
    for (int32 pass = 0; pass < kPasses; ++pass) {
      for (int32 lane = 1; lane < 8; lane *= 2) products[pass] += __shfl_xor_sync(~0u, products[pass], lane);
      if (pass == part) sum = products[pass];
    }
    // A row that sees no key (nor a sink) has no gradient, whatever stands in its cotangents.
    const float delta = lse == -kInfinity ? 0.0f : sum - d_lse;
    char* statistics = reinterpret_cast<char*>(statistics_of<kAxes>(p, s, head, row)) + statistics_offset(own_row);
    *reinterpret_cast<float*>(statistics) = lse_in_log2(lse);
    *reinterpret_cast<float*>(statistics + kDeltaBehindLse) = delta;
    if (own < s.q.size) {
      *address.template operator()<float>(p.delta, own) = delta;
      if (p.tickets.data) *address.template operator()<int32>(p.tickets, own) = 0;
    }
    const int32 accum_blocks = ceil_div(min_of(kRowKernelRows, s.q.size - row), kAccumRows);
    float4* accum = reinterpret_cast<float4*>(accum_block_of<kAxes>(p, s, head, row));
    for (int32 i = threadIdx.x; i < accum_blocks * int32(p.dq_accum.row_stride / 4); i += kRowKernelThreads)
      accum[i] = {0.0f, 0.0f, 0.0f, 0.0f};
  };
  for_each_block<kAxes, Side::kQueries, kRowKernelRows, kRowKernelThreads, false>(
      p, on_block,
      [&](int64 batch, int64 row) {
        for (int64 head = 0; head < p.num_heads; ++head) *address_of<float, kAxes>(p, p.delta, batch, head, row) = 0.0f;
      },
      uint32(p.num_heads));
}

}  // namespace flash
