// Matrices of 16-bit elements in shared memory, stored in panels and swizzled so that ldmatrix finds no bank conflict,
// and the fragments that tensor cores take from them.
#pragma once

#include "common/config.h"
#include "kernels/ptx/convert.cuh"
#include "kernels/ptx/ldmatrix.cuh"
#include "kernels/ptx/mma.cuh"

namespace flash {

// A [kRows, kCols] matrix in panels of 64 columns (or 32, where 64 does not divide). A panel's row is 128 (64) bytes,
// in chunks of 16 whose position is XORed with the row's number. These are TMA's 128 and 64-byte swizzles.
template <int32 kRowCount, int32 kColCount, int32 kPanelColCount = panel_cols(kColCount)>
struct Tile {
  static constexpr int32 kRows = kRowCount, kCols = kColCount;
  static constexpr int32 kPanelCols = kPanelColCount;
  static constexpr int32 kPanels = kCols / kPanelCols;
  static constexpr int32 kChunks = kPanelCols / 8;  // per row of a panel
  static constexpr int32 kRowBytes = 2 * kPanelCols;
  static constexpr int32 kPanelBytes = kRows * kRowBytes;
  static constexpr int32 kBytes = kPanels * kPanelBytes;
  static_assert(kCols % 32 == 0 && kRows % 16 == 0);

  static __forceinline__ int32 swizzle(int32 row) { return kPanelCols == 64 ? row & 7 : (row >> 1) & 3; }

  // Byte offset of the 16 bytes of columns [8 chunk, 8 chunk + 8).
  static __forceinline__ int32 offset(int32 row, int32 chunk) {
    return chunk / kChunks * kPanelBytes + row * kRowBytes + ((chunk % kChunks) ^ swizzle(row)) * 16;
  }
};

// The order in which ldmatrix.x4 takes the four 8 x 8 matrices of a 16 x 16 block. Operands come out in the order in
// which mma.sync wants them, so that no register has to be moved.
enum class Order { kDown, kAcross };

// A fragment-wise reader of a Tile, or with stmatrix a writer: the 16 x 16 block at (row, col), multiples of 16. One
// address per thread is computed once; a block's place is then a constant offset and, for its column in the panel, a
// XOR. The tile's own place in shared memory, a constant too, is added last, so that readers of tiles of one shape
// share their registers.
template <class T, Order kOrder>
struct TileReader {
  uint32 address;
  int32 tile;

  // For blocks at (row + constant, col + constant) of the tile `tile_offset` bytes into shared memory. Constant columns
  // must not carry into the bits of `col`: it is 0, or the column of a share whose width is a power of two, or dealt as
  // ColsOfB does.
  __forceinline__ TileReader(uint32 shared, int32 tile_offset, int32 row, int32 col = 0) : tile(tile_offset) {
    const int32 first = threadIdx.x % 8, second = threadIdx.x / 8 % 2, third = threadIdx.x / 16 % 2;
    address = shared + (kOrder == Order::kDown ? T::offset(row + first + 8 * second, col / 8 + third)
                                               : T::offset(row + first + 8 * third, col / 8 + second));
  }
  __forceinline__ uint32 at(int32 row, int32 col) const {
    return (address ^ (col % T::kPanelCols * 2)) + (tile + col / T::kPanelCols * T::kPanelBytes + row * T::kRowBytes);
  }
  // The same block of stage `i` of tiles that lie one behind the other.
  __forceinline__ TileReader stage(int32 i) const {
    TileReader next = *this;
    next.address += i * T::kBytes;
    return next;
  }
};

// The operands of a product of [M, K] by [K, N]. A loads [16, 16] blocks of [m, k], B loads them of [k, n].

// A as it is stored, rows m.
template <class T>
struct RowsOfA {
  TileReader<T, Order::kDown> reader;
  __forceinline__ void load(uint32 (&a)[4], int32 m, int32 k) const { ptx::ldmatrix_x4(a, reader.at(m, k)); }
};

// A stored transposed, rows k.
template <class T>
struct ColsOfA {
  TileReader<T, Order::kAcross> reader;
  __forceinline__ void load(uint32 (&a)[4], int32 m, int32 k) const { ptx::ldmatrix_x4_trans(a, reader.at(k, m)); }
};

// A that an accumulator left in registers: [M, K] as pairs of 16-bit floats.
template <int32 kM, int32 kK>
struct RegistersOfA {
  uint32 (&fragment)[kM / 16][kK / 16][4];
  __forceinline__ void load(uint32 (&a)[4], int32 m, int32 k) const {
#pragma unroll
    for (int32 i = 0; i < 4; ++i) a[i] = fragment[m / 16][k / 16][i];
  }
};

// B stored transposed, rows n (keys of K in Q K^T). A load gives the fragments of columns [n, n + 8), then those of
// [n + 8, n + 16).
template <class T>
struct RowsOfB {
  TileReader<T, Order::kAcross> reader;
  __forceinline__ void load(uint32 (&b)[4], int32 k, int32 n) const { ptx::ldmatrix_x4(b, reader.at(n, k)); }
};

// B as it is stored, rows k (keys of V in P V). With kGroups > 1 group g of warps, whose reader starts at column 16 g,
// has every kGroups-th block of 16 columns: this deal, unlike contiguous shares, keeps all addresses constant offsets
// in panels of any width.
template <class T, int32 kGroups = 1>
struct ColsOfB {
  TileReader<T, Order::kDown> reader;
  __forceinline__ void load(uint32 (&b)[4], int32 k, int32 n) const {
    ptx::ldmatrix_x4_trans(b, reader.at(k, n * kGroups));
  }
};

// Column, behind the group's first, of the first column of n-tile `n`.
template <int32 kGroups>
__forceinline__ constexpr int32 dealt_column(int32 n) {
  return n / 2 * (16 * kGroups) + n % 2 * 8;
}

// An accumulator of [kM, kN]: fragment [m][n] holds rows 16 m + lane / 4 + 8 h and columns 8 n + 2 (lane % 4) + e in
// element 2 h + e.
template <int32 kM, int32 kN>
struct Accumulator {
  static constexpr int32 kMTiles = kM / 16, kNTiles = kN / 8;
  static_assert(kM % 16 == 0 && kN % 16 == 0);
  float x[kMTiles][kNTiles][4];

  __forceinline__ void clear() {
#pragma unroll
    for (int32 m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int32 n = 0; n < kNTiles; ++n)
#pragma unroll
        for (int32 e = 0; e < 4; ++e) x[m][n][e] = 0.0f;
  }
};

// c += a b over kK. Fragments are fetched up to two products ahead of their use.
template <DType kDType, int32 kK, int32 kM, int32 kN, class A, class B>
__forceinline__ void gemm(Accumulator<kM, kN>& c, const A& a_operand, const B& b_operand) {
  constexpr int32 kColumns = kN / 16, kAhead = kColumns > 1 ? 2 : 1, kSteps = kK / 16 * kColumns;
  uint32 a[2][kM / 16][4], b[kAhead + 1][4];
  auto fetch = [&](int32 step) {
    if (step >= kSteps) return;
    const int32 k = step / kColumns * 16, n = step % kColumns * 16;
    if (n == 0) {
#pragma unroll
      for (int32 m = 0; m < kM; m += 16) a_operand.load(a[k / 16 % 2][m / 16], m, k);
    }
    b_operand.load(b[step % (kAhead + 1)], k, n);
  };
#pragma unroll
  for (int32 step = 0; step < kAhead; ++step) fetch(step);
    // Two loops, as compilers would not unroll one of kSteps.
#pragma unroll
  for (int32 k = 0; k < kK / 16; ++k)
#pragma unroll
    for (int32 n = 0; n < kColumns; ++n) {
      const int32 step = k * kColumns + n;
      fetch(step + kAhead);
      const uint32(&b_now)[4] = b[step % (kAhead + 1)];
#pragma unroll
      for (int32 m = 0; m < kM / 16; ++m) {
        ptx::mma_m16n8k16<kDType>(c.x[m][2 * n], a[k % 2][m], b_now[0], b_now[1]);
        ptx::mma_m16n8k16<kDType>(c.x[m][2 * n + 1], a[k % 2][m], b_now[2], b_now[3]);
      }
    }
}

inline constexpr int32 kToEnd = 1 << 30;  // as the end of a range of columns

// An accumulator of [kM, kN] as the A operand of the next product, or of it the columns [kFrom, kTo).
template <DType kDType, int32 kFrom = 0, int32 kTo = kToEnd, int32 kM, int32 kN>
__forceinline__ void pack(uint32 (&a)[kM / 16][kN / 16][4], const Accumulator<kM, kN>& c) {
#pragma unroll
  for (int32 m = 0; m < kM / 16; ++m)
#pragma unroll
    for (int32 n = kFrom / 16; n < min_of(kTo, kN) / 16; ++n) {
      const float(&left)[4] = c.x[m][2 * n];
      const float(&right)[4] = c.x[m][2 * n + 1];
      a[m][n][0] = ptx::pack<kDType>(left[0], left[1]);
      a[m][n][1] = ptx::pack<kDType>(left[2], left[3]);
      a[m][n][2] = ptx::pack<kDType>(right[0], right[1]);
      a[m][n][3] = ptx::pack<kDType>(right[2], right[3]);
    }
}

// The way back: fragments as pack() leaves them.
template <DType kDType, int32 kM, int32 kN>
__forceinline__ void unpack(Accumulator<kM, kN>& c, const uint32 (&a)[kM / 16][kN / 16][4]) {
#pragma unroll
  for (int32 m = 0; m < kM / 16; ++m)
#pragma unroll
    for (int32 n = 0; n < kN / 8; ++n)
#pragma unroll
      for (int32 e = 0; e < 4; ++e)
        c.x[m][n][e] = ptx::unpack<kDType>(uint16(a[m][n / 2][n % 2 * 2 + e / 2] >> (16 * (e % 2))));
}

// The writing counterpart of TileReader.
template <class T>
struct TileWriter {
  TileReader<T, Order::kDown> place;
  __forceinline__ TileWriter(uint32 shared, int32 tile_offset, int32 row, int32 col = 0)
      : place(shared, tile_offset, 0) {
    const int32 lane = threadIdx.x % 32;
    place.address = shared + T::offset(row + lane / 4, col / 8) + lane % 4 * 4;
  }
  // Writes an accumulator times factor(m, h), with columns side by side or dealt.
  template <DType kDType, int32 kGroups = 1, int32 kM, int32 kN, class Factor>
  __forceinline__ void store(const Accumulator<kM, kN>& c, Factor factor) const {
#pragma unroll
    for (int32 m = 0; m < kM / 16; ++m)
#pragma unroll
      for (int32 h = 0; h < 2; ++h) {
        const float f = factor(m, h);
#pragma unroll
        for (int32 n = 0; n < kN / 8; ++n)
          ptx::st_shared(place.at(16 * m + 8 * h, dealt_column<kGroups>(n)),
                         ptx::pack<kDType>(c.x[m][n][2 * h] * f, c.x[m][n][2 * h + 1] * f));
      }
  }
};

// From Hopper on, writes fragments as pack() leaves them to where `place` would read them, or of them the columns
// [kFrom, kTo).
template <int32 kFrom = 0, int32 kTo = kToEnd, class T, int32 kM, int32 kN>
__forceinline__ void store_fragments(const TileReader<T, Order::kDown>& place, const uint32 (&a)[kM][kN][4]) {
#pragma unroll
  for (int32 m = 0; m < kM; ++m)
#pragma unroll
    for (int32 n = kFrom / 16; n < min_of(kTo, 16 * kN) / 16; ++n) ptx::stmatrix_x4(place.at(16 * m, 16 * n), a[m][n]);
}

}  // namespace flash
