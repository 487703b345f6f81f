#include "cuda/batch_axes.h"

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

}  // namespace

FwdProblem with_few_batch_axes(const FwdProblem& problem) {
  using P = FwdProblem;
  P p = problem;
  collapse<P>(p, {&P::q, &P::k, &P::v, &P::bias, &P::mask, &P::alibi_slopes, &P::sinks, &P::q_lens, &P::kv_lens,
                  &P::q_segment_ids, &P::kv_segment_ids, &P::cu_seqlens_q, &P::cu_seqlens_kv, &P::page_table,
                  &P::dropout_stream, &P::o, &P::lse, &P::probs});
  return p;
}

BwdProblem with_few_batch_axes(const BwdProblem& problem) {
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
DbiasProblem with_few_batch_axes(const DbiasProblem& problem) {
  using P = DbiasProblem;
  P p = problem;
  collapse<P>(p, {&P::q, &P::k, &P::v, &P::bias, &P::mask, &P::alibi_slopes, &P::q_lens, &P::kv_lens, &P::q_segment_ids,
                  &P::kv_segment_ids, &P::dropout_stream, &P::lse, &P::delta, &P::d_o});
  return p;
}

}  // namespace flash::cuda
