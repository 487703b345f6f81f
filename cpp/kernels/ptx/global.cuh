// 16 bytes to global memory at once: of four words in braces the compiler at times makes four stores.
#pragma once

#include "common/types.h"

namespace flash::ptx {

__forceinline__ void st_global_x4(void* p, const uint32 (&x)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

}  // namespace flash::ptx
