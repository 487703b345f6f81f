#include "cuda/simplify.h"

#include <initializer_list>

namespace flash::cuda {
namespace {

// Operands are given as members, so that one list serves to read and to write.
template <class P>
void collapse(P& p, std::initializer_list<View P::*> views) {
  int32 kept = 0;
  for (int32 axis = 0; axis < p.num_batch_axes; ++axis) {
    const int64 size = p.batch_dims[axis];
    if (size == 1) continue;
    bool joins = kept > 0;
    for (View P::*view : views) {
      const int64* stride = (p.*view).batch_stride;
      joins = joins && stride[kept - 1] == stride[axis] * size;
    }
    if (!joins) p.batch_dims[kept++] = 1;
    p.batch_dims[kept - 1] *= size;
    for (View P::*view : views) (p.*view).batch_stride[kept - 1] = (p.*view).batch_stride[axis];
  }
  if (kept == 0) {  // no axis, or one of size 1, must not be a kernel of its own
    p.batch_dims[kept++] = 1;
    for (View P::*view : views) (p.*view).batch_stride[0] = 0;
  }
  p.num_batch_axes = kept;
}

// The heads of a group become queries of one head. Not where kernels know of slopes and random bits by head, and of
// lengths and segments by query; nor where weights are returned.
void make_heads_queries(FwdProblem& p) {
  if (p.seqlen_q != 1 || p.num_heads == p.num_heads_kv) return;
  for (const View* view : {&p.alibi_slopes, &p.dropout_stream, &p.q_lens, &p.q_segment_ids, &p.cu_seqlens_q, &p.probs})
    if (view->data) return;
  const int64 group = p.num_heads / p.num_heads_kv;
  p.rows_are_heads = true;
  p.seqlen_q = p.max_seqlen_q = group;
  p.num_heads = p.num_heads_kv;
  for (View* view : {&p.q, &p.o, &p.lse, &p.bias, &p.mask, &p.sinks}) {
    view->row_stride = view->head_stride;
    view->head_stride *= group;
  }
}

}  // namespace

FwdProblem simplified(const FwdProblem& problem) {
  using P = FwdProblem;
  P p = problem;
  collapse<P>(p, {&P::q, &P::k, &P::v, &P::bias, &P::mask, &P::alibi_slopes, &P::sinks, &P::q_lens, &P::kv_lens,
                  &P::q_segment_ids, &P::kv_segment_ids, &P::cu_seqlens_q, &P::cu_seqlens_kv, &P::page_table,
                  &P::dropout_stream, &P::o, &P::lse, &P::probs});
  make_heads_queries(p);
  return p;
}

BwdProblem simplified(const BwdProblem& problem) {
  using P = BwdProblem;
  P p = problem;
  collapse<P>(p, {&P::q,
                  &P::k,
                  &P::v,
                  &P::bias,
                  &P::mask,
                  &P::alibi_slopes,
                  &P::sinks,
                  &P::q_lens,
                  &P::kv_lens,
                  &P::q_segment_ids,
                  &P::kv_segment_ids,
                  &P::cu_seqlens_q,
                  &P::cu_seqlens_kv,
                  &P::page_table,
                  &P::dropout_stream,
                  &P::o,
                  &P::lse,
                  &P::d_o,
                  &P::d_lse,
                  &P::dq,
                  &P::dk,
                  &P::dv,
                  &P::delta,
                  &P::dq_accum,
                  &P::statistics,
                  &P::tickets});
  return p;
}

// Of dbias, whose entries are numbered in the order of the bias's, there is nothing to join.
DbiasProblem simplified(const DbiasProblem& problem) {
  using P = DbiasProblem;
  P p = problem;
  collapse<P>(p, {&P::q, &P::k, &P::v, &P::bias, &P::mask, &P::alibi_slopes, &P::q_lens, &P::kv_lens, &P::q_segment_ids,
                  &P::kv_segment_ids, &P::dropout_stream, &P::lse, &P::delta, &P::d_o});
  return p;
}

}  // namespace flash::cuda
