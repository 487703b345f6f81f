// Tiles between global and shared memory: rows of 16-bit elements, padded with zeros up to the tile's size.
#pragma once

#include "common/problem.h"
#include "kernels/ptx/cp_async.cuh"
#include "kernels/tile/layout.cuh"

namespace flash {

// Rows one after the other, `stride` elements apart.
struct StridedRows {
  const uint16* first;
  int64 stride;

  // Pointers to rows that follow each other by `step`.
  struct Cursor {
    const uint16* data;
    int64 stride;
    __forceinline__ void advance(int32 step) { data += step * stride; }
  };
  __forceinline__ Cursor from(int32 row) const { return {first + row * stride, stride}; }
};

// Keys found through a page table. An index out of range reads some other page: a wrong result, never a wild access.
struct PagedRows {
  const uint16* first;
  const int32* table;
  int32 page_size, num_pages;
  int32 last;
  int64 row_stride;

  struct Cursor {
    const PagedRows& rows;
    int32 row;
    const uint16* data;
    __forceinline__ void advance(int32 step) {
      row += step;
      const int32 r = min_of(row, rows.last);
      const int32 page = clamp_to<int32>(rows.table[r / rows.page_size], 0, rows.num_pages - 1);
      data = rows.first + (int64(page) * rows.page_size + r % rows.page_size) * rows.row_stride;
    }
  };
  __forceinline__ Cursor from(int32 row) const {
    Cursor cursor = {*this, row, nullptr};
    cursor.advance(0);
    return cursor;
  }
};

// Starts the copy of rows [row, row + T::kRows) of `source` into a tile; rows from `row_end` on and columns from `cols`
// on become zero (kExact: there are none). Aligned rows go by cp.async, to be committed and awaited by the caller;
// others are copied at once.
template <class T, bool kAligned, bool kExact, int32 kThreads, class Rows>
__forceinline__ void load_tile(uint32 tile, const Rows& source, int32 row, int32 row_end, int32 cols) {
  constexpr int32 kRowsPerPass = kThreads / T::kChunks;
  const int32 chunk = threadIdx.x % T::kChunks, first = threadIdx.x / T::kChunks;
  auto cursor = source.from(row + first);
  uint32 target = tile + first * T::kRowBytes + (chunk ^ T::swizzle(first)) * 16;
  static_assert(kRowsPerPass % 8 == 0, "the swizzle must repeat from pass to pass");
#pragma unroll(kAligned ? T::kRows : 1)
  for (int32 r = 0; r < T::kRows; r += kRowsPerPass) {
    if (T::kRows % kRowsPerPass == 0 || r + first < T::kRows) {
      const bool in_rows = row + r + first < row_end;
#pragma unroll
      for (int32 panel = 0; panel < T::kPanels; ++panel) {
        const int32 col = panel * T::kPanelCols + chunk * 8;
        const uint32 place = target + panel * T::kPanelBytes + r * T::kRowBytes;
        if constexpr (kAligned) {
          // Nothing is read where the count is 0, so that the pointer may lie beyond the end.
          ptx::cp_async_16(place, cursor.data + col, in_rows && (kExact || col < cols) ? 16 : 0);
        } else {
#pragma unroll
          for (int32 i = 0; i < 4; ++i) {
            const int32 c = col + 2 * i;
            const uint32 low = in_rows && c < cols ? cursor.data[c] : 0;
            const uint32 high = in_rows && c + 1 < cols ? cursor.data[c + 1] : 0;
            ptx::st_shared(place + 4 * i, low | high << 16);
          }
        }
      }
    }
    cursor.advance(kRowsPerPass);
  }
}

// Writes a tile's first `rows` rows and `cols` columns to global memory.
template <class T, bool kAligned, int32 kThreads>
__forceinline__ void store_tile(const void* tile, uint16* target, int64 stride, int32 rows, int32 cols) {
  constexpr int32 kRowsPerPass = kThreads / T::kChunks;
  const int32 chunk = threadIdx.x % T::kChunks, first = threadIdx.x / T::kChunks;
#pragma unroll
  for (int32 pass = 0; pass < ceil_div(T::kRows, kRowsPerPass); ++pass) {
    const int32 r = pass * kRowsPerPass + first;
    if (r >= min_of(T::kRows, rows)) break;
    uint16* data = target + r * stride;
#pragma unroll
    for (int32 panel = 0; panel < T::kPanels; ++panel) {
      const int32 col = panel * T::kPanelCols + chunk * 8;
      const uint4 x = *reinterpret_cast<const uint4*>(static_cast<const char*>(tile) + panel * T::kPanelBytes +
                                                      r * T::kRowBytes + (chunk ^ T::swizzle(r)) * 16);
      if constexpr (kAligned) {
        if (col < cols) *reinterpret_cast<uint4*>(data + col) = x;
      } else {
        const uint32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int32 i = 0; i < 8; ++i)
          if (col + i < cols) data[col + i] = uint16(words[i / 2] >> (16 * (i % 2)));
      }
    }
  }
}

// Zeros instead: rows [row, row_end), by kThreads threads of which this one is `thread`.
template <int32 kThreads>
__forceinline__ void store_zeros(int32 thread, uint16* first_row, int64 stride, int32 row, int32 row_end, int32 cols) {
#pragma unroll 1
  for (int32 r = row; r < row_end; ++r)
#pragma unroll 1
    for (int32 c = thread; c < cols; c += kThreads) first_row[r * stride + c] = 0;
}

}  // namespace flash
