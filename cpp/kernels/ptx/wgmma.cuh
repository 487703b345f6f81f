// wgmma: the tensor cores of Hopper (sm_90a), for a warpgroup of four warps. A product runs beside what follows it,
// from its issue to the wait for its group.
#pragma once

#include "common/types.h"

// The registers of an accumulator of n columns, as text and as operands.
#define FLASH_TEXT_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FLASH_TEXT_32 FLASH_TEXT_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FLASH_TEXT_48 FLASH_TEXT_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define FLASH_TEXT_64 FLASH_TEXT_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define FLASH_TEXT_80 FLASH_TEXT_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FLASH_TEXT_96 FLASH_TEXT_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FLASH_TEXT_112 FLASH_TEXT_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define FLASH_TEXT_128 FLASH_TEXT_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define FLASH_TEXT_144 FLASH_TEXT_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define FLASH_TEXT_160 FLASH_TEXT_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define FLASH_TEXT_176 FLASH_TEXT_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define FLASH_TEXT_192 FLASH_TEXT_176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define FLASH_TEXT_208 FLASH_TEXT_192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define FLASH_TEXT_224 FLASH_TEXT_208 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define FLASH_TEXT_240 FLASH_TEXT_224 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define FLASH_TEXT_256 FLASH_TEXT_240 ", %120, %121, %122, %123, %124, %125, %126, %127"

#define FLASH_FOUR(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define FLASH_REGISTERS_16 FLASH_FOUR(0), FLASH_FOUR(1)
#define FLASH_REGISTERS_32 FLASH_REGISTERS_16, FLASH_FOUR(2), FLASH_FOUR(3)
#define FLASH_REGISTERS_48 FLASH_REGISTERS_32, FLASH_FOUR(4), FLASH_FOUR(5)
#define FLASH_REGISTERS_64 FLASH_REGISTERS_48, FLASH_FOUR(6), FLASH_FOUR(7)
#define FLASH_REGISTERS_80 FLASH_REGISTERS_64, FLASH_FOUR(8), FLASH_FOUR(9)
#define FLASH_REGISTERS_96 FLASH_REGISTERS_80, FLASH_FOUR(10), FLASH_FOUR(11)
#define FLASH_REGISTERS_112 FLASH_REGISTERS_96, FLASH_FOUR(12), FLASH_FOUR(13)
#define FLASH_REGISTERS_128 FLASH_REGISTERS_112, FLASH_FOUR(14), FLASH_FOUR(15)
#define FLASH_REGISTERS_144 FLASH_REGISTERS_128, FLASH_FOUR(16), FLASH_FOUR(17)
#define FLASH_REGISTERS_160 FLASH_REGISTERS_144, FLASH_FOUR(18), FLASH_FOUR(19)
#define FLASH_REGISTERS_176 FLASH_REGISTERS_160, FLASH_FOUR(20), FLASH_FOUR(21)
#define FLASH_REGISTERS_192 FLASH_REGISTERS_176, FLASH_FOUR(22), FLASH_FOUR(23)
#define FLASH_REGISTERS_208 FLASH_REGISTERS_192, FLASH_FOUR(24), FLASH_FOUR(25)
#define FLASH_REGISTERS_224 FLASH_REGISTERS_208, FLASH_FOUR(26), FLASH_FOUR(27)
#define FLASH_REGISTERS_240 FLASH_REGISTERS_224, FLASH_FOUR(28), FLASH_FOUR(29)
#define FLASH_REGISTERS_256 FLASH_REGISTERS_240, FLASH_FOUR(30), FLASH_FOUR(31)

// The operands behind those registers count on from n / 2; whether d is added to is a predicate, not an immediate.
#define FLASH_WGMMA_SS(type, n, a_, b_, accumulate_, trans_a_, trans_b_)                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate_                                   \
               ", 0;\n"                                                                            \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" FLASH_TEXT_##n \
               "}, %" #a_ ", %" #b_ ", p, 1, 1, %" #trans_a_ ", %" #trans_b_ ";\n}"                \
               : FLASH_REGISTERS_##n                                                               \
               : "l"(a), "l"(b), "r"(int32(accumulate)), "n"(kTransA), "n"(kTransB))
#define FLASH_WGMMA_RS(type, n, a0_, a1_, a2_, a3_, b_, accumulate_, trans_b_)                          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate_                                        \
               ", 0;\n"                                                                                 \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" FLASH_TEXT_##n      \
               "}, {%" #a0_ ", %" #a1_ ", %" #a2_ ", %" #a3_ "}, %" #b_ ", p, 1, 1, %" #trans_b_ ";\n}" \
               : FLASH_REGISTERS_##n                                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int32(accumulate)), "n"(kTransB))

#define FLASH_WGMMA(kind, n, ...)                 \
  if constexpr (kN == n) {                        \
    if constexpr (kDType == DType::kBF16)         \
      FLASH_WGMMA_##kind("bf16", n, __VA_ARGS__); \
    else                                          \
      FLASH_WGMMA_##kind("f16", n, __VA_ARGS__);  \
  }

namespace flash::ptx {

// d [64, kN] (+)= a [64, 16] * b [16, kN], both in shared memory, each given by a matrix descriptor. Transposed
// operands are stored with m (of a) or n (of b) along the rows. Fragments of d are those of mma_m16n8k16: warp w has
// rows [16 w, 16 w + 16), in d[n] columns [8 n, 8 n + 8).
template <DType kDType, bool kTransA, bool kTransB, int32 kTiles>
__forceinline__ void wgmma_ss(float (&d)[kTiles][4], uint64 a, uint64 b, bool accumulate) {
  constexpr int32 kN = 8 * kTiles;
  static_assert(kN % 16 == 0 && kN <= 256 && kN != 16 && kN != 48 && kN != 144 && kN != 208 && kN != 224 && kN != 240);
  FLASH_WGMMA(SS, 32, 16, 17, 18, 19, 20)
  FLASH_WGMMA(SS, 64, 32, 33, 34, 35, 36)
  FLASH_WGMMA(SS, 80, 40, 41, 42, 43, 44)
  FLASH_WGMMA(SS, 96, 48, 49, 50, 51, 52)
  FLASH_WGMMA(SS, 112, 56, 57, 58, 59, 60)
  FLASH_WGMMA(SS, 128, 64, 65, 66, 67, 68)
  FLASH_WGMMA(SS, 160, 80, 81, 82, 83, 84)
  FLASH_WGMMA(SS, 176, 88, 89, 90, 91, 92)
  FLASH_WGMMA(SS, 192, 96, 97, 98, 99, 100)
  FLASH_WGMMA(SS, 256, 128, 129, 130, 131, 132)
}

// The same with a in registers, as fragments of mma_m16n8k16.
template <DType kDType, bool kTransB, int32 kTiles>
__forceinline__ void wgmma_rs(float (&d)[kTiles][4], const uint32 (&a)[4], uint64 b, bool accumulate) {
  constexpr int32 kN = 8 * kTiles;
  static_assert(kN % 16 == 0 && kN <= 256 && kN != 16 && kN != 48 && kN != 144 && kN != 208 && kN != 224 && kN != 240);
  FLASH_WGMMA(RS, 32, 16, 17, 18, 19, 20, 21, 22)
  FLASH_WGMMA(RS, 64, 32, 33, 34, 35, 36, 37, 38)
  FLASH_WGMMA(RS, 80, 40, 41, 42, 43, 44, 45, 46)
  FLASH_WGMMA(RS, 96, 48, 49, 50, 51, 52, 53, 54)
  FLASH_WGMMA(RS, 112, 56, 57, 58, 59, 60, 61, 62)
  FLASH_WGMMA(RS, 128, 64, 65, 66, 67, 68, 69, 70)
  FLASH_WGMMA(RS, 160, 80, 81, 82, 83, 84, 85, 86)
  FLASH_WGMMA(RS, 176, 88, 89, 90, 91, 92, 93, 94)
  FLASH_WGMMA(RS, 192, 96, 97, 98, 99, 100, 101, 102)
  FLASH_WGMMA(RS, 256, 128, 129, 130, 131, 132, 133, 134)
}

// In front of the first product behind any other write of its registers.
__forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending groups are under way. What is ready then must also be named to settled().
template <int32 kPending>
__forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving a use of d in front of the wait, of which it does not know that it writes d. In front
// of products: has d written by now.
template <int32 kTiles>
__forceinline__ void settled(float (&d)[kTiles][4]) {
#pragma unroll
  for (int32 n = 0; n < kTiles; ++n) asm volatile("" : FLASH_FOUR(n)::"memory");
}

}  // namespace flash::ptx
