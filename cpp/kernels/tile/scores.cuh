// What happens to a tile of scores between Q K^T and the softmax: scale, soft cap, ALiBi, bias, masks; and the dropout
// bits. One code for a tile of S (rows are queries) and of S transposed (rows are keys).
#pragma once

#include "common/config.h"
#include "common/mask.h"
#include "common/philox.h"
#include "kernels/ptx/convert.cuh"
#include "kernels/tile/copy.cuh"
#include "kernels/tile/layout.cuh"
#include "kernels/tile/mask_bits.cuh"
#include "kernels/tile/sequence.cuh"

namespace flash {

// Scores are kept as x with softmax weight 2^(x * score_factor - ...): raw products where nothing but a positive scale
// is applied, so that it costs no instruction of its own, else units of log2.
template <KernelConfig kC>
inline constexpr bool kScoresInLog2 = kC.softcap || kC.alibi || kC.bias || !kC.positive_scale;

// Whether a row of a tile that the positional mask shows whole may still see no key.
template <KernelConfig kC>
inline constexpr bool kDataMasks = kC.mask || kC.segments || kC.bias;

// The operands of one head of one sequence that enter the scores.
template <KernelConfig kC>
struct ScoreInputs {
  MaskRule rule;
  float factor;            // of raw products, in log2 units
  float slope;             // ALiBi, in log2 units
  float cap, inverse_cap;  // the cap in log2 units; scale / cap
  const char* bias;        // [row 0, key 0] of this sequence and head
  const uint8* mask;
  const int32* q_segments = nullptr;
  const int32* kv_segments = nullptr;
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
__forceinline__ float score_factor(const Problem& p) {
  return kScoresInLog2<kC> ? 1.0f : p.options.scale * kLog2e;
}

// The bias tile in shared memory: rows are queries, also of S transposed.
template <KernelConfig kC>
using BiasTile = Tile<kC.block_q, kC.block_kv>;

// Starts the copy of the block of the bias at query `i` and key `j` from a head's `bias`. Only if kC.bias_tiled.
template <KernelConfig kC>
__forceinline__ void load_bias(const Problem& p, const uint16* bias, uint32 tile, int32 i, int32 j) {
  load_tile<BiasTile<kC>, true, false, num_threads(kC)>(tile, StridedRows{bias + j, p.bias.row_stride}, i,
                                                        int32(p.seqlen_q), int32(p.seqlen_kv) - j);
}

// Stands for its reader in kernels without one.
struct NoBiasTile {};

// Elements (i, j) and (i, j + 1) of a row of a bias or mask, or (i, j) and (i + 1, j) in a transposed tile.
template <class T>
struct Two {
  T x[2];
};

// In one access where kPaired says that the two are neighbours on an even place.
template <bool kPaired, class T>
__forceinline__ Two<T> load_two(const T* data, int64 stride) {
  if constexpr (kPaired) {
    struct alignas(2 * sizeof(T)) Pair {
      T x[2];
    };
    const Pair pair = *reinterpret_cast<const Pair*>(data);
    return {pair.x[0], pair.x[1]};
  } else {
    return {data[0], data[stride]};
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

template <DType kDType>
struct StorageOf {
  using Type = uint16;
};
template <>
struct StorageOf<DType::kF32> {
  using Type = float;
};

// Which of a thread's columns of a row lie in [begin, end), relative to its first one: bit 2 n + e is column 8 n + e.
template <int32 kN>
__forceinline__ uint32 columns_between(int32 begin, int32 end) {
  static_assert(kN <= 128);
  auto below = [](int32 col) {
    const int32 count = clamp_to<int32>((col >> 3) * 2 + min_of(col & 7, 2), 0, kN / 4);
    return uint32((uint64{1} << count) - 1);
  };
  return below(end) & ~below(begin);
}

// Turns raw products into scores, -inf where hidden. The tile starts at (row, col) of the sequence: queries and keys,
// or keys and queries if kTransposed. kMasked: the positional mask may hide some of it, or it may reach beyond the
// sequence. `bias` reads the tile of the bias at this place, if kC.bias_tiled. on_cap(m, n, e, y) is told the tanh of
// the soft cap.
template <KernelConfig kC, bool kTransposed, bool kMasked, int32 kM, int32 kN, class BiasReader, class OnCap>
__forceinline__ void apply_scores(Accumulator<kM, kN>& s, const Problem& p, const ScoreInputs<kC>& in, int32 row,
                                  int32 col, const BiasReader& bias, OnCap on_cap) {
  using Bias = typename StorageOf<kC.bias_dtype>::Type;
  constexpr int32 kRows = kM / 8;
  constexpr bool kBiasDirect = kC.bias && !kC.bias_tiled, kPaired = kC.paired && !kTransposed;
  constexpr bool kMaskDirect = kC.mask && !kC.mask_wide;
  // To test a bit is less than to compare with two ends. Of S all bits are tested at last, of S transposed with each
  // score, and there are none where the compiler would then start all loads of a bias or mask at once, which spills.
  constexpr bool kShownInBits = kMaskDirect && !kTransposed;
  constexpr bool kSeenInBits = kMasked && !kBiasDirect && (!kMaskDirect || !kTransposed);
  auto read_mask_bits = [&] {
    if constexpr (kC.mask_wide)
      return MaskBits<kC, kTransposed, kM, kN>(p, in.mask, row, col);
    else
      return NoMaskBits{};
  };
  [[maybe_unused]] const auto mask_bits = read_mask_bits();
  const int32 lane = threadIdx.x % 32;
  row += lane / 4;
  col += lane % 4 * 2;
  // The last query and key of the operands: positions beyond them are read at these, then hidden.
  const int32 last_query = int32(p.seqlen_q) - 1, last_key = int32(p.seqlen_kv) - 1;
  const int32 last_row = kTransposed ? last_key : last_query, last_col = kTransposed ? last_query : last_key;

  // What is known of a row before its columns.
  [[maybe_unused]] Range seen[kRows];
  [[maybe_unused]] uint32 seen_bits[kRows], shown_bits[kRows] = {};  // as in columns_between()
  [[maybe_unused]] int32 row_segment[kRows];
  [[maybe_unused]] const Bias* row_bias[kRows];
  [[maybe_unused]] const uint8* row_mask[kRows];
#pragma unroll
  for (int32 r = 0; r < kRows; ++r) {
    const int32 i = row + 8 * r, safe = min_of(i, last_row);
    if constexpr (kMasked) seen[r] = kTransposed ? visible_rows(in.rule, i) : visible_keys(in.rule, i);
    if constexpr (kSeenInBits) seen_bits[r] = columns_between<kN>(seen[r].begin - col, seen[r].end - col);
    if constexpr (kC.segments) row_segment[r] = (kTransposed ? in.kv_segments : in.q_segments)[safe];
    if constexpr (kBiasDirect)
      row_bias[r] =
          reinterpret_cast<const Bias*>(in.bias) + safe * (kTransposed ? p.bias.col_stride : p.bias.row_stride);
    if constexpr (kMaskDirect) row_mask[r] = in.mask + safe * (kTransposed ? p.mask.col_stride : p.mask.row_stride);
  }

  [[maybe_unused]] uint32 tiled[kM / 16][4];  // the bias of two n-tiles
#pragma unroll
  for (int32 n = 0; n < kN / 8; ++n) {
    const int32 c = col + 8 * n;
    // Columns beyond the last one are read at it, a pair at the last pair.
    const int32 safe = kMasked ? min_of(c, last_col - (kPaired ? 1 : 0)) : c;
    const int32 step = kMasked && !kPaired && c >= last_col ? 0 : 1;
    [[maybe_unused]] int32 col_segment[2];
    if constexpr (kC.segments) {
      const int32* segments = kTransposed ? in.q_segments : in.kv_segments;
      col_segment[0] = segments[safe], col_segment[1] = segments[safe + step];
    }
    if constexpr (kC.bias_tiled) {
      if (n % 2 == 0) {
#pragma unroll
        for (int32 m = 0; m < kM / 16; ++m) bias.load(tiled[m], 16 * m, 8 * n);
      }
    }
#pragma unroll
    for (int32 r = 0; r < kRows; ++r) {
      [[maybe_unused]] Two<float> added;
      [[maybe_unused]] Two<uint8> shown;
      if constexpr (kBiasDirect) {
        const int64 stride = kTransposed ? p.bias.row_stride : p.bias.col_stride;
        const Two<Bias> x = load_two<kPaired>(row_bias[r] + safe * stride, step * stride);
        added = {decode_bias<kC>(x.x[0]), decode_bias<kC>(x.x[1])};
      }
      if constexpr (kC.bias_tiled) {
        const uint32 x = tiled[r / 2][n % 2 * 2 + r % 2];
        added = {ptx::unpack<kC.bias_dtype>(uint16(x)), ptx::unpack<kC.bias_dtype>(uint16(x >> 16))};
      }
      if constexpr (kMaskDirect) {
        const int64 stride = kTransposed ? p.mask.row_stride : p.mask.col_stride;
        shown = load_two<kPaired>(row_mask[r] + safe * stride, step * stride);
        // Bytes are 0 or 1, as XLA has them.
        if constexpr (kShownInBits) shown_bits[r] |= (shown.x[0] | uint32(shown.x[1]) << 1) << 2 * n;
      }
#pragma unroll
      for (int32 e = 0; e < 2; ++e) {
        float& score = s.x[r / 2][n][r % 2 * 2 + e];
        float x = score;
        if constexpr (kC.softcap) {
          const float y = ptx::tanh_approx(x * in.inverse_cap);
          on_cap(r / 2, n, r % 2 * 2 + e, y);
          x = y * in.cap;
        } else if constexpr (kScoresInLog2<kC>) {
          x *= in.factor;
        }
        if constexpr (kC.alibi) {
          const int32 i = row + 8 * r, j = c + e;
          x -= in.slope * fabsf(float((kTransposed ? j - i : i - j) + in.rule.offset));
        }
        if constexpr (kC.bias) x += added.x[e] * kLog2e;
        bool visible = true;
        if constexpr (kSeenInBits && kTransposed) visible = seen_bits[r] >> (2 * n + e) & 1;
        if constexpr (kMasked && !kSeenInBits) visible = seen[r].begin <= c + e && c + e < seen[r].end;
        if constexpr (kMaskDirect && !kShownInBits) visible = visible && shown.x[e];
        if constexpr (kC.mask_wide) visible = visible && mask_bits.shows(r, n, e);
        if constexpr (kC.segments) visible = visible && row_segment[r] == col_segment[e];
        score = visible ? x : -kInfinity;
      }
    }
  }
  if constexpr (!kTransposed && (kSeenInBits || kShownInBits)) {
#pragma unroll
    for (int32 r = 0; r < kRows; ++r) {
      const uint32 bits = (kSeenInBits ? seen_bits[r] : ~0u) & (kShownInBits ? shown_bits[r] : ~0u);
#pragma unroll
      for (int32 c = 0; c < kN / 4; ++c) {
        float& score = s.x[r / 2][c / 2][r % 2 * 2 + c % 2];
        score = bits >> c & 1 ? score : -kInfinity;
      }
    }
  }
}

// Calls visit(m, n, e, kept) for each element of the thread's part of a tile that starts at (row, col), multiples
// of 16. One call of Philox serves the rows and columns that a thread owns of 32 x 32 elements, with the same column
// residue; where a tile has only 16 rows or columns, half of what it yields.
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
      const uint32 row_tile = row / 32, col_tile = col / 32 + n / 4, row_residue = lane / 4,
                   col_residue = lane % 4 * 2 + e;
      const RandomBytes bytes = kTransposed ? dropout_bytes(stream, col_tile, col_residue, row_tile, row_residue)
                                            : dropout_bytes(stream, row_tile, row_residue, col_tile, col_residue);
#pragma unroll
      for (int32 r = 0; r < kM / 8; ++r)
#pragma unroll
        for (int32 c = 0; c < kTiles; ++c) {
          // Words go by queries, bytes by keys.
          const int32 query = kTransposed ? c : r, key = kTransposed ? r : c;
          const bool second_query = kTransposed ? right_half : lower_half,
                     second_key = kTransposed ? lower_half : right_half;
          const uint32 word = query < 2 && second_query ? bytes.word[query + 2] : bytes.word[query];
          visit(r / 2, n + c, r % 2 * 2 + e, dropout_keeps(word, key + (second_key ? 2 : 0), keep_threshold));
        }
    }
}

}  // namespace flash
