// The positional mask: which keys a query row sees by causality, window and lengths. It answers two questions, which
// blocks (none / partial / full) and which elements; every kernel and the tests ask this code. Masks that are data
// (a boolean operand, segment ids) are the caller's: they can only hide more.
#pragma once

#include "common/types.h"

namespace flash {

// One sequence's rule. Row i sees key j iff  i + offset - left <= j <= i + offset + right  and  j < seqlen_kv.
struct MaskRule {
  int32 seqlen_q;
  int32 seqlen_kv;
  int32 window_left;   // kUnbounded or less
  int32 window_right;  // likewise; causal is 0
  int32 offset;        // seqlen_kv - seqlen_q when aligned bottom-right, 0 when top-left
};

// As far as any two positions can lie apart.
inline constexpr int32 kUnbounded = 0x7FFFFFFF;

// Windows below 0 are unbounded.
static constexpr MaskRule make_mask_rule(int64 seqlen_q, int64 seqlen_kv, int32 window_left, int32 window_right,
                                         bool bottom_right) {
  auto bounded = [](int32 window) { return window < 0 ? kUnbounded : window; };
  return {int32(seqlen_q), int32(seqlen_kv), bounded(window_left), bounded(window_right),
          bottom_right ? int32(seqlen_kv - seqlen_q) : 0};
}

// Half-open range of positions: keys that a row sees, or rows that see a key.
struct Range {
  int32 begin;
  int32 end;
};

// Those of `size` positions that lie at most `before` in front of `middle` and at most `behind` behind it. No sum
// passes 2^31.
static constexpr Range positions_around(int32 middle, int32 before, int32 behind, int32 size) {
  return {min_of(max_of(middle, before) - before, size), max_of(min_of(middle, size - 1 - behind) + behind + 1, 0)};
}

// Keys that row `row` sees; behind the last one all rows see what it sees. Both ends never decrease from one row to the
// next: the block questions rest on that.
static constexpr Range visible_keys(const MaskRule& rule, int32 row) {
  return positions_around(min_of(row, rule.seqlen_q - 1) + rule.offset, rule.window_left, rule.window_right,
                          rule.seqlen_kv);
}

// Keys that at least one row of [row_begin, row_end) sees. The range may be empty (begin >= end).
static constexpr Range visible_keys(const MaskRule& rule, int32 row_begin, int32 row_end) {
  return {visible_keys(rule, row_begin).begin, visible_keys(rule, row_end - 1).end};
}

// The same seen from a key: rows that see it. Both ends never decrease from one key to the next.
static constexpr Range visible_rows(const MaskRule& rule, int32 key) {
  if (key >= rule.seqlen_kv) return {rule.seqlen_q, rule.seqlen_q};
  return positions_around(key - rule.offset, rule.window_right, rule.window_left, rule.seqlen_q);
}

enum class BlockKind : int32 { kNone, kPartial, kFull };

// How much of the block rows [row_begin, row_end) x keys [key_begin, key_end) is visible.
static constexpr BlockKind classify_block(const MaskRule& rule, int32 row_begin, int32 row_end, int32 key_begin,
                                          int32 key_end) {
  const Range any = visible_keys(rule, row_begin, row_end);
  if (max_of(any.begin, key_begin) >= min_of(any.end, key_end)) return BlockKind::kNone;
  const Range all = {visible_keys(rule, row_end - 1).begin, visible_keys(rule, row_begin).end};
  return all.begin <= key_begin && key_end <= all.end ? BlockKind::kFull : BlockKind::kPartial;
}

// Blocks [first, end) of one side that a block of the other side sees, of which it sees [full_begin, full_end) whole.
struct BlockRange {
  int32 first, end;
  int32 full_begin, full_end;
};

// Blocks of keys that the rows [row_begin, row_end) see.
static constexpr BlockRange key_blocks(const MaskRule& rule, int32 row_begin, int32 row_end, int32 block_kv) {
  const Range any = visible_keys(rule, row_begin, row_end);
  const Range all = {visible_keys(rule, row_end - 1).begin, visible_keys(rule, row_begin).end};
  const int32 first = any.begin / block_kv, end = any.begin < any.end ? (any.end - 1) / block_kv + 1 : first;
  const int32 full_begin = int32(ceil_div(all.begin, block_kv)), full_end = all.end / block_kv;
  return full_begin < full_end ? BlockRange{first, end, full_begin, full_end} : BlockRange{first, end, first, first};
}

// Blocks of rows that see the keys [key, key + keys), which are those in use of a block of block_kv.
static constexpr BlockRange row_blocks(const MaskRule& rule, int32 key, int32 keys, int32 block_kv, int32 block_q) {
  const Range any = {visible_rows(rule, key).begin, visible_rows(rule, key + keys - 1).end};
  const Range all = {visible_rows(rule, key + block_kv - 1).begin, visible_rows(rule, key).end};
  const int32 first = any.begin / block_q, end = any.begin < any.end ? (any.end - 1) / block_q + 1 : first;
  return {first, end, int32(ceil_div(all.begin, block_q)), all.end / block_q};
}

static_assert(visible_keys(MaskRule{4, 6, kUnbounded, 0, 2}, 0).end == 3, "bottom-right causal: row 0 sees keys 0..2");
static_assert(visible_keys(MaskRule{4, 6, kUnbounded, 0, 0}, 0).end == 1, "top-left causal: row 0 sees key 0");
static_assert(visible_keys(MaskRule{6, 4, kUnbounded, 0, -2}, 1).end == 0,
              "more queries than keys: the first rows see none");
static_assert(visible_rows(MaskRule{4, 6, kUnbounded, 0, 2}, 3).begin == 1 &&
              visible_rows(MaskRule{4, 6, 2, 0, 2}, 3).end == 4);
static_assert(visible_rows(MaskRule{4, 6, kUnbounded, 0, 2}, 6).begin ==
              visible_rows(MaskRule{4, 6, kUnbounded, 0, 2}, 6).end);
static_assert(key_blocks(MaskRule{256, 256, kUnbounded, 0, 0}, 128, 192, 64).full_end == 2 &&
              key_blocks(MaskRule{256, 256, kUnbounded, 0, 0}, 128, 192, 64).end == 3);
static_assert(classify_block(MaskRule{128, 128, kUnbounded, 0, 0}, 64, 128, 0, 64) == BlockKind::kFull);
static_assert(classify_block(MaskRule{128, 128, kUnbounded, 0, 0}, 0, 64, 64, 128) == BlockKind::kNone);

}  // namespace flash
