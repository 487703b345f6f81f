// What forward and backward share: loading rows, and the tile of scores with every mask, bias and dropout bit.
//
// Tiles are transposed: S^T [keys, lanes], with queries on the vector lanes. Row maxima and sums then are plain vector
// operations, and neither K nor V needs a transpose. Scores are in units of log2: score * log2(e).
#pragma once

#include "common/philox.h"
#include "cpu/convert.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace flash::cpu {
namespace {

constexpr int64 padded(int64 dim) {
  return round_up(dim, kLanes);
}

// Hands out aligned pieces of a thread's scratch memory; with a null base it only counts.
struct Scratch {
  float* base;
  int64 used = 0;
  float* take(int64 floats) {
    float* piece = base ? base + used : nullptr;
    used += round_up(floats, 16);
    return piece;
  }
};

// ---- rows of operands ----

template <class Float>
void decode_row(const void* data, int64 offset, int64 stride, int64 count, float* row) {
  const auto* source = static_cast<const typename Float::Storage*>(data) + offset;
  if (stride == 1) {
    for (int64 i = 0; i < count; ++i) row[i] = Float::decode(source[i]);
  } else {
    for (int64 i = 0; i < count; ++i) row[i] = Float::decode(source[i * stride]);
  }
}

template <class Float>
void encode_row(void* data, int64 offset, int64 count, const float* row) {
  auto* target = static_cast<typename Float::Storage*>(data) + offset;
  for (int64 i = 0; i < count; ++i) target[i] = Float::encode(row[i]);
}

void load_row(const View& view, int64 offset, int64 count, float* row) {
  switch (view.dtype) {
    case DType::kF32: return decode_row<Float32>(view.data, offset, view.col_stride, count, row);
    case DType::kBF16: return decode_row<BFloat16>(view.data, offset, view.col_stride, count, row);
    case DType::kF16: return decode_row<Float16>(view.data, offset, view.col_stride, count, row);
  }
}

void store_row(const View& view, int64 offset, int64 count, const float* row) {
  switch (view.dtype) {
    case DType::kF32: return encode_row<Float32>(view.data, offset, count, row);
    case DType::kBF16: return encode_row<BFloat16>(view.data, offset, count, row);
    case DType::kF16: return encode_row<Float16>(view.data, offset, count, row);
  }
}

// Rows [row, row + rows) of a sequence into [rows, padded(dim)], the padding zero.
void load_rows(const Problem& p, const View& view, int64 batch, int64 head, int64 row, int64 rows, int64 dim,
               float* tile) {
  const int64 offset = offset_of(p, view, batch, head, row), ld = padded(dim);
  for (int64 i = 0; i < rows; ++i) {
    load_row(view, offset + i * view.row_stride, dim, tile + i * ld);
    for (int64 c = dim; c < ld; ++c) tile[i * ld + c] = 0.0f;
  }
}

// The same for keys or values, which may lie in pages.
void load_kv_rows(const Problem& p, const View& view, const Sequence& s, int64 head, int64 key, int64 keys, int64 dim,
                  float* tile) {
  if (!p.page_size) return load_rows(p, view, s.batch, head, s.kv_begin + key, keys, dim, tile);
  const int32* table = pointer_to<int32>(p, p.page_table, s.batch, 0, s.index);
  for (int64 i = 0; i < keys;) {
    const int64 in_page = (key + i) % p.page_size, run = min_of(p.page_size - in_page, keys - i);
    // A page index out of range reads some other page: a wrong result, never a wild access.
    const int64 page = clamp_to<int64>(table[(key + i) / p.page_size * p.page_table.col_stride], 0, p.num_pages - 1);
    load_rows(p, view, s.batch, head, page * p.page_size + in_page, run, dim, tile + i * padded(dim));
    i += run;
  }
}

// tile [rows, padded(dim)] -> transposed [dim, lanes], scaled; lanes past `rows` are zero.
void transpose(const float* tile, int64 rows, int64 dim, float scale, int64 lanes, float* transposed) {
  const int64 ld = padded(dim);
  for (int64 c = 0; c < dim; ++c) {
    for (int64 i = 0; i < rows; ++i) transposed[c * lanes + i] = tile[i * ld + c] * scale;
    for (int64 i = rows; i < lanes; ++i) transposed[c * lanes + i] = 0.0f;
  }
}

// ---- the query side of a tile ----

struct QueryTile {
  int64 begin;  // inside the sequence
  int64 rows;
  int64 lanes;  // rows, rounded up to whole vectors
  MaskRule rule;
  Range keys;  // seen by at least one row
  alignas(64) int32 key_begin[kBlockQ];
  alignas(64) int32 key_end[kBlockQ];
  alignas(64) int32 segment[kBlockQ];
  int32 segment_min, segment_max;
  float slope;  // ALiBi, in log2 units
};

QueryTile make_query_tile(const Problem& p, const Sequence& s, int64 head, int64 begin) {
  QueryTile t = {};
  t.begin = begin;
  t.rows = min_of(kBlockQ, s.q_len - begin);
  t.lanes = padded(t.rows);
  t.rule = mask_rule(p, s);
  t.keys = visible_keys(t.rule, int32(begin), int32(begin + t.rows));
  for (int64 i = 0; i < t.rows; ++i) {  // lanes past `rows` see no key
    const Range keys = visible_keys(t.rule, int32(begin + i));
    t.key_begin[i] = keys.begin;
    t.key_end[i] = keys.end;
  }
  if (p.q_segment_ids.data) {
    const int32* ids = pointer_to<int32>(p, p.q_segment_ids, s.batch, 0, s.q_begin + begin);
    t.segment_min = t.segment_max = ids[0];
    for (int64 i = 0; i < t.rows; ++i) {
      t.segment[i] = ids[i * p.q_segment_ids.row_stride];
      t.segment_min = min_of(t.segment_min, t.segment[i]);
      t.segment_max = max_of(t.segment_max, t.segment[i]);
    }
  }
  if (p.alibi_slopes.data) t.slope = *pointer_to<float>(p, p.alibi_slopes, s.batch, head, s.index) * kLog2e;
  return t;
}

// ---- masks ----

const int32* kv_segments(const Problem& p, const Sequence& s, int64 key) {
  return pointer_to<int32>(p, p.kv_segment_ids, s.batch, 0, s.kv_begin + key);
}

bool any_unmasked(const Problem& p, const Sequence& s, int64 head, const QueryTile& q, int64 key, int64 keys) {
  const uint8* mask = pointer_to<uint8>(p, p.mask, s.batch, head, s.q_begin + q.begin, key);
  for (int64 i = 0; i < q.rows; ++i)
    for (int64 j = 0; j < keys; ++j)
      if (mask[i * p.mask.row_stride + j * p.mask.col_stride]) return true;
  return false;
}

// The positional rule's answer for keys [key, key + keys), sharpened by the masks that are data.
BlockKind classify_tile(const Problem& p, const Sequence& s, int64 head, const QueryTile& q, int64 key, int64 keys) {
  BlockKind kind = classify_block(q.rule, int32(q.begin), int32(q.begin + q.rows), int32(key), int32(key + keys));
  if (kind == BlockKind::kNone) return kind;
  if (p.kv_segment_ids.data) {
    const int32* ids = kv_segments(p, s, key);
    int32 lowest = ids[0], highest = ids[0];
    for (int64 j = 1; j < keys; ++j) {
      lowest = min_of(lowest, ids[j * p.kv_segment_ids.row_stride]);
      highest = max_of(highest, ids[j * p.kv_segment_ids.row_stride]);
    }
    if (lowest > q.segment_max || highest < q.segment_min) return BlockKind::kNone;
    kind = BlockKind::kPartial;
  }
  if (p.mask.data) kind = any_unmasked(p, s, head, q, key, keys) ? BlockKind::kPartial : BlockKind::kNone;
  return kind;
}

void apply_masks(const Problem& p, const Sequence& s, int64 head, const QueryTile& q, int64 key, int64 keys,
                 float* scores) {
  const VecF hidden = splat(-__builtin_inff());
  const int32* segments = p.kv_segment_ids.data ? kv_segments(p, s, key) : nullptr;
  for (int64 j = 0; j < keys; ++j) {
    const VecI position = splat(int32(key + j));
    for (int64 i = 0; i < q.lanes; i += kLanes) {
      VecI visible = (position >= load(q.key_begin + i)) & (position < load(q.key_end + i));
      if (segments) visible &= load(q.segment + i) == splat(segments[j * p.kv_segment_ids.row_stride]);
      float* score = scores + j * q.lanes + i;
      store(score, select(visible, load(score), hidden));
    }
  }
  if (!p.mask.data) return;
  const uint8* mask = pointer_to<uint8>(p, p.mask, s.batch, head, s.q_begin + q.begin, key);
  for (int64 i = 0; i < q.rows; ++i)
    for (int64 j = 0; j < keys; ++j)
      if (!mask[i * p.mask.row_stride + j * p.mask.col_stride]) scores[j * q.lanes + i] = -__builtin_inff();
}

// ---- scores ----

// scores [keys, lanes] = log2(e) * (softcap(scale * K Q^T) + ALiBi + bias), -inf where masked. `qt` [head_dim, lanes]
// is scaled by scale * log2(e). With `softcap_grad` [keys, lanes] also the derivative of the cap, 1 - tanh^2.
void score_tile(const Problem& p, const Sequence& s, int64 head, const QueryTile& q, const float* qt, const float* k,
                int64 key, int64 keys, BlockKind kind, float* scores, float* softcap_grad = nullptr) {
  const int64 size = keys * q.lanes;
  gemm<false>(keys, q.lanes, p.head_dim, k, padded(p.head_dim), qt, q.lanes, scores, q.lanes, false);
  if (p.options.softcap != 0.0f) {
    const float cap = p.options.softcap * kLog2e, inverse = 1.0f / cap;
    for (int64 e = 0; e < size; e += kLanes) {
      const VecF y = tanh(load(scores + e) * inverse);
      store(scores + e, y * cap);
      if (softcap_grad) store(softcap_grad + e, 1.0f - y * y);
    }
  }
  if (p.alibi_slopes.data) {
    VecI lane;
    for (int64 l = 0; l < kLanes; ++l) lane[l] = int32(l);
    for (int64 j = 0; j < keys; ++j)
      for (int64 i = 0; i < q.lanes; i += kLanes) {
        VecI distance = lane + int32(q.begin + i + q.rule.offset - key - j);
        distance = distance < 0 ? -distance : distance;
        float* score = scores + j * q.lanes + i;
        store(score, load(score) - __builtin_convertvector(distance, VecF) * q.slope);
      }
  }
  if (p.bias.data) {
    const int64 offset = offset_of(p, p.bias, s.batch, head, s.q_begin + q.begin, key);
    float row[kBlockKv];
    for (int64 i = 0; i < q.rows; ++i) {
      load_row(p.bias, offset + i * p.bias.row_stride, keys, row);
      for (int64 j = 0; j < keys; ++j) scores[j * q.lanes + i] += row[j] * kLog2e;
    }
  }
  if (kind == BlockKind::kPartial) apply_masks(p, s, head, q, key, keys, scores);
}

// ---- dropout ----

// keep [keys, lanes]: -1 where the element is kept, 0 where it is dropped.
void dropout_tile(const Problem& p, const Sequence& s, int64 head, const QueryTile& q, int64 key, int64 keys,
                  int32* keep) {
  const uint32* words = pointer_to<uint32>(p, p.dropout_stream, s.batch, head, 0);
  const DropoutStream stream = {{words[0], words[1]}, words[2] + uint32(s.index), words[3]};
  for (int64 j = 0; j < keys; j += j % 8 == 7 ? 25 : 1) {  // the first 8 keys of each 32; a call covers j, j + 8, ...
    for (int64 i = 0; i < q.lanes; i += 32) {
      RandomBytes bytes[8];
      for (uint32 r = 0; r < 8; ++r)
        bytes[r] = dropout_bytes(stream, uint32((q.begin + i) / 32), r, uint32((key + j) / 32), uint32(j % 8));
      for (int64 b = 0; b < 4 && j + 8 * b < keys; ++b) {
        int32* row = keep + (j + 8 * b) * q.lanes + i;
        for (int64 l = 0; l < min_of<int64>(32, q.lanes - i); ++l)
          row[l] = -int32(dropout_keeps(bytes[l % 8].word[l / 8], uint32(b), p.options.keep_threshold));
      }
    }
  }
}

float dropout_scale(const Problem& p) {
  return 256.0f / float(p.options.keep_threshold);
}

}  // namespace
}  // namespace flash::cpu
