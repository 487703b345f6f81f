// Vectors of float by the compilers' vector extension (g++, clang), and the two things attention needs of them: a
// matrix product and 2^x. Compiled once per instruction set, see kernels.h; all in an unnamed namespace, so that no
// copy built for a newer processor can be linked into code for an older one.
#pragma once

#include <string.h>

#include "common/types.h"

#ifndef FLASH_VECTOR_BYTES
#error "FLASH_VECTOR_BYTES must be defined by the build: 16, 32 or 64"
#endif

namespace flash::cpu {
namespace {

typedef float VecF __attribute__((vector_size(FLASH_VECTOR_BYTES)));
typedef int32 VecI __attribute__((vector_size(FLASH_VECTOR_BYTES)));
typedef uint32 VecU __attribute__((vector_size(FLASH_VECTOR_BYTES)));

constexpr int64 kLanes = FLASH_VECTOR_BYTES / sizeof(float);

// Rows of an accumulator block held in registers; with two vectors a row it fits 32 registers, or 16.
#if FLASH_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kBlockRows = 8;
#else
constexpr int kBlockRows = 4;
#endif

inline VecF load(const float* p) {
  VecF x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline VecI load(const int32* p) {
  VecI x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, VecF x) {
  memcpy(p, &x, sizeof x);
}
inline VecF splat(float x) {
  return x - VecF{};
}  // not +: -0 + 0 is 0, so that would cost an addition
inline VecI splat(int32 x) {
  return x - VecI{};
}

// `mask` lanes are 0 or -1, as comparisons give them.
inline VecF select(VecI mask, VecF a, VecF b) {
  return mask ? a : b;
}
inline VecF max(VecF a, VecF b) {
  return select(a > b, a, b);
}

// 2^x to 1e-7 relative; 0 below -127, inf from 128 on, NaN for NaN. Comparisons are written so that NaN passes.
inline VecF exp2(VecF x) {
  x = select(x < splat(-127.0f), splat(-127.0f), x);
  x = select(x > splat(128.0f), splat(128.0f), x);
  const VecF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const VecF shifted = x + magic;
  const VecF f = x - (shifted - magic);  // [-0.5, 0.5]
  const VecU n = (VecU)shifted - 0x4B400000u;
  // Minimax polynomial of 2^f, relative error 1.9e-9 before rounding.
  VecF y = splat(1.5345811e-4f);
  y = y * f + 1.33999311e-3f;
  y = y * f + 9.61848907e-3f;
  y = y * f + 5.55032864e-2f;
  y = y * f + 2.40226462e-1f;
  y = y * f + 6.93147182e-1f;
  y = y * f + 1.0f;
  return y * (VecF)((n + 127u) << 23);
}

// To 3e-7 relative.
inline VecF tanh(VecF x) {
  const VecF magnitude = select(x < splat(0.0f), -x, x);
  const VecF e = exp2(magnitude * (-2.0f * kLog2e));
  const VecF y = (1.0f - e) / (1.0f + e);
  const VecF large = select(x < splat(0.0f), -y, y);
  // Near 0, where 1 - e cancels, the Taylor series.
  const VecF x2 = x * x;
  VecF series = splat(-1382.0f / 155925.0f);
  series = series * x2 + 62.0f / 2835.0f;
  series = series * x2 - 17.0f / 315.0f;
  series = series * x2 + 2.0f / 15.0f;
  series = series * x2 - 1.0f / 3.0f;
  return select(magnitude < splat(0.3f), x + x * x2 * series, large);
}

// C[kRows, kVecs * kLanes] (+)= A[kRows, depth] B[depth, kVecs * kLanes], the sums in registers.
template <bool kTransposedA, int kRows, int kVecs>
inline void gemm_block(int64 depth, const float* a, int64 lda, const float* b, int64 ldb, float* c, int64 ldc,
                       bool accumulate) {
  VecF sum[kRows][kVecs];
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVecs; ++v) sum[i][v] = accumulate ? load(c + i * ldc + v * kLanes) : VecF{};
  for (int64 k = 0; k < depth; ++k) {
    VecF row[kVecs];
    for (int v = 0; v < kVecs; ++v) row[v] = load(b + k * ldb + v * kLanes);
    for (int i = 0; i < kRows; ++i) {
      const VecF x = splat(kTransposedA ? a[k * lda + i] : a[i * lda + k]);
      for (int v = 0; v < kVecs; ++v) sum[i][v] += x * row[v];
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVecs; ++v) store(c + i * ldc + v * kLanes, sum[i][v]);
}

template <bool kTransposedA, int kVecs>
inline void gemm_panel(int64 rows, int64 depth, const float* a, int64 lda, const float* b, int64 ldb, float* c,
                       int64 ldc, bool accumulate) {
  int64 i = 0;
  auto at = [&](int64 row) { return a + (kTransposedA ? row : row * lda); };
  for (; i + kBlockRows <= rows; i += kBlockRows)
    gemm_block<kTransposedA, kBlockRows, kVecs>(depth, at(i), lda, b, ldb, c + i * ldc, ldc, accumulate);
  for (; i + 4 <= rows; i += 4)
    gemm_block<kTransposedA, 4, kVecs>(depth, at(i), lda, b, ldb, c + i * ldc, ldc, accumulate);
  for (; i < rows; ++i) gemm_block<kTransposedA, 1, kVecs>(depth, at(i), lda, b, ldb, c + i * ldc, ldc, accumulate);
}

// C[rows, cols] = A[rows, depth] B[depth, cols], or += with `accumulate`. All are row-major but A with kTransposedA, of
// which element (i, k) is at a[k * lda + i]. `cols` must be a multiple of kLanes.
template <bool kTransposedA>
void gemm(int64 rows, int64 cols, int64 depth, const float* a, int64 lda, const float* b, int64 ldb, float* c,
          int64 ldc, bool accumulate) {
  int64 j = 0;
  for (; j + 2 * kLanes <= cols; j += 2 * kLanes)
    gemm_panel<kTransposedA, 2>(rows, depth, a, lda, b + j, ldb, c + j, ldc, accumulate);
  if (j < cols) gemm_panel<kTransposedA, 1>(rows, depth, a, lda, b + j, ldb, c + j, ldc, accumulate);
}

}  // namespace
}  // namespace flash::cpu
