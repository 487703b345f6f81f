// A boolean mask beside a tile of scores: read 16 keys of a row at a time, by whichever lane, and handed around as a
// bit each. Element by element, a tile would take thirty times as many loads. Bytes are 0 or 1, as XLA has them.
#pragma once

#include "common/config.h"
#include "common/problem.h"

namespace flash {

// The thread's part of a tile of kM rows and kN columns: queries and keys, or keys and queries if kTransposed. Only if
// kC.mask_wide.
template <KernelConfig kC, bool kTransposed, int32 kM, int32 kN>
class MaskBits {
 public:
  // The tile starts at (row, col), multiples of 16. What lies beyond the mask is read elsewhere in it. `mask` is at
  // [query 0, key 0]. To be called by whole warps.
  __forceinline__ MaskBits(const Problem& p, const uint8* mask, int32 row, int32 col) {
    const int32 lane = threadIdx.x % 32, last_query = int32(p.seqlen_q) - 1, last_chunk = int32(p.seqlen_kv) - 16;
    auto read = [&](int32 query, int32 key) {
      const int64 i = min_of(query, last_query);
      return bits_of(*reinterpret_cast<const uint4*>(mask + i * p.mask.row_stride + min_of(key, last_chunk)));
    };
    if constexpr (kTransposed) {
      // Every lane reads the keys of one query of 32.
#pragma unroll
      for (int32 m = 0; m < kM / 16; ++m) {
        uint32 own[kWords] = {};
#pragma unroll
        for (int32 n = 0; n < kN; n += 32) own[n / 64] |= read(col + n + lane, row + 16 * m) << n % 64 / 2;
#pragma unroll
        for (int32 i = 0; i < kWords; ++i)
#pragma unroll
          for (int32 n = 0; n < min_of(kN / 8, 4); ++n)
#pragma unroll
            for (int32 e = 0; e < 2; ++e)
              word_[m][i][2 * n + e] = __shfl_sync(~0u, own[i], 8 * n + lane % 4 * 2 + e) >> lane / 4;
      }
    } else {
      // Of the row that four lanes share, each reads every fourth chunk of 16 keys.
#pragma unroll
      for (int32 r = 0; r < kM / 8; ++r) {
        uint32 own = 0;
#pragma unroll
        for (int32 n = 0; n < kN; n += 64) own |= read(row + 8 * r + lane / 4, col + n + lane % 4 * 16) << n / 4;
#pragma unroll
        for (int32 i = 0; i < 4; ++i) word_[r / 2][r % 2][i] = __shfl_sync(~0u, own, lane / 4 * 4 + i) >> lane % 4 * 2;
      }
    }
  }

  // Whether the thread's row r sees its column e of n-tile n.
  __forceinline__ bool shows(int32 r, int32 n, int32 e) const {
    return kTransposed ? word_[r / 2][n / 8][n % 4 * 2 + e] >> (n / 4 % 2 * 16 + r % 2 * 8) & 1
                       : word_[r / 2][r % 2][n / 2 % 4] >> (n / 8 * 16 + n % 2 * 8 + e) & 1;
  }

 private:
  static constexpr int32 kWords = (kN + 63) / 64;
  static_assert(kTransposed || kN <= 128);

  static __forceinline__ uint32 bits_of(uint4 x) {
    auto four = [](uint32 bytes) { return (bytes & 0x01010101) * 0x01020408 >> 24; };
    return four(x.x) | four(x.y) << 4 | four(x.z) << 8 | four(x.w) << 12;
  }

  uint32 word_[kM / 16][kTransposed ? kWords : 2][kTransposed ? 8 : 4];
};

// Stands for it in kernels without one.
struct NoMaskBits {};

}  // namespace flash
