#include "ffi/decode.h"

#include <algorithm>
#include <array>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

namespace flash::ffi {
namespace {

constexpr const char* kOperandNames[] = {"query",
                                         "key",
                                         "value",
                                         "bias",
                                         "mask",
                                         "alibi_slopes",
                                         "sinks",
                                         "query_seq_lengths",
                                         "key_value_seq_lengths",
                                         "query_segment_ids",
                                         "key_value_segment_ids",
                                         "cu_seqlens_q",
                                         "cu_seqlens_kv",
                                         "page_table",
                                         "dropout_stream",
                                         "out",
                                         "lse",
                                         "d_out",
                                         "d_lse",
                                         "delta"};
static_assert(std::size(kOperandNames) == size_t(Operand::kCount));

constexpr auto kF32 = xf::DataType::F32;
constexpr auto kS32 = xf::DataType::S32;
constexpr auto kU32 = xf::DataType::U32;

xf::DataType data_type(DType dtype) {
  return dtype == DType::kBF16 ? xf::DataType::BF16 : dtype == DType::kF16 ? xf::DataType::F16 : kF32;
}

// An axis of an operand behind its batch axes: its meaning, its size, and whether size 1 stands for all.
struct Axis {
  int64 View::*stride;
  int64 size;
  bool broadcasts = false;
};

// Reads operands and results one by one and remembers the first thing that is wrong, so that decoding reads as a list
// of what is expected.
class Decoder {
 public:
  Decoder(const Attrs& attrs, xf::RemainingArgs args, xf::RemainingRets rets) : args_(args), rets_(rets) {
    int32 next = 0;
    for (int32 i = 0; i < int32(Operand::kCount); ++i) index_[i] = attrs.operands >> i & 1 ? next++ : -1;
    if (size_t(next) != args.size())
      fail("the custom call", "has an `operands` attribute that does not fit its operands");
  }

  bool ok() const { return error_.empty(); }
  xf::Error error() const { return xf::Error(xf::ErrorCode::kInvalidArgument, "jax_flash: " + error_); }

  bool has(Operand operand) const { return index_[int32(operand)] >= 0; }

  xf::Span<const int64_t> dims(Operand operand) {
    const auto buffer = args_.get<xf::AnyBuffer>(index_[int32(operand)]);
    if (buffer.has_value()) return buffer->dimensions();
    fail(kOperandNames[int32(operand)], "is missing");
    return {};
  }

  // Batch axes are what the query has in front of [row, head, dim].
  void set_batch(Problem& p) {
    const auto q = dims(Operand::kQuery);
    if (q.size() < 3 || q.size() - 3 > size_t(kMaxBatchAxes))
      return fail("query", "must have 3 to " + std::to_string(3 + kMaxBatchAxes) + " axes");
    p.num_batch_axes = int32(q.size()) - 3;
    for (int32 a = 0; a < p.num_batch_axes; ++a) p.batch_dims[a] = q[a];
    problem_ = &p;
  }

  // An absent operand gives an empty View. Batch axes have size 1 or are full; trailing ones may be missing (pages).
  View operand(Operand operand, std::initializer_list<Axis> axes, std::initializer_list<xf::DataType> dtypes) {
    View view = {};
    if (!ok() || !has(operand)) return view;
    const auto buffer = args_.get<xf::AnyBuffer>(index_[int32(operand)]);
    bind(kOperandNames[int32(operand)], *buffer, axes, dtypes, /*full_batch=*/false, view);
    return view;
  }

  View result(size_t index, const char* name, std::initializer_list<Axis> axes, xf::DataType dtype) {
    View view = {};
    if (!ok()) return view;
    auto buffer = rets_.get<xf::AnyBuffer>(index);
    if (!buffer.has_value()) {
      fail(name, "is not among the results");
      return view;
    }
    bind(name, **buffer, axes, {dtype}, /*full_batch=*/true, view);
    return view;
  }

  // A result with the axes of `operand` but for the last two, which are `rows` and `cols`. Those in front are taken as
  // one, on `head`.
  View result_like(size_t index, const char* name, Operand operand, int64 rows, int64 cols, DType dtype) {
    View view = {};
    if (!ok()) return view;
    auto buffer = rets_.get<xf::AnyBuffer>(index);
    std::vector<int64_t> expected(dims(operand).begin(), dims(operand).end());
    expected.end()[-2] = rows, expected.end()[-1] = cols;
    if (!buffer.has_value() || (*buffer)->element_type() != data_type(dtype) ||
        !std::equal(expected.begin(), expected.end(), (*buffer)->dimensions().begin(), (*buffer)->dimensions().end())) {
      fail(name, std::string("is not the result that follows from ") + kOperandNames[int32(operand)]);
      return view;
    }
    view.data = address_of(**buffer);
    view.dtype = dtype;
    view.head_stride = rows * cols;
    view.row_stride = cols;
    view.col_stride = 1;
    return view;
  }

  void fail(const std::string& name, const std::string& what) {
    if (error_.empty()) error_ = name + " " + what;
  }

 private:
  void bind(const char* name, const xf::AnyBuffer& buffer, std::initializer_list<Axis> axes,
            std::initializer_list<xf::DataType> dtypes, bool full_batch, View& view) {
    bool known = false;
    for (xf::DataType dtype : dtypes) known |= dtype == buffer.element_type();
    if (!known) return fail(name, "has an unexpected dtype");
    view.dtype = buffer.element_type() == xf::DataType::BF16  ? DType::kBF16
                 : buffer.element_type() == xf::DataType::F16 ? DType::kF16
                                                              : DType::kF32;
    const auto dims = buffer.dimensions();
    if (dims.size() < axes.size() || dims.size() > axes.size() + problem_->num_batch_axes)
      return fail(name, "has " + std::to_string(dims.size()) + " axes, which is not what the query's shape asks for");
    int64 stride = 1;
    size_t axis = dims.size();
    for (auto it = std::rbegin(axes); it != std::rend(axes); ++it) {
      const int64 size = dims[--axis];
      const bool broadcast = it->broadcasts && size == 1;
      if (size != it->size && !broadcast) return fail(name, mismatch(axis, size, it->size));
      if (it->stride) view.*(it->stride) = broadcast ? 0 : stride;
      stride *= size;
    }
    while (axis-- > 0) {
      const int64 size = dims[axis];
      const bool broadcast = !full_batch && size == 1;
      if (size != problem_->batch_dims[axis] && !broadcast)
        return fail(name, mismatch(axis, size, problem_->batch_dims[axis]));
      view.batch_stride[axis] = broadcast ? 0 : stride;
      stride *= size;
    }
    view.data = address_of(buffer);
  }

  // Of a buffer that is present but empty some non-null address that is never read, as null means absent.
  static void* address_of(const xf::AnyBuffer& buffer) {
    return buffer.untyped_data() ? buffer.untyped_data() : &view_of_nothing_;
  }

  static std::string mismatch(size_t axis, int64 size, int64 expected) {
    return "has size " + std::to_string(size) + " on axis " + std::to_string(axis) + ", expected " +
           std::to_string(expected);
  }

  alignas(256) inline static float view_of_nothing_ = 0;  // aligned as XLA's buffers are

  xf::RemainingArgs args_;
  xf::RemainingRets rets_;
  std::array<int32, size_t(Operand::kCount)> index_;
  const Problem* problem_ = nullptr;
  std::string error_;
};

void decode_common(const Attrs& attrs, Decoder& d, Problem& p) {
  p.options = {attrs.scale,        attrs.logits_soft_cap, attrs.window_left,   attrs.window_right,
               attrs.bottom_right, attrs.keep_threshold,  attrs.return_softmax};
  d.set_batch(p);
  if (!d.ok()) return;
  const auto q = d.dims(Operand::kQuery), k = d.dims(Operand::kKey), v = d.dims(Operand::kValue);
  if (k.size() < 3 || v.size() < 3) return d.fail("key and value", "must have at least 3 axes");
  p.seqlen_q = q[q.size() - 3];
  p.num_heads = q[q.size() - 2];
  p.head_dim = q[q.size() - 1];
  p.num_heads_kv = k[k.size() - 2];
  p.head_dim_v = v[v.size() - 1];
  const int64 kv_rows = k[k.size() - 3];
  const bool packed = d.has(Operand::kCuSeqlensQ);
  for (Operand operand : {Operand::kCuSeqlensQ, Operand::kPageTable})
    if (d.has(operand) && d.dims(operand).size() == 0)
      return d.fail(kOperandNames[int32(operand)], "must have an axis");
  p.num_sequences = packed ? d.dims(Operand::kCuSeqlensQ).back() - 1 : 1;
  if (p.num_sequences < 0) d.fail("cu_seqlens_q", "must hold at least one offset");
  if (p.num_heads_kv == 0 ? p.num_heads != 0 : p.num_heads % p.num_heads_kv != 0)
    d.fail("query", "must have a multiple of the key's heads");
  if (p.head_dim > kMaxHeadDim || p.head_dim_v > kMaxHeadDim) d.fail("head dims", "must be at most 256");
  if (attrs.keep_threshold < 1 || attrs.keep_threshold > 256) d.fail("keep_threshold", "must be in 1..256");

  const auto any_float = {kF32, xf::DataType::BF16, xf::DataType::F16};
  p.q = d.operand(Operand::kQuery,
                  {{&View::row_stride, p.seqlen_q}, {&View::head_stride, p.num_heads}, {&View::col_stride, p.head_dim}},
                  any_float);
  p.dtype = p.q.dtype;
  const auto same = {data_type(p.dtype)};
  const Axis kv_head = {&View::head_stride, p.num_heads_kv};
  if (d.has(Operand::kPageTable)) {
    if (k.size() < 4) return d.fail("key", "must be [pages, page_size, heads, head_dim]");
    p.page_size = kv_rows;
    p.num_pages = k[k.size() - 4];
    const int64 max_pages = d.dims(Operand::kPageTable).back();
    p.seqlen_kv = p.num_pages ? max_pages * p.page_size : 0;
    if (p.page_size < 1) d.fail("key", "must have a page size of at least 1");
    const Axis page = {nullptr, p.num_pages}, row = {&View::row_stride, p.page_size};
    p.k = d.operand(Operand::kKey, {page, row, kv_head, {&View::col_stride, p.head_dim}}, same);
    p.v = d.operand(Operand::kValue, {page, row, kv_head, {&View::col_stride, p.head_dim_v}}, same);
    const Axis table = {&View::col_stride, max_pages}, sequence = {&View::row_stride, p.num_sequences};
    p.page_table = packed ? d.operand(Operand::kPageTable, {sequence, table}, {kS32})
                          : d.operand(Operand::kPageTable, {table}, {kS32});
  } else {
    p.seqlen_kv = kv_rows;
    const Axis row = {&View::row_stride, p.seqlen_kv};
    p.k = d.operand(Operand::kKey, {row, kv_head, {&View::col_stride, p.head_dim}}, same);
    p.v = d.operand(Operand::kValue, {row, kv_head, {&View::col_stride, p.head_dim_v}}, same);
  }
  auto bound = [&](int64 max_seqlen, int64 rows) {
    return packed ? clamp_to<int64>(max_seqlen, 1, max_of<int64>(rows, 1)) : rows;
  };
  p.max_seqlen_q = bound(attrs.max_seqlen_q, p.seqlen_q);
  p.max_seqlen_kv = p.page_size ? p.seqlen_kv : bound(attrs.max_seqlen_kv, p.seqlen_kv);
  // Kernels count rows in 32 bits, also up to the end of the last block, which may lie behind the sequence.
  constexpr int64 kMaxLength = std::numeric_limits<int32>::max() - 256;
  if (p.seqlen_q > kMaxLength || p.seqlen_kv > kMaxLength) d.fail("sequence lengths", "must be below 2^31 - 256");

  const Axis head = {&View::head_stride, p.num_heads};
  const std::initializer_list<Axis> scores = {{&View::head_stride, p.num_heads, true},
                                              {&View::row_stride, p.seqlen_q, true},
                                              {&View::col_stride, p.seqlen_kv, true}};
  p.bias = d.operand(Operand::kBias, scores, any_float);
  p.mask = d.operand(Operand::kMask, scores, {xf::DataType::PRED});
  p.sinks = d.operand(Operand::kSinks, {head}, {kF32});
  const Axis sequence = {&View::row_stride, p.num_sequences}, offsets = {&View::row_stride, p.num_sequences + 1};
  p.alibi_slopes = packed ? d.operand(Operand::kAlibiSlopes, {{&View::row_stride, p.num_sequences, true}, head}, {kF32})
                          : d.operand(Operand::kAlibiSlopes, {head}, {kF32});
  auto lengths = [&](Operand operand) {
    return packed ? d.operand(operand, {sequence}, {kS32}) : d.operand(operand, {}, {kS32});
  };
  p.q_lens = lengths(Operand::kQuerySeqLengths);
  p.kv_lens = lengths(Operand::kKeyValueSeqLengths);
  p.q_segment_ids = d.operand(Operand::kQuerySegmentIds, {{&View::row_stride, p.seqlen_q}}, {kS32});
  p.kv_segment_ids = d.operand(Operand::kKeyValueSegmentIds, {{&View::row_stride, p.seqlen_kv}}, {kS32});
  if (d.has(Operand::kQuerySegmentIds) != d.has(Operand::kKeyValueSegmentIds))
    d.fail("segment ids", "must be given for both or neither of queries and keys");
  p.cu_seqlens_q = d.operand(Operand::kCuSeqlensQ, {offsets}, {kS32});
  p.cu_seqlens_kv = d.operand(Operand::kCuSeqlensKv, {offsets}, {kS32});
  p.dropout_stream = d.operand(Operand::kDropoutStream, {head, {nullptr, 4}}, {kU32});
  if ((attrs.keep_threshold < 256) != d.has(Operand::kDropoutStream))
    d.fail("dropout_stream", "and keep_threshold do not agree");
}

}  // namespace

xf::ErrorOr<FwdProblem> decode_fwd(const Attrs& attrs, xf::RemainingArgs args, xf::RemainingRets rets) {
  FwdProblem p = {};
  Decoder d(attrs, args, rets);
  if (d.ok()) decode_common(attrs, d, p);
  if (d.ok()) {
    const Axis row = {&View::row_stride, p.seqlen_q}, head = {&View::head_stride, p.num_heads};
    p.o = d.result(0, "out", {row, head, {&View::col_stride, p.head_dim_v}}, data_type(p.dtype));
    p.lse = d.result(1, "lse", {head, row}, kF32);
    if (attrs.return_softmax) {
      const bool packed = p.cu_seqlens_q.data;
      p.probs_rows = packed ? attrs.max_seqlen_q : p.seqlen_q;
      p.probs_cols = packed ? attrs.max_seqlen_kv : p.seqlen_kv;
      const Axis i = {&View::row_stride, p.probs_rows}, j = {&View::col_stride, p.probs_cols};
      p.probs = packed ? d.result(2, "probs", {{nullptr, p.num_sequences}, head, i, j}, kF32)
                       : d.result(2, "probs", {head, i, j}, kF32);
      p.probs_sequence_stride = p.num_heads * p.probs_rows * p.probs_cols;
    }
    p.next_unit = d.result(attrs.return_softmax ? 3 : 2, "next_unit", {}, kS32);
  }
  if (!d.ok()) return xf::Unexpected(d.error());
  return p;
}

xf::ErrorOr<BwdProblem> decode_bwd(const Attrs& attrs, xf::RemainingArgs args, xf::RemainingRets rets) {
  BwdProblem p = {};
  Decoder d(attrs, args, rets);
  if (d.ok()) decode_common(attrs, d, p);
  if (d.ok() && p.page_size) d.fail("page_table", "has no backward pass");
  if (d.ok()) {
    const Axis row = {&View::row_stride, p.seqlen_q}, head = {&View::head_stride, p.num_heads};
    const Axis kv_row = {&View::row_stride, p.seqlen_kv}, kv_head = {&View::head_stride, p.num_heads_kv};
    const Axis dim = {&View::col_stride, p.head_dim}, dim_v = {&View::col_stride, p.head_dim_v};
    const xf::DataType dtype = data_type(p.dtype);
    for (Operand operand : {Operand::kOut, Operand::kLse, Operand::kDOut, Operand::kDLse})
      if (!d.has(operand)) d.fail(kOperandNames[int32(operand)], "is missing");
    p.o = d.operand(Operand::kOut, {row, head, dim_v}, {dtype});
    p.lse = d.operand(Operand::kLse, {head, row}, {kF32});
    p.d_o = d.operand(Operand::kDOut, {row, head, dim_v}, {dtype});
    p.d_lse = d.operand(Operand::kDLse, {head, row}, {kF32});
    p.dq = d.result(0, "dq", {row, head, dim}, dtype);
    p.dk = d.result(1, "dk", {kv_row, kv_head, dim}, dtype);
    p.dv = d.result(2, "dv", {kv_row, kv_head, dim_v}, dtype);
    p.delta = d.result(3, "delta", {head, row}, kF32);
    const int64 accum_blocks = p.seqlen_q / 16 + p.num_sequences, accum_floats = 16 * round_up(p.head_dim, 8);
    p.dq_accum =
        d.result(4, "dq_accum", {head, {&View::row_stride, accum_blocks}, {&View::col_stride, accum_floats}}, kF32);
    p.statistics = d.result(
        5, "statistics",
        {head, {&View::row_stride, num_statistics_blocks(p)}, {&View::col_stride, int64{2} * kStatisticsBlock}}, kF32);
    p.next_unit = d.result(6, "next_unit", {}, kS32);
    if (attrs.deterministic) p.tickets = d.result(7, "tickets", {head, row}, kS32);
  }
  if (!d.ok()) return xf::Unexpected(d.error());
  return p;
}

xf::ErrorOr<DbiasProblem> decode_dbias(const Attrs& attrs, xf::RemainingArgs args, xf::RemainingRets rets) {
  DbiasProblem p = {};
  Decoder d(attrs, args, rets);
  if (d.ok()) decode_common(attrs, d, p);
  for (Operand operand : {Operand::kCuSeqlensQ, Operand::kPageTable})
    if (d.ok() && d.has(operand)) d.fail(kOperandNames[int32(operand)], "has no bias gradient");
  if (d.ok()) {
    const Axis row = {&View::row_stride, p.seqlen_q}, head = {&View::head_stride, p.num_heads};
    for (Operand operand : {Operand::kBias, Operand::kLse, Operand::kDOut, Operand::kDelta})
      if (!d.has(operand)) d.fail(kOperandNames[int32(operand)], "is missing");
    p.lse = d.operand(Operand::kLse, {head, row}, {kF32});
    p.d_o = d.operand(Operand::kDOut, {row, head, {&View::col_stride, p.head_dim_v}}, {data_type(p.dtype)});
    p.delta = d.operand(Operand::kDelta, {head, row}, {kF32});
    if (d.ok()) {
      const auto dims = d.dims(Operand::kBias);
      const bool one_row = dims[dims.size() - 2] == 1, one_col = dims[dims.size() - 1] == 1;
      p.dbias = d.result_like(0, "dbias", Operand::kBias, one_row ? ceil_div(p.seqlen_q, kBiasBlock) : p.seqlen_q,
                              one_col ? ceil_div(p.seqlen_kv, kBiasBlock) : p.seqlen_kv,
                              one_row || one_col ? DType::kF32 : p.bias.dtype);
    }
  }
  if (!d.ok()) return xf::Unexpected(d.error());
  return p;
}

}  // namespace flash::ffi
