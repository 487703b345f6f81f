// How the units of work of a grid follow each other, each a block of rows of one head.
#pragma once

#include "common/divisor.h"
#include "common/types.h"

namespace flash {

// Heads, of all sequences and batch entries, come in sections: the first block of each of its heads, then the second
// one of each, and so on. The last heads are late: only their first blocks come so, in sections of their own, and the
// rest behind all else, as if these heads were one section.
template <class Div>
struct UnitOrderOf {
  Div section;     // heads of one; divides the number of those that are not late and, unless first_blocks is 0, of late
  Div late_heads;  // how many are late
  Div blocks;      // of each head
  Div first_blocks;  // of a late one, those that come with its section
  Div num_heads;     // of queries or keys, of a sequence
  Div num_sequences;
  Div group;  // query heads of a key head
  uint32 heads;

  struct Place {
    uint32 head, block;
  };
  constexpr uint32 count() const { return heads * blocks.value; }
  constexpr Place place_of(uint32 unit) const {
    const uint32 heads_before = heads - late_heads.value, late_units = heads_before * blocks.value;
    const uint32 last_units = late_units + late_heads.value * first_blocks.value;
    const bool is_late = unit >= late_units, is_last = unit >= last_units;
    const uint32 rest = unit - (is_last ? last_units : is_late ? late_units : 0);
    const Div width = is_last ? late_heads : section, depth = is_late && !is_last ? first_blocks : blocks;
    const uint32 turn = quotient(rest, width), section_index = quotient(turn, depth);
    return {(is_late ? heads_before : 0) + section_index * section.value + rest - turn * width.value,
            turn - section_index * depth.value + (is_last ? first_blocks.value : 0)};
  }
};

using UnitOrder = UnitOrderOf<Divisor>;

}  // namespace flash
