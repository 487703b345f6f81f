// Dropout bits: which elements of the attention matrix are kept. A pure function of (key, batch, head, query position,
// key position), so the mask does not depend on tile sizes, devices or sharding. Philox-4x32 with 7 rounds: Salmon et
// al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
//
// One Philox call yields 16 random bytes for the 4 x 4 elements (i, j) of a 32 x 32 tile that share i mod 8 and j
// mod 8. The rule is the same in i and j, and these strides of 8 are those of tensor-core fragments: a thread owns what
// one call yields whether its tile holds S or S transposed.
#pragma once

#include "common/types.h"

namespace flash {

struct DropoutStream {
  uint32 key[2];
  uint32 batch;
  uint32 head;
};

struct RandomBytes {
  uint32 word[4];  // word w, byte b belongs to row 8 w + (i mod 8) and column 8 b + (j mod 8) of the tile
};

static constexpr RandomBytes philox_4x32_7(const uint32 (&counter)[4], const uint32 (&key)[2]) {
  uint32 c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
  for (int32 round = 0; round < 7; ++round) {
    const uint64 product0 = uint64{0xD2511F53u} * c0, product1 = uint64{0xCD9E8D57u} * c2;
    c0 = uint32(product1 >> 32) ^ c1 ^ k0;
    c1 = uint32(product1);
    c2 = uint32(product0 >> 32) ^ c3 ^ k1;
    c3 = uint32(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Bytes of the tile (i / 32, j / 32) for the residues i mod 8 and j mod 8.
static constexpr RandomBytes dropout_bytes(const DropoutStream& stream, uint32 i_tile, uint32 i_mod_8, uint32 j_tile,
                                           uint32 j_mod_8) {
  return philox_4x32_7({i_tile * 8 + i_mod_8, j_tile * 8 + j_mod_8, stream.batch, stream.head},
                       {stream.key[0], stream.key[1]});
}

// Byte of column group b = (j / 8) mod 4 in a word; an element is kept iff it is below the threshold in 1..256.
static constexpr bool dropout_keeps(uint32 word, uint32 b, int32 keep_threshold) {
  return int32((word >> (8 * b)) & 0xFFu) < keep_threshold;
}

}  // namespace flash
