// Forward attention for one block of queries: Dao et al., "FlashAttention", 2022, algorithm 1, with the online softmax
// of Milakov and Gimelshein, 2018.
#include "cpu/tile.h"

namespace flash::cpu {
namespace {

struct Tiles {
  float* qt;       // [head_dim, lanes]
  float* kv;       // [kBlockKv, padded(head_dim or head_dim_v)], also the rows of Q before their transpose
  float* scores;   // [kBlockKv, lanes]
  float* ot;       // [head_dim_v, lanes]
  int32* keep;     // [kBlockKv, lanes]
  float* maximum;  // [lanes] running maximum of the scores, log2 units
  float* sum;      // [lanes] running sum of 2^(score - maximum)
  float* row;      // [head_dim_v]
};

Tiles make_tiles(const FwdProblem& p, Scratch& scratch) {
  const int64 dim = max_of(padded(p.head_dim), padded(p.head_dim_v));
  static_assert(kBlockQ == kBlockKv, "Q passes through the K and V tile");
  Tiles t;
  t.qt = scratch.take(p.head_dim * kBlockQ);
  t.kv = scratch.take(kBlockKv * dim);
  t.scores = scratch.take(kBlockKv * kBlockQ);
  t.ot = scratch.take(p.head_dim_v * kBlockQ);
  t.keep = reinterpret_cast<int32*>(scratch.take(kBlockKv * kBlockQ));
  t.maximum = scratch.take(kBlockQ);
  t.sum = scratch.take(kBlockQ);
  t.row = scratch.take(p.head_dim_v);
  return t;
}

// Turns scores [keys, lanes] into 2^(score - maximum), moves maximum and sum on, and rescales O^T where the maximum
// grew.
void online_softmax(const FwdProblem& p, const QueryTile& q, int64 keys, Tiles& t) {
  for (int64 i = 0; i < q.lanes; i += kLanes) {
    const VecF before = load(t.maximum + i);
    VecF maximum = before;
    for (int64 j = 0; j < keys; ++j) maximum = max(load(t.scores + j * q.lanes + i), maximum);
    // A row that has seen no key yet: -inf - -inf would be NaN.
    const VecF origin = select(maximum == splat(-__builtin_inff()), VecF{}, maximum);
    VecF sum{};
    for (int64 j = 0; j < keys; ++j) {
      float* score = t.scores + j * q.lanes + i;
      const VecF probability = exp2(load(score) - origin);
      store(score, probability);
      sum += probability;
    }
    const VecF rescale = exp2(before - origin);
    store(t.sum + i, load(t.sum + i) * rescale + sum);
    store(t.maximum + i, maximum);
    bool grew = false;
    for (int64 l = 0; l < kLanes; ++l) grew |= rescale[l] != 1.0f;
    if (!grew) continue;
    for (int64 d = 0; d < p.head_dim_v; ++d) {
      float* o = t.ot + d * q.lanes + i;
      store(o, load(o) * rescale);
    }
  }
}

void drop(const QueryTile& q, int64 keys, Tiles& t) {
  for (int64 e = 0; e < keys * q.lanes; e += kLanes)
    store(t.scores + e, select(load(t.keep + e), load(t.scores + e), VecF{}));
}

// Calls body(key, keys) for each tile of keys that the block of queries sees, with its scores made.
template <class Body>
void for_each_tile(const FwdProblem& p, const FwdUnit& unit, const QueryTile& q, Tiles& t, Body body) {
  const Sequence& s = unit.sequence;
  const int64 head_kv = unit.head / (p.num_heads / p.num_heads_kv);
  for (int64 key = q.keys.begin / kBlockKv * kBlockKv; key < q.keys.end; key += kBlockKv) {
    const int64 keys = min_of<int64>(kBlockKv, q.keys.end - key);
    const BlockKind kind = classify_tile(p, s, unit.head, q, key, keys);
    if (kind == BlockKind::kNone) continue;
    load_kv_rows(p, p.k, s, head_kv, key, keys, p.head_dim, t.kv);
    score_tile(p, s, unit.head, q, t.qt, t.kv, key, keys, kind, t.scores);
    if (p.dropout_stream.data) dropout_tile(p, s, unit.head, q, key, keys, t.keep);
    body(key, keys);
  }
}

// The probabilities themselves, for tests: a second pass, as only now the sums are known. Dropped ones are negative.
void store_probs(const FwdProblem& p, const FwdUnit& unit, const QueryTile& q, Tiles& t) {
  const Sequence& s = unit.sequence;
  float* probs = pointer_to<float>(p, p.probs, s.batch, unit.head, q.begin) + s.index * p.probs_sequence_stride;
  const int64 rows = min_of(q.rows, p.probs_rows - q.begin);
  for_each_tile(p, unit, q, t, [&](int64 key, int64 keys) {
    for (int64 j = 0; j < min_of(keys, p.probs_cols - key); ++j)
      for (int64 i = 0; i < rows; ++i) {
        const int64 e = j * q.lanes + i;
        if (t.scores[e] == -__builtin_inff()) continue;
        const float probability = exp2(splat(t.scores[e] - t.maximum[i]))[0] / t.sum[i];
        const bool dropped = p.dropout_stream.data && !t.keep[e];
        probs[i * p.probs.row_stride + key + j] = dropped ? -probability : probability;
      }
  });
}

void fwd(const FwdProblem& p, const FwdUnit& unit, float* memory) {
  const Sequence& s = unit.sequence;
  Scratch scratch{memory};
  Tiles t = make_tiles(p, scratch);
  const QueryTile q = make_query_tile(p, s, unit.head, unit.q_begin);
  const int64 head_kv = unit.head / (p.num_heads / p.num_heads_kv);
  const int64 row = s.q_begin + q.begin;

  load_rows(p, p.q, s.batch, unit.head, row, q.rows, p.head_dim, t.kv);
  transpose(t.kv, q.rows, p.head_dim, p.options.scale * kLog2e, q.lanes, t.qt);
  // A sink is a key whose value is zero: the softmax starts from it instead of from nothing.
  const float sink = p.sinks.data ? *pointer_to<float>(p, p.sinks, s.batch, unit.head, 0) * kLog2e : -__builtin_inff();
  for (int64 i = 0; i < q.lanes; ++i) {
    t.maximum[i] = sink;
    t.sum[i] = p.sinks.data ? 1.0f : 0.0f;
  }
  for (int64 e = 0; e < p.head_dim_v * q.lanes; ++e) t.ot[e] = 0.0f;

  for_each_tile(p, unit, q, t, [&](int64 key, int64 keys) {
    online_softmax(p, q, keys, t);
    if (p.dropout_stream.data) drop(q, keys, t);
    load_kv_rows(p, p.v, s, head_kv, key, keys, p.head_dim_v, t.kv);
    gemm<true>(p.head_dim_v, q.lanes, keys, t.kv, padded(p.head_dim_v), t.scores, q.lanes, t.ot, q.lanes, true);
  });

  const float keep_scale = p.dropout_stream.data ? dropout_scale(p) : 1.0f;
  for (int64 i = 0; i < q.rows; ++i) {
    const float inverse = t.sum[i] == 0.0f ? 0.0f : keep_scale / t.sum[i];
    // A row that saw no key is 0 even where O^T is not: a hidden value that is NaN makes 0 * NaN.
    for (int64 d = 0; d < p.head_dim_v; ++d) t.row[d] = inverse == 0.0f ? 0.0f : t.ot[d * q.lanes + i] * inverse;
    store_row(p.o, offset_of(p, p.o, s.batch, unit.head, row + i), p.head_dim_v, t.row);
    *pointer_to<float>(p, p.lse, s.batch, unit.head, row + i) =
        t.sum[i] == 0.0f ? -__builtin_inff() : t.maximum[i] * kLn2 + __builtin_logf(t.sum[i]);
  }
  if (p.options.return_softmax) store_probs(p, unit, q, t);
}

int64 fwd_scratch(const FwdProblem& p) {
  Scratch scratch{nullptr};
  make_tiles(p, scratch);
  return scratch.used;
}

}  // namespace

const FwdKernel FLASH_ISA::fwd_kernel = {fwd_scratch, fwd};

}  // namespace flash::cpu
