// Products of a warpgroup: Tiles as operands of wgmma. Accumulators have the fragments of tile/layout.cuh, with 16 rows
// for each of the four warps.
#pragma once

#include "kernels/ptx/wgmma.cuh"
#include "kernels/tile/layout.cuh"

namespace flash {

// Fields of a matrix descriptor (PTX ISA, "Matrix descriptor format"): places and strides in units of 16 bytes, and the
// swizzle, which is that of Tile. `leading` is the stride between panels, for operands that are stored with their
// rows along k; operands whose rows lie along m or n stay within a panel and do not use it.
template <class T>
__forceinline__ uint64 matrix_descriptor(uint32 address) {
  constexpr uint64 leading = T::kPanelBytes / 16, eight_rows = 8 * T::kRowBytes / 16,
                   swizzle = T::kPanelCols == 64 ? 1 : 2;  // of 128 or of 64 bytes
  static_assert(T::kRows % 8 == 0 && T::kPanelBytes % 1024 == 0 && leading < (1 << 14));
  return uint64{(address & 0x3FFFF) >> 4} | leading << 16 | eight_rows << 32 | swizzle << 62;
}

// A or B whose rows lie along m or n: Q and K in Q K^T. at(k) is the part of 16 columns from k on.
template <class T>
struct RowsOperand {
  static constexpr bool kTransposed = false;
  uint64 descriptor;
  __forceinline__ explicit RowsOperand(uint32 tile) : descriptor(matrix_descriptor<T>(tile)) {}
  __forceinline__ uint64 at(int32 k) const {
    return descriptor + (k / T::kPanelCols * T::kPanelBytes + k % T::kPanelCols * 2) / 16;
  }
};

// B whose rows lie along k: V in P V.
template <class T>
struct ColsOperand {
  static constexpr bool kTransposed = true;
  uint64 descriptor;
  __forceinline__ explicit ColsOperand(uint32 tile) : descriptor(matrix_descriptor<T>(tile)) {}
  __forceinline__ uint64 at(int32 k) const { return descriptor + k * T::kRowBytes / 16; }
};

// Issues c = a b over kK, or c += a b if kAccumulate, as one group.
template <DType kDType, int32 kK, bool kAccumulate, int32 kN, class A, class B>
__forceinline__ void issue_gemm(Accumulator<16, kN>& c, const A& a, const B& b) {
  ptx::wgmma_fence();
#pragma unroll
  for (int32 k = 0; k < kK; k += 16)
    ptx::wgmma_ss<kDType, A::kTransposed, B::kTransposed>(c.x[0], a.at(k), b.at(k), kAccumulate || k > 0);
  ptx::wgmma_commit();
}

// The same with A in registers, as pack() leaves it.
template <DType kDType, bool kAccumulate, int32 kN, int32 kSteps, class B>
__forceinline__ void issue_gemm(Accumulator<16, kN>& c, const uint32 (&a)[1][kSteps][4], const B& b) {
  ptx::wgmma_fence();
#pragma unroll
  for (int32 step = 0; step < kSteps; ++step)
    ptx::wgmma_rs<kDType, B::kTransposed>(c.x[0], a[0][step], b.at(16 * step), kAccumulate || step > 0);
  ptx::wgmma_commit();
}

// Waits until at most kPending groups are under way, and c's is not among them.
template <int32 kPending, int32 kN>
__forceinline__ void wait_gemm(Accumulator<16, kN>& c) {
  ptx::wgmma_wait<kPending>();
  ptx::settled(c.x[0]);
}

}  // namespace flash
