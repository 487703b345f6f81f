// Backward attention for one kv head: Dao et al., "FlashAttention", 2022, algorithm 4, with P recomputed from the LSE.
//
//   P  = exp(S - LSE)          dV = P^T dO          dP = dO V^T
//   dS = P * (dP - delta)      dQ = scale dS K      dK = scale dS^T Q       delta = rowsum(dO * O) - dLSE
//
// dLSE enters by delta alone, since dLSE/dS = P. dK and dV of the unit's keys stay in float32 in the thread's scratch
// until all query heads of the group are summed.
//
// And the gradient of a bias: dS before the soft cap, formed again for a block of the bias at a time, so that its sums
// over what shares the block stay in the thread's scratch too.
#include "cpu/tile.h"

namespace flash::cpu {
namespace {

struct Tiles {
  float *k, *v;         // [unit keys, padded(head_dim)], [unit keys, padded(head_dim_v)]
  float *dk, *dv;       // likewise
  float *q, *qt;        // [kBlockQ, padded(head_dim)], [head_dim, lanes]
  float *d_o, *d_ot;    // [kBlockQ, padded(head_dim_v)], [head_dim_v, lanes]
  float* dq;            // [kBlockQ, padded(head_dim)]
  float *scores, *dp;   // [kBlockKv, lanes]; they become P and dS
  float* softcap_grad;  // [kBlockKv, lanes]
  int32* keep;          // [kBlockKv, lanes]
  float *lse, *delta;   // [lanes], LSE in log2 units
  float* row;           // [max(head_dim, head_dim_v)]
};

Tiles make_tiles(const Problem& p, int64 unit_keys, Scratch& scratch) {
  const int64 dim = padded(p.head_dim), dim_v = padded(p.head_dim_v);
  Tiles t;
  t.k = scratch.take(unit_keys * dim);
  t.v = scratch.take(unit_keys * dim_v);
  t.dk = scratch.take(unit_keys * dim);
  t.dv = scratch.take(unit_keys * dim_v);
  t.q = scratch.take(kBlockQ * dim);
  t.qt = scratch.take(kBlockQ * dim);
  t.d_o = scratch.take(kBlockQ * dim_v);
  t.d_ot = scratch.take(kBlockQ * dim_v);
  t.dq = scratch.take(kBlockQ * dim);
  t.scores = scratch.take(kBlockKv * kBlockQ);
  t.dp = scratch.take(kBlockKv * kBlockQ);
  t.softcap_grad = scratch.take(kBlockKv * kBlockQ);
  t.keep = reinterpret_cast<int32*>(scratch.take(kBlockKv * kBlockQ));
  t.lse = scratch.take(kBlockQ);
  t.delta = scratch.take(kBlockQ);
  t.row = scratch.take(max_of(dim, dim_v));
  return t;
}

void set_zero(float* x, int64 count) {
  for (int64 e = 0; e < count; ++e) x[e] = 0.0f;
}

// Of a row of dO that has been loaded; `row` is scratch.
float delta_of(const BwdProblem& p, int64 batch, int64 head, int64 i, const float* d_o, float* row) {
  load_row(p.o, offset_of(p, p.o, batch, head, i), p.head_dim_v, row);
  float delta = -*pointer_to<float>(p, p.d_lse, batch, head, i);
  for (int64 d = 0; d < p.head_dim_v; ++d) delta += row[d] * d_o[d];
  return delta;
}
float delta_of(const DbiasProblem& p, int64 batch, int64 head, int64 i, const float*, float*) {
  return *pointer_to<float>(p, p.delta, batch, head, i);
}

// The query side of a block: Q, dO (rows and transposed), LSE and delta. Rows that see no key and lanes past the last
// row get P = 0, and Q = dO = 0 as well, for what stands there may be NaN.
template <class P>
void load_query_side(const P& p, const Sequence& s, int64 head, const QueryTile& q, Tiles& t) {
  const int64 row = s.q_begin + q.begin, ldq = padded(p.head_dim), ldo = padded(p.head_dim_v);
  load_rows(p, p.q, s.batch, head, row, q.rows, p.head_dim, t.q);
  load_rows(p, p.d_o, s.batch, head, row, q.rows, p.head_dim_v, t.d_o);
  for (int64 i = 0; i < q.lanes; ++i) {
    const float lse = i < q.rows ? *pointer_to<float>(p, p.lse, s.batch, head, row + i) : -__builtin_inff();
    if (lse == -__builtin_inff()) {
      set_zero(t.q + i * ldq, ldq);
      set_zero(t.d_o + i * ldo, ldo);
      t.lse[i] = __builtin_inff();
      t.delta[i] = 0.0f;
      continue;
    }
    t.lse[i] = lse * kLog2e;
    t.delta[i] = delta_of(p, s.batch, head, row + i, t.d_o + i * ldo, t.row);
  }
  transpose(t.q, q.rows, p.head_dim, p.options.scale * kLog2e, q.lanes, t.qt);
  transpose(t.d_o, q.rows, p.head_dim_v, 1.0f, q.lanes, t.d_ot);
}

// scores -> P as dV needs it (dropped and rescaled), dp -> dS before softcap and scale.
void softmax_backward(const Problem& p, const QueryTile& q, int64 keys, Tiles& t) {
  const bool dropout = p.dropout_stream.data;
  const VecF keep_scale = splat(dropout ? dropout_scale(p) : 1.0f);
  for (int64 j = 0; j < keys; ++j)
    for (int64 i = 0; i < q.lanes; i += kLanes) {
      const int64 e = j * q.lanes + i;
      const VecF probability = exp2(load(t.scores + e) - load(t.lse + i));
      VecF scale = keep_scale;
      if (dropout) scale = select(load(t.keep + e), scale, VecF{});
      const VecF ds = probability * (load(t.dp + e) * scale - load(t.delta + i));
      store(t.scores + e, probability * scale);
      // dP of a hidden element may be NaN (its key may be), and 0 * NaN is not 0.
      store(t.dp + e, select(probability == VecF{}, VecF{}, ds));
    }
}

// dS through the soft cap; its derivative may be NaN where the element is hidden.
void softcap_backward(const QueryTile& q, int64 keys, Tiles& t) {
  for (int64 e = 0; e < keys * q.lanes; e += kLanes) {
    const VecF ds = load(t.dp + e);
    store(t.dp + e, select(ds == VecF{}, VecF{}, ds * load(t.softcap_grad + e)));
  }
}

void bwd(const BwdProblem& p, const BwdUnit& unit, float* memory) {
  const Sequence& s = unit.sequence;
  const int64 unit_keys = unit.kv_end - unit.kv_begin;
  const int64 ldk = padded(p.head_dim), ldv = padded(p.head_dim_v);
  Scratch scratch{memory};
  Tiles t = make_tiles(p, unit_keys, scratch);

  load_kv_rows(p, p.k, s, unit.head_kv, unit.kv_begin, unit_keys, p.head_dim, t.k);
  load_kv_rows(p, p.v, s, unit.head_kv, unit.kv_begin, unit_keys, p.head_dim_v, t.v);
  set_zero(t.dk, unit_keys * ldk);
  set_zero(t.dv, unit_keys * ldv);

  const int64 group = p.num_heads / p.num_heads_kv;
  for (int64 head = unit.head_kv * group; head < (unit.head_kv + 1) * group; ++head) {
    for (int64 q_begin = 0; q_begin < s.q_len; q_begin += kBlockQ) {
      const QueryTile q = make_query_tile(p, s, head, q_begin);
      load_query_side(p, s, head, q, t);
      set_zero(t.dq, q.lanes * ldk);

      const int64 first = max_of<int64>(unit.kv_begin, q.keys.begin / kBlockKv * kBlockKv);
      const int64 last = min_of<int64>(unit.kv_end, q.keys.end);
      for (int64 key = first; key < last; key += kBlockKv) {
        const int64 keys = min_of(kBlockKv, last - key), at = key - unit.kv_begin;
        const BlockKind kind = classify_tile(p, s, head, q, key, keys);
        if (kind == BlockKind::kNone) continue;
        const float *k = t.k + at * ldk, *v = t.v + at * ldv;
        score_tile(p, s, head, q, t.qt, k, key, keys, kind, t.scores, t.softcap_grad);
        gemm<false>(keys, q.lanes, p.head_dim_v, v, ldv, t.d_ot, q.lanes, t.dp, q.lanes, false);
        if (p.dropout_stream.data) dropout_tile(p, s, head, q, key, keys, t.keep);
        softmax_backward(p, q, keys, t);
        if (p.options.softcap != 0.0f) softcap_backward(q, keys, t);
        gemm<false>(keys, ldv, q.lanes, t.scores, q.lanes, t.d_o, ldv, t.dv + at * ldv, ldv, true);
        gemm<false>(keys, ldk, q.lanes, t.dp, q.lanes, t.q, ldk, t.dk + at * ldk, ldk, true);
        gemm<true>(q.rows, ldk, keys, t.dp, q.lanes, k, ldk, t.dq, ldk, true);
      }

      for (int64 i = 0; i < q.rows; ++i) {
        const int64 row = s.q_begin + q.begin + i;
        const bool sees_none = t.lse[i] == __builtin_inff();  // dQ is 0 even beside a key that is NaN
        for (int64 c = 0; c < p.head_dim; ++c) t.row[c] = sees_none ? 0.0f : t.dq[i * ldk + c] * p.options.scale;
        store_row(unit.dq, offset_of(p, unit.dq, s.batch, head, row), p.head_dim, t.row);
        if (unit.first_split) *pointer_to<float>(p, p.delta, s.batch, head, row) = t.delta[i];
      }
    }
  }

  for (int64 j = 0; j < unit_keys; ++j) {
    const int64 row = s.kv_begin + unit.kv_begin + j;
    for (int64 c = 0; c < p.head_dim; ++c) t.row[c] = t.dk[j * ldk + c] * p.options.scale;
    store_row(p.dk, offset_of(p, p.dk, s.batch, unit.head_kv, row), p.head_dim, t.row);
    store_row(p.dv, offset_of(p, p.dv, s.batch, unit.head_kv, row), p.head_dim_v, t.dv + j * ldv);
  }
}

void sum_dq(const BwdProblem& p, const BwdUnit& unit, const float* partials, int64 splits) {
  const Sequence& s = unit.sequence;
  const int64 elements = num_batch_entries(p) * p.seqlen_q * p.num_heads * p.head_dim;
  const int64 group = p.num_heads / p.num_heads_kv;
  float sum[kMaxHeadDim];
  for (int64 head = unit.head_kv * group; head < (unit.head_kv + 1) * group; ++head)
    for (int64 i = 0; i < s.q_len; ++i) {
      const int64 offset = offset_of(p, p.dq, s.batch, head, s.q_begin + i);
      for (int64 c = 0; c < p.head_dim; ++c) sum[c] = partials[offset + c];
      for (int64 split = 1; split < splits; ++split)
        for (int64 c = 0; c < p.head_dim; ++c) sum[c] += partials[split * elements + offset + c];
      store_row(p.dq, offset, p.head_dim, sum);
    }
}

int64 bwd_scratch(const BwdProblem& p, int64 max_unit_keys) {
  Scratch scratch{nullptr};
  make_tiles(p, max_unit_keys, scratch);
  return scratch.used;
}

// Adds dS of one head and its block of queries to sums [kBlockQ, seqlen_kv].
void add_dbias(const DbiasProblem& p, const Sequence& s, int64 head, int64 q_begin, Tiles& t, float* sums) {
  const QueryTile q = make_query_tile(p, s, head, q_begin);
  load_query_side(p, s, head, q, t);
  const int64 head_kv = head / (p.num_heads / p.num_heads_kv), ldv = padded(p.head_dim_v);
  for (int64 key = q.keys.begin / kBlockKv * kBlockKv; key < q.keys.end; key += kBlockKv) {
    const int64 keys = min_of<int64>(kBlockKv, q.keys.end - key);
    const BlockKind kind = classify_tile(p, s, head, q, key, keys);
    if (kind == BlockKind::kNone) continue;
    load_kv_rows(p, p.k, s, head_kv, key, keys, p.head_dim, t.k);
    load_kv_rows(p, p.v, s, head_kv, key, keys, p.head_dim_v, t.v);
    score_tile(p, s, head, q, t.qt, t.k, key, keys, kind, t.scores);
    gemm<false>(keys, q.lanes, p.head_dim_v, t.v, ldv, t.d_ot, q.lanes, t.dp, q.lanes, false);
    if (p.dropout_stream.data) dropout_tile(p, s, head, q, key, keys, t.keep);
    softmax_backward(p, q, keys, t);
    for (int64 i = 0; i < q.rows; ++i) {
      if (t.lse[i] == __builtin_inff()) continue;  // sees no key
      float* row = sums + i * p.seqlen_kv + key;
      for (int64 j = 0; j < keys; ++j) row[j] += t.dp[j * q.lanes + i];
    }
  }
}

// Sums over blocks of `count` elements, in place; how many there are.
int64 sum_blocks(float* row, int64 count) {
  for (int64 begin = 0; begin < count; begin += kBiasBlock) {
    float sum = 0.0f;
    for (int64 j = begin; j < min_of(begin + kBiasBlock, count); ++j) sum += row[j];
    row[begin / kBiasBlock] = sum;
  }
  return ceil_div(count, kBiasBlock);
}

void dbias(const DbiasProblem& p, const Sequence* of_entry, const DbiasUnit& unit, float* memory) {
  static_assert(kBlockQ == kBiasBlock);
  Scratch scratch{memory};
  Tiles t = make_tiles(p, kBlockKv, scratch);
  float* sums = scratch.take(kBlockQ * p.seqlen_kv);
  set_zero(sums, kBlockQ * p.seqlen_kv);

  const int64 entries = num_batch_entries(p) / num_bias_entries(p), heads = p.num_heads / num_bias_heads(p);
  for (int64 sharer = 0; sharer < entries; ++sharer) {
    const Sequence& s = of_entry[entry_sharing_bias(p, p.num_batch_axes, uint32(unit.entry), uint32(sharer))];
    for (int64 head = unit.head; head < unit.head + heads && unit.q_begin < s.q_len; ++head)
      add_dbias(p, s, head, unit.q_begin, t, sums);
  }

  int64 rows = min_of(kBlockQ, p.seqlen_q - unit.q_begin), cols = p.seqlen_kv, row = unit.q_begin;
  if (!p.bias.row_stride) {
    for (int64 i = 1; i < rows; ++i)
      for (int64 j = 0; j < cols; ++j) sums[j] += sums[i * cols + j];
    rows = 1, row /= kBiasBlock;
  }
  for (int64 i = 0; i < rows; ++i) {
    float* values = sums + i * p.seqlen_kv;
    if (!p.bias.col_stride) cols = sum_blocks(values, p.seqlen_kv);
    const int64 entry_head = unit.entry * num_bias_heads(p) + unit.head;
    store_row(p.dbias, entry_head * p.dbias.head_stride + (row + i) * p.dbias.row_stride, cols, values);
  }
}

int64 dbias_scratch(const DbiasProblem& p) {
  Scratch scratch{nullptr};
  make_tiles(p, kBlockKv, scratch);
  scratch.take(kBlockQ * p.seqlen_kv);
  return scratch.used;
}

}  // namespace

const BwdKernel FLASH_ISA::bwd_kernel = {bwd_scratch, bwd, sum_dq};
const DbiasKernel FLASH_ISA::dbias_kernel = {dbias_scratch, dbias};

}  // namespace flash::cpu
