// Products of a warpgroup: Tiles as operands of wgmma. Accumulators have the fragments of tile/layout.cuh, with 16 rows
// for each of the four warps.
#pragma once

#include "kernels/ptx/compiler.cuh"
#include "kernels/ptx/wgmma.cuh"
#include "kernels/tile/layout.cuh"

namespace flash {

// A matrix descriptor (PTX ISA, "Matrix descriptor format"). Places and strides count 16 bytes. `leading`, the stride
// between panels, is for operands that are stored with their rows along k; those whose rows lie along m or n stay
// within a panel and do not use it. The upper half is a constant, so that moving on is one addition of 32 bits.
template <class T>
struct MatrixDescriptor {
  static constexpr uint32 kLeading = T::kPanelBytes / 16, kEightRows = 8 * T::kRowBytes / 16;
  static constexpr uint32 kSwizzle = T::kPanelCols == 64 ? 1 : 2;  // of 128 or of 64 bytes
  static_assert(T::kPanelBytes % 1024 == 0 && kLeading < (1 << 14));
  uint32 lower;

  // In a cluster, addresses of shared memory have the thread block's rank in their upper bits.
  __forceinline__ explicit MatrixDescriptor(uint32 address) : lower((address / 16 & 0x3FFF) | kLeading << 16) {
    // All descriptors of a loop at once, computed in front of it, would take more registers than there are.
    ptx::opaque(lower);
  }
  __forceinline__ uint64 plus(int32 bytes) const {
    return uint64{kEightRows | kSwizzle << 30} << 32 | (lower + bytes / 16);
  }
};

// A or B whose rows lie along m or n, from row `row` on: Q and K in Q K^T. at(k) is the part of 16 columns from k on.
template <class T>
struct RowsOperand {
  static constexpr bool kTransposed = false;
  MatrixDescriptor<T> descriptor;
  __forceinline__ explicit RowsOperand(uint32 tile, int32 row = 0) : descriptor(tile + row * T::kRowBytes) {}
  __forceinline__ uint64 at(int32 k) const {
    return descriptor.plus(k / T::kPanelCols * T::kPanelBytes + k % T::kPanelCols * 2);
  }
};

// A or B whose rows lie along k, from column `col` on, where a panel starts: V in P V.
template <class T>
struct ColsOperand {
  static constexpr bool kTransposed = true;
  MatrixDescriptor<T> descriptor;
  __forceinline__ explicit ColsOperand(uint32 tile, int32 col = 0)
      : descriptor(tile + col / T::kPanelCols * T::kPanelBytes) {}
  __forceinline__ uint64 at(int32 k) const { return descriptor.plus(k * T::kRowBytes); }
};

// A value that is the same in all lanes, so that the compiler knows it: descriptors and addresses are to be in uniform
// registers.
__forceinline__ int32 uniform(int32 x) {
  return __shfl_sync(~0u, x, 0);
}

// Issues c = a b over kK, or c += a b if `accumulate`, as one group.
template <DType kDType, int32 kK, int32 kN, class A, class B>
__forceinline__ void issue_gemm(Accumulator<16, kN>& c, const A& a, const B& b, bool accumulate) {
  ptx::wgmma_fence();
#pragma unroll
  for (int32 k = 0; k < kK; k += 16)
    ptx::wgmma_ss<kDType, A::kTransposed, B::kTransposed>(c.x[0], a.at(k), b.at(k), accumulate || k > 0);
  ptx::wgmma_commit();
}
template <DType kDType, int32 kK, bool kAccumulate, int32 kN, class A, class B>
__forceinline__ void issue_gemm(Accumulator<16, kN>& c, const A& a, const B& b) {
  issue_gemm<kDType, kK>(c, a, b, kAccumulate);
}

// The same with A in registers, as pack() leaves it, or of it the columns [kFrom, kTo).
template <DType kDType, bool kAccumulate, int32 kFrom = 0, int32 kTo = kToEnd, int32 kN, int32 kSteps, class B>
__forceinline__ void issue_gemm(Accumulator<16, kN>& c, const uint32 (&a)[1][kSteps][4], const B& b) {
  ptx::wgmma_fence();
#pragma unroll
  for (int32 step = kFrom / 16; step < min_of(kTo, 16 * kSteps) / 16; ++step)
    ptx::wgmma_rs<kDType, B::kTransposed>(c.x[0], a[0][step], b.at(16 * step), kAccumulate || step > kFrom / 16);
  ptx::wgmma_commit();
}

// An A whose rows lie along m, from row `row` of a Tile on, which many products have: its first kHeldCols columns stay
// in registers, where no product reads them from shared memory again.
template <class T, int32 kHeldCols>
struct HeldRows {
  uint32 tile;
  int32 row;
  uint32 held[max_of(kHeldCols / 16, 1)][4];

  __forceinline__ HeldRows(uint32 shared, int32 tile_offset, int32 first_row, int32 warp_row)
      : tile(shared + tile_offset), row(first_row) {
    const RowsOfA<T> rows{{shared, tile_offset, warp_row}};
#pragma unroll
    for (int32 k = 0; k < kHeldCols; k += 16) rows.load(held[k / 16], 0, k);
  }
};
template <DType kDType, bool kAccumulate, int32 kN, class T, int32 kHeldCols, class B>
__forceinline__ void issue_gemm(Accumulator<16, kN>& c, const HeldRows<T, kHeldCols>& a, const B& b) {
  ptx::wgmma_fence();
#pragma unroll
  for (int32 k = 0; k < kHeldCols; k += 16)
    ptx::wgmma_rs<kDType, B::kTransposed>(c.x[0], a.held[k / 16], b.at(k), kAccumulate || k > 0);
  if constexpr (kHeldCols < T::kCols) {
    const RowsOperand<T> rest(a.tile, a.row);
#pragma unroll
    for (int32 k = kHeldCols; k < T::kCols; k += 16)
      ptx::wgmma_ss<kDType, false, B::kTransposed>(c.x[0], rest.at(k), b.at(k), kAccumulate || k > 0);
  }
  ptx::wgmma_commit();
}

// Waits until at most kPending groups are under way, and c's is not among them.
template <int32 kPending, int32 kN>
__forceinline__ void wait_gemm(Accumulator<16, kN>& c) {
  ptx::wgmma_wait<kPending>();
  ptx::settled(c.x[0]);
}

}  // namespace flash
