// The forward pass on a GPU: one kernel.
#include "cuda/attention.h"
#include "cuda/batch_axes.h"
#include "cuda/heuristics.h"
#include "cuda/jit.h"

namespace flash::cuda {

void compile(const FwdProblem& problem) {
  const KernelConfig facts = facts_of(with_few_batch_axes(problem));
  for (const Arch& arch : visible_archs()) compile(configure(facts, arch), arch);
}

void load(const FwdProblem& problem, int32 device) {
  load(configure(facts_of(with_few_batch_axes(problem)), arch_of(device)), device);
}

void launch(const FwdProblem& problem, int32 device, Stream stream) {
  const FwdProblem p = with_few_batch_axes(problem);
  const KernelConfig c = configure(facts_of(p), arch_of(device));
  const int64 entries = num_batch_entries(p);
  int64 blocks = ceil_div(p.max_seqlen_q, c.block_q) * p.num_heads * p.num_sequences * entries;
  if (p.cu_seqlens_q.data) blocks += ceil_div(p.seqlen_q, num_threads(c)) * entries;
  if (p.probs.data)  // the kernel writes what is visible
    set_zero(p.probs.data, 4 * p.probs_sequence_stride * p.num_sequences * entries, stream);
  launch(load(c, device).entry[0], blocks, num_threads(c), shared_bytes(c), stream, &p);
}

}  // namespace flash::cuda
