// What happens to a tile of scores between Q K^T and the softmax: scale, soft cap, ALiBi, bias, masks; and the dropout
// bits. One code for a tile of S (rows are queries) and of S transposed (rows are keys).
#pragma once

#include "common/config.h"
#include "common/mask.h"
#include "common/philox.h"
#include "kernels/ptx/convert.cuh"
#include "kernels/tile/layout.cuh"
#include "kernels/tile/sequence.cuh"

namespace flash {

// Scores are kept as x with softmax weight 2^(x * score_factor - ...): raw products where nothing but a positive scale is
// applied, so that it costs no instruction of its own, else units of log2.
template <KernelConfig kC>
inline constexpr bool kScoresInLog2 = kC.softcap || kC.alibi || kC.bias || !kC.positive_scale;

// Whether a row of a tile that the positional mask shows whole may still see no key.
template <KernelConfig kC>
inline constexpr bool kDataMasks = kC.mask || kC.segments || kC.bias;

// The operands of one head of one sequence that enter the scores.
template <KernelConfig kC>
struct ScoreInputs {
  MaskRule rule;
  float factor;  // of raw products, in log2 units
  float slope;   // ALiBi, in log2 units
  float cap, inverse_cap;  // the cap in log2 units; scale / cap
  const char* bias;        // [row 0, key 0] of this sequence and head
  const uint8* mask;
  const int32* q_segments;
  const int32* kv_segments;
  DropoutStream dropout;

  __forceinline__ ScoreInputs(const Problem& p, const Sequence& s, int64 head) {
    rule = mask_rule_of(p, s);
    factor = p.options.scale * kLog2e;
    if constexpr (kC.softcap) {
      cap = p.options.softcap * kLog2e;
      inverse_cap = p.options.scale / p.options.softcap;
    }
    if constexpr (kC.alibi)
      slope = *address_of<const float, kC.num_batch_axes>(p, p.alibi_slopes, s.batch, head, s.index) * kLog2e;
    if constexpr (kC.bias) {
      constexpr int32 kBytes = kC.bias_dtype == DType::kF32 ? 4 : 2;
      bias = static_cast<const char*>(p.bias.data) +
             kBytes * (batch_offset_of<kC.num_batch_axes>(p, p.bias, s.batch) + head * p.bias.head_stride);
    }
    if constexpr (kC.mask) mask = address_of<const uint8, kC.num_batch_axes>(p, p.mask, s.batch, head, 0);
    if constexpr (kC.segments) {
      q_segments = address_of<const int32, kC.num_batch_axes>(p, p.q_segment_ids, s.batch, 0, s.q.begin);
      kv_segments = address_of<const int32, kC.num_batch_axes>(p, p.kv_segment_ids, s.batch, 0, s.kv.begin);
    }
    if constexpr (kC.dropout) {
      const uint32* words = address_of<const uint32, kC.num_batch_axes>(p, p.dropout_stream, s.batch, head, 0);
      dropout = {{words[0], words[1]}, words[2] + uint32(s.index), words[3]};
    }
  }
};

// Factor from stored scores to log2 units.
template <KernelConfig kC>
__forceinline__ float score_factor(const ScoreInputs<kC>& in) {
  return kScoresInLog2<kC> ? 1.0f : in.factor;
}

// Reads (i, j) and (i, j + 1) of a bias or mask, in one access where the config says that this is possible.
template <bool kPaired, class T>
__forceinline__ void load_two(T (&x)[2], const T* data, int64 stride) {
  if constexpr (kPaired) {
    struct alignas(2 * sizeof(T)) Pair {
      T x[2];
    };
    const Pair pair = *reinterpret_cast<const Pair*>(data);
    x[0] = pair.x[0], x[1] = pair.x[1];
  } else {
    x[0] = data[0], x[1] = data[stride];
  }
}

template <KernelConfig kC>
__forceinline__ float decode_bias(float x) {
  return x;
}
template <KernelConfig kC>
__forceinline__ float decode_bias(uint16 x) {
  return ptx::unpack<kC.bias_dtype>(x);
}

// Turns raw products into scores, -inf where hidden. The tile starts at (row, col) of the sequence: queries and keys,
// or keys and queries if kTransposed. kMasked: the positional mask may hide some of it, or it may reach beyond the
// sequence. `slope_of_cap(m, n, e, y)` is told the capped tanh.
template <KernelConfig kC, bool kTransposed, bool kMasked, int32 kM, int32 kN, class OnCap>
__forceinline__ void apply_scores(Accumulator<kM, kN>& s, const Problem& p, const ScoreInputs<kC>& in, int32 row,
                                  int32 col, OnCap on_cap) {
  constexpr bool kPaired = kC.paired && !kTransposed;
  const int32 lane = threadIdx.x % 32;
  row += lane / 4;
  col += lane % 4 * 2;
  // The last query and key of the operands: positions beyond them are read at these, then hidden.
  const int32 last_i = int32(p.seqlen_q) - 1, last_j = int32(p.seqlen_kv) - (kPaired ? 2 : 1);
#pragma unroll
  for (int32 m = 0; m < kM / 16; ++m)
#pragma unroll
    for (int32 h = 0; h < 2; ++h) {
      const int32 r = row + 16 * m + 8 * h;
      Range seen = {};
      if constexpr (kMasked) seen = kTransposed ? visible_rows(in.rule, r) : visible_keys(in.rule, r);
      const int32 safe_row = min_of(r, kTransposed ? last_j : last_i);
      int32 row_segment = 0;
      if constexpr (kC.segments) row_segment = (kTransposed ? in.kv_segments : in.q_segments)[safe_row];
#pragma unroll
      for (int32 n = 0; n < kN / 8; ++n) {
        const int32 c = col + 8 * n;
        const int32 safe_col = kMasked ? min_of(c, kTransposed ? last_i : last_j) : c;
        // Offset of the second element of a pair; 0 where it would lie beyond the end.
        const int32 step = !kMasked || kPaired || c < (kTransposed ? last_i : last_j);
        float bias[2] = {};
        uint8 shown[2] = {1, 1};
        const int64 i = kTransposed ? safe_col : safe_row, j = kTransposed ? safe_row : safe_col;
        if constexpr (kC.bias) {
          using T = decltype([] {
            if constexpr (kC.bias_dtype == DType::kF32)
              return float{};
            else
              return uint16{};
          }());
          const int64 stride = (kTransposed ? p.bias.row_stride : p.bias.col_stride) * step;
          T x[2];
          load_two<kPaired>(
              x, reinterpret_cast<const T*>(in.bias) + i * p.bias.row_stride + j * p.bias.col_stride, stride);
          bias[0] = decode_bias<kC>(x[0]), bias[1] = decode_bias<kC>(x[1]);
        }
        if constexpr (kC.mask) {
          const int64 stride = (kTransposed ? p.mask.row_stride : p.mask.col_stride) * step;
          load_two<kPaired>(shown, in.mask + i * p.mask.row_stride + j * p.mask.col_stride, stride);
        }
#pragma unroll
        for (int32 e = 0; e < 2; ++e) {
          float x = s.x[m][n][2 * h + e];
          if constexpr (kC.softcap) {
            const float y = ptx::tanh_approx(x * in.inverse_cap);
            on_cap(m, n, 2 * h + e, y);
            x = y * in.cap;
          } else if constexpr (kScoresInLog2<kC>) {
            x *= in.factor;
          }
          if constexpr (kC.alibi) {
            const int32 distance = (kTransposed ? c + e - r : r - c - e) + in.rule.offset;
            x -= in.slope * fabsf(float(distance));
          }
          if constexpr (kC.bias) x += bias[e] * kLog2e;
          bool visible = true;
          if constexpr (kMasked) visible = seen.begin <= c + e && c + e < seen.end;
          if constexpr (kC.mask) visible = visible && shown[e];
          if constexpr (kC.segments)
            visible = visible &&
                      row_segment == (kTransposed ? in.q_segments : in.kv_segments)[safe_col + e * (step ? 1 : 0)];
          s.x[m][n][2 * h + e] = visible ? x : -kInfinity;
        }
      }
    }
}

// Calls visit(m, n, e, kept) for each element of the thread's part of a tile that starts at (row, col), multiples of 16.
// One call of Philox serves the rows and columns that a thread owns of 32 x 32 elements, with the same column residue;
// where a tile has only 16 rows or columns, half of what it yields.
template <bool kTransposed, int32 kM, int32 kN, class Visit>
__forceinline__ void for_each_dropout_bit(const DropoutStream& stream, int32 keep_threshold, int32 row, int32 col,
                                          Visit visit) {
  static_assert((kM == 16 || kM == 32) && (kN == 16 || kN % 32 == 0));
  constexpr int32 kTiles = min_of(kN / 8, 4);  // n-tiles that a call serves
  const int32 lane = threadIdx.x % 32;
  // Of a 32 x 32 block.
  const bool lower_half = kM == 16 && row % 32 != 0, right_half = kN == 16 && col % 32 != 0;
#pragma unroll
  for (int32 n = 0; n < kN / 8; n += kTiles)
#pragma unroll
    for (int32 e = 0; e < 2; ++e) {
      const uint32 row_tile = row / 32, col_tile = col / 32 + n / 4, row_residue = lane / 4, col_residue = lane % 4 * 2 + e;
      const RandomBytes bytes = kTransposed ? dropout_bytes(stream, col_tile, col_residue, row_tile, row_residue)
                                            : dropout_bytes(stream, row_tile, row_residue, col_tile, col_residue);
#pragma unroll
      for (int32 r = 0; r < kM / 8; ++r)
#pragma unroll
        for (int32 c = 0; c < kTiles; ++c) {
          // Words go by queries, bytes by keys.
          const int32 query = kTransposed ? c : r, key = kTransposed ? r : c;
          const bool second_query = kTransposed ? right_half : lower_half, second_key = kTransposed ? lower_half : right_half;
          const uint32 word = query < 2 && second_query ? bytes.word[query + 2] : bytes.word[query];
          visit(r / 2, n + c, r % 2 * 2 + e, dropout_keeps(word, key + (second_key ? 2 : 0), keep_threshold));
        }
    }
}

}  // namespace flash
