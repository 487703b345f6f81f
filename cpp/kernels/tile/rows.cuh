// Rows of tiles: of accumulators, from registers to global memory, and of shared memory, zeroed.
#pragma once

#include "kernels/ptx/convert.cuh"
#include "kernels/ptx/global.cuh"
#include "kernels/tile/layout.cuh"

namespace flash {

// Among the four lanes that share a row: lane t's words become the t-th words of the four. A transposition of 4 x 4.
__forceinline__ void transpose_quad(uint32 (&w)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int32 i = 0; i < 4; i += 2) {
    const uint32 received = __shfl_xor_sync(~0u, odd ? w[i] : w[i + 1], 1);
    w[i] = odd ? received : w[i];
    w[i + 1] = odd ? w[i + 1] : received;
  }
#pragma unroll
  for (int32 i = 0; i < 2; ++i) {
    const uint32 received = __shfl_xor_sync(~0u, upper ? w[i] : w[i + 2], 2);
    w[i] = upper ? received : w[i];
    w[i + 2] = upper ? w[i + 2] : received;
  }
}

// Writes rows [row, row + 16) below `rows`, times factor(h) for rows lane / 4 + 8 h, to `target`, where row 0 starts.
// A lane has 16 bytes of a row at a time, the lanes of a row 64 side by side. Columns are a multiple of 8.
template <DType kDType, int32 kN, class Factor>
__forceinline__ void store_rows(const Accumulator<16, kN>& c, uint16* target, int64 stride, int32 row, int32 rows,
                                int32 cols, Factor factor) {
  static_assert(kN % 32 == 0);
  const int32 lane = threadIdx.x % 32, first_row = row + lane / 4, first_col = lane % 4 * 8;
#pragma unroll
  for (int32 h = 0; h < 2; ++h) {
    const float f = factor(h);
    uint16* data = target + (first_row + 8 * h) * stride + first_col;
#pragma unroll
    for (int32 n = 0; n < kN / 8; n += 4) {
      uint32 words[4];
#pragma unroll
      for (int32 i = 0; i < 4; ++i)
        words[i] = ptx::pack<kDType>(c.x[0][n + i][2 * h] * f, c.x[0][n + i][2 * h + 1] * f);
      transpose_quad(words);
      if (first_row + 8 * h < rows && first_col + 8 * n < cols) ptx::st_global_x4(data + 8 * n, words);
    }
  }
}

// The same with one factor, and fewer instructions: through 2 KB of shared memory at a multiple of 128 bytes, which
// nobody else uses meanwhile.
template <DType kDType, int32 kN>
__forceinline__ void store_rows_through(char* scratch, const Accumulator<16, kN>& c, float factor, uint16* target,
                                        int64 stride, int32 row, int32 rows, int32 cols) {
  using Panel = Tile<16, 64>;
  const TileReader<Panel, Order::kDown> place(ptx::shared_address(scratch), 0, 0);
  const int32 lane = threadIdx.x % 32, chunk = lane % 8;
#pragma unroll
  for (int32 col = 0; col < kN; col += 64) {
#pragma unroll
    for (int32 n = 0; n < min_of(64, kN - col); n += 16) {
      const float(&left)[4] = c.x[0][(col + n) / 8];
      const float(&right)[4] = c.x[0][(col + n) / 8 + 1];
      ptx::stmatrix_x4(place.at(0, n), {ptx::pack<kDType>(left[0] * factor, left[1] * factor),
                                        ptx::pack<kDType>(left[2] * factor, left[3] * factor),
                                        ptx::pack<kDType>(right[0] * factor, right[1] * factor),
                                        ptx::pack<kDType>(right[2] * factor, right[3] * factor)});
    }
    __syncwarp();
#pragma unroll
    for (int32 i = 0; i < 16; i += 4) {
      const int32 r = lane / 8 + i;
      const uint4 x = *reinterpret_cast<const uint4*>(scratch + Panel::offset(r, chunk));
      if (row + r < rows && col + 8 * chunk < cols)
        *reinterpret_cast<uint4*>(target + (row + r) * stride + col + 8 * chunk) = x;
    }
    __syncwarp();
  }
}

// Zeros rows [row, row_end) of a tile in shared memory, by `threads` threads of which this one is `thread`.
template <class T, int32 kUnroll = 1>
__forceinline__ void zero_rows(uint32 tile, int32 row, int32 row_end, int32 thread, int32 threads) {
  constexpr int32 kChunksOfRow = T::kCols / 8;
#pragma unroll kUnroll
  for (int32 i = thread; i < (row_end - row) * kChunksOfRow; i += threads)
    ptx::st_shared_x4(tile + T::offset(row + i / kChunksOfRow, i % kChunksOfRow), 0, 0, 0, 0);
}

}  // namespace flash
