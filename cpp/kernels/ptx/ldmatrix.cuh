// ldmatrix: four 8 x 8 matrices of 16-bit elements from shared memory into fragments; and back.
#pragma once

#include "common/types.h"

namespace flash::ptx {

__forceinline__ uint32 shared_address(const void* p) {
  return uint32(__cvta_generic_to_shared(p));
}

// Lane l gives the address of row l % 8 of matrix l / 8 and receives elements (l / 4, 2 (l % 4) + {0, 1}) of each.
__forceinline__ void ldmatrix_x4(uint32 (&r)[4], uint32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The same of the transposed matrices.
__forceinline__ void ldmatrix_x4_trans(uint32 (&r)[4], uint32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The other way round, from Hopper on.
__forceinline__ void stmatrix_x4(uint32 address, const uint32 (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

__forceinline__ void st_shared(uint32 address, uint32 value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__forceinline__ void st_shared_x4(uint32 address, uint32 x, uint32 y, uint32 z, uint32 w) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}

}  // namespace flash::ptx
