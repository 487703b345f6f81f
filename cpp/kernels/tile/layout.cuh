// Matrices of 16-bit elements in shared memory, stored in panels and swizzled so that ldmatrix finds no bank conflict,
// and the fragments that tensor cores take from them.
#pragma once

#include "common/types.h"
#include "kernels/ptx/convert.cuh"
#include "kernels/ptx/ldmatrix.cuh"
#include "kernels/ptx/mma.cuh"

namespace flash {

// A [kRows, kCols] matrix in panels of 64 columns (or 32, where 64 does not divide). A panel's row is 128 (64) bytes,
// in chunks of 16 whose position is XORed with the row's number. These are TMA's 128 and 64-byte swizzles.
template <int32 kRowCount, int32 kColCount>
struct Tile {
  static constexpr int32 kRows = kRowCount, kCols = kColCount;
  static constexpr int32 kPanelCols = kCols % 64 == 0 ? 64 : 32;
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

// A fragment-wise reader of a Tile: ldmatrix.x4 takes the 16 x 16 block at (row, col), multiples of 16. One address per
// thread is computed once; a block's place is then a constant offset and, for its column in the panel, a XOR.
template <class T>
struct TileReader {
  uint32 address;

  // For blocks at (row + constant, constant columns).
  __forceinline__ TileReader(uint32 base, int32 row) {
    const int32 lane = threadIdx.x % 32;
    address = base + T::offset(row + lane % 16, lane / 16);
  }
  __forceinline__ uint32 at(int32 row, int32 col) const {
    return (address ^ (col % T::kPanelCols * 2)) + col / T::kPanelCols * T::kPanelBytes + row * T::kRowBytes;
  }
};

// The operands of a product of [M, K] by [K, N]. A loads [16, 16] blocks of [m, k], B loads them of [k, n].

// A as it is stored, rows m.
template <class T>
struct RowsOfA : TileReader<T> {
  using TileReader<T>::TileReader;
  __forceinline__ void load(uint32 (&a)[4], int32 m, int32 k) const { ptx::ldmatrix_x4(a, this->at(m, k)); }
};

// A stored transposed, rows k.
template <class T>
struct ColsOfA {
  TileReader<T> reader;
  __forceinline__ ColsOfA(uint32 base, int32 col) : reader(base + col / T::kPanelCols * T::kPanelBytes, 0) {
    reader.address ^= col % T::kPanelCols * 2;
  }
  __forceinline__ void load(uint32 (&a)[4], int32 m, int32 k) const {
    uint32 r[4];
    ptx::ldmatrix_x4_trans(r, reader.at(k, m));
    a[0] = r[0], a[1] = r[2], a[2] = r[1], a[3] = r[3];
  }
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

// B stored transposed, rows n (keys of K in Q K^T).
template <class T>
struct RowsOfB : TileReader<T> {
  using TileReader<T>::TileReader;
  // Fragments b0, b1 of columns [n, n + 8), then those of [n + 8, n + 16).
  __forceinline__ void load(uint32 (&b)[4], int32 k, int32 n) const {
    uint32 r[4];
    ptx::ldmatrix_x4(r, this->at(n, k));
    b[0] = r[0], b[1] = r[2], b[2] = r[1], b[3] = r[3];
  }
};

// B as it is stored, rows k (keys of V in P V). With kGroups > 1 group g of warps has every kGroups-th block of 16
// columns: this deal, unlike contiguous shares, keeps all addresses constant offsets in panels of any width.
template <class T, int32 kGroups = 1>
struct ColsOfB {
  TileReader<T> reader;
  __forceinline__ ColsOfB(uint32 base, int32 group = 0) : reader(base, 0) {
    reader.address = base + T::offset(threadIdx.x % 16, 2 * group + threadIdx.x % 32 / 16);
  }
  __forceinline__ void load(uint32 (&b)[4], int32 k, int32 n) const {
    ptx::ldmatrix_x4_trans(b, reader.at(k, n * kGroups));
  }
};

// Column in the whole matrix of the first column of n-tile `n` of group `group`.
template <int32 kGroups>
__forceinline__ int32 dealt_column(int32 n, int32 group) {
  return n / 2 * (16 * kGroups) + group * 16 + n % 2 * 8;
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

// c += a b over kK.
template <DType kDType, int32 kK, int32 kM, int32 kN, class A, class B>
__forceinline__ void gemm(Accumulator<kM, kN>& c, const A& a_operand, const B& b_operand) {
#pragma unroll
  for (int32 k = 0; k < kK; k += 16) {
    uint32 a[kM / 16][4];
#pragma unroll
    for (int32 m = 0; m < kM; m += 16) a_operand.load(a[m / 16], m, k);
#pragma unroll
    for (int32 n = 0; n < kN; n += 16) {
      uint32 b[4];
      b_operand.load(b, k, n);
#pragma unroll
      for (int32 m = 0; m < kM / 16; ++m) {
        ptx::mma_m16n8k16<kDType>(c.x[m][n / 8], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<kDType>(c.x[m][n / 8 + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// An accumulator of [kM, kN] as the A operand of the next product.
template <DType kDType, int32 kM, int32 kN>
__forceinline__ void pack(uint32 (&a)[kM / 16][kN / 16][4], const Accumulator<kM, kN>& c) {
#pragma unroll
  for (int32 m = 0; m < kM / 16; ++m)
#pragma unroll
    for (int32 n = 0; n < kN / 16; ++n) {
      const float(&left)[4] = c.x[m][2 * n];
      const float(&right)[4] = c.x[m][2 * n + 1];
      a[m][n][0] = ptx::pack<kDType>(left[0], left[1]);
      a[m][n][1] = ptx::pack<kDType>(left[2], left[3]);
      a[m][n][2] = ptx::pack<kDType>(right[0], right[1]);
      a[m][n][3] = ptx::pack<kDType>(right[2], right[3]);
    }
}

// Writes an accumulator times factor(m, h), with rows from `row` on and columns from `col` on, or those dealt to a group.
template <DType kDType, class T, int32 kGroups = 1, int32 kM, int32 kN, class Factor>
__forceinline__ void store(const Accumulator<kM, kN>& c, uint32 base, int32 row, int32 col, int32 group, Factor factor) {
  const int32 lane = threadIdx.x % 32;
#pragma unroll
  for (int32 m = 0; m < kM / 16; ++m)
#pragma unroll
    for (int32 h = 0; h < 2; ++h) {
      const float f = factor(m, h);
#pragma unroll
      for (int32 n = 0; n < kN / 8; ++n)
        ptx::st_shared(base + T::offset(row + 16 * m + 8 * h + lane / 4, (col + dealt_column<kGroups>(n, group)) / 8) +
                           lane % 4 * 4,
                       ptx::pack<kDType>(c.x[m][n][2 * h] * f, c.x[m][n][2 * h + 1] * f));
    }
}

}  // namespace flash
