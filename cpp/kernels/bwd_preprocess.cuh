// Before the backward: what its main kernel reads of each row of queries, its lse and delta = rowsum(dO * O) - dLSE,
// the gradient of the logsumexp's shift; and zeros where it sums up, takes turns and hands out units of work.
#pragma once

#include "common/config.h"
#include "common/problem.h"
#include "kernels/ptx/convert.cuh"
#include "kernels/ptx/grid.cuh"
#include "kernels/tile/sequence.cuh"

namespace flash {

// The part of a row of O and dO of one of the eight threads that share it. To load it and to multiply are apart, so
// that several rows are on their way at a time.
template <KernelConfig kC>
struct RowPart {
  static constexpr int32 kLoads = kC.aligned ? ceil_div(kC.head_dim_v, 64) : 1;
  uint4 o[kLoads] = {}, d_o[kLoads] = {};  // 8 columns each
  float product = 0.0f;                    // in their place where rows are not aligned

  __forceinline__ void load(const BwdProblem& p, const uint16* o_row, const uint16* d_o_row, int32 part) {
    if constexpr (kC.aligned) {
#pragma unroll
      for (int32 i = 0; i < kLoads; ++i) {
        const int32 col = 64 * i + 8 * part;
        if (col < p.head_dim_v) {
          o[i] = *reinterpret_cast<const uint4*>(o_row + col);
          d_o[i] = *reinterpret_cast<const uint4*>(d_o_row + col);
        }
      }
    } else {
      for (int32 col = part; col < p.head_dim_v; col += 8)
        product += ptx::unpack<kC.dtype>(o_row[col]) * ptx::unpack<kC.dtype>(d_o_row[col]);
    }
  }

  __forceinline__ float sum() const {
    float sum = product;
#pragma unroll
    for (int32 i = 0; i < kLoads; ++i) {
      const uint32 a[4] = {o[i].x, o[i].y, o[i].z, o[i].w}, b[4] = {d_o[i].x, d_o[i].y, d_o[i].z, d_o[i].w};
#pragma unroll
      for (int32 j = 0; j < 4; ++j) {
        sum += ptx::unpack<kC.dtype>(uint16(a[j])) * ptx::unpack<kC.dtype>(uint16(b[j]));
        sum += ptx::unpack<kC.dtype>(uint16(a[j] >> 16)) * ptx::unpack<kC.dtype>(uint16(b[j] >> 16));
      }
    }
    return sum;
  }
};

template <KernelConfig kC>
__forceinline__ void bwd_preprocess(const BwdProblem& p) {
  constexpr int32 kAxes = kC.num_batch_axes;
  ptx::let_next_grid_start();
  if (blockIdx.x == 0 && threadIdx.x == 0) *static_cast<int32*>(p.next_unit.data) = 0;
  auto on_block = [&](const Sequence& s, int32 head, int32 row) {
    auto address = [&]<class T>(const View& view, int32 i) {
      return address_of<T, kAxes>(p, view, s.batch, head, s.q.begin + i);
    };
    // Eight threads share a row in each of eight passes, and then each thread has one of their rows.
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
    // So many passes at a time as ask for no more than 16 times 16 bytes.
    constexpr int32 kLoads = RowPart<kC>::kLoads, kAtOnce = kLoads == 1 ? 8 : kLoads == 2 ? 4 : 2;
#pragma unroll
    for (int32 first = 0; first < kPasses; first += kAtOnce) {
      RowPart<kC> parts[kAtOnce];
#pragma unroll
      for (int32 j = 0; j < kAtOnce; ++j) {
        const int32 i = row + first_row + (first + j) * kRows;
        if (i < s.q.used)
          parts[j].load(p, address.template operator()<const uint16>(p.o, i),
                        address.template operator()<const uint16>(p.d_o, i), part);
      }
#pragma unroll
      for (int32 j = 0; j < kAtOnce; ++j) products[first + j] = parts[j].sum();
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
