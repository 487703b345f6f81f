// The backward pass on a GPU: preprocess, the kernel proper, postprocess; and in front the zeroing of what they sum up.
#include "cuda/attention.h"
#include "cuda/batch_axes.h"
#include "cuda/heuristics.h"
#include "cuda/jit.h"

namespace flash::cuda {

void compile(const BwdProblem& problem) {
  const KernelConfig facts = facts_of(with_few_batch_axes(problem));
  for (const Arch& arch : visible_archs()) compile(configure(facts, arch), arch);
}

void load(const BwdProblem& problem, int32 device) {
  load(configure(facts_of(with_few_batch_axes(problem)), arch_of(device)), device);
}

void launch(const BwdProblem& problem, int32 device, Stream stream) {
  const BwdProblem p = with_few_batch_axes(problem);
  const KernelConfig c = configure(facts_of(p), arch_of(device));
  const Kernels& kernels = load(c, device);
  const int64 entries = num_batch_entries(p), rows = entries * p.seqlen_q * p.num_heads;
  set_zero(p.dq_accum.data, 4 * p.dq_accum_elements, stream);
  if (p.tickets.data) set_zero(p.tickets.data, 4 * rows, stream);
  if (p.dbias.data) set_zero(p.dbias.data, 4 * p.dbias_elements, stream);
  launch(kernels.entry[0], ceil_div(rows, kRowKernelRows), kRowKernelThreads, 0, stream, &p);
  int64 blocks = ceil_div(p.max_seqlen_kv, c.block_kv) * p.num_heads_kv * p.num_sequences * entries;
  if (p.cu_seqlens_kv.data) blocks += ceil_div(p.seqlen_kv, num_threads(c)) * entries;
  launch(kernels.entry[1], blocks, num_threads(c), shared_bytes(c), stream, &p);
  blocks = ceil_div(p.max_seqlen_q, kRowKernelRows) * p.num_heads * p.num_sequences * entries;
  if (p.cu_seqlens_q.data) blocks += ceil_div(p.seqlen_q, kRowKernelThreads) * entries;
  launch(kernels.entry[2], blocks, kRowKernelThreads, 0, stream, &p);
}

}  // namespace flash::cuda
