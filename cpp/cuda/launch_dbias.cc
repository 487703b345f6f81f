// The gradient of the bias on a GPU: one kernel, with a thread block for each block of the bias.
#include "cuda/attention.h"
#include "cuda/batch_axes.h"
#include "cuda/heuristics.h"
#include "cuda/jit.h"

namespace flash::cuda {

void launch(const DbiasProblem& problem, int32 device, Stream stream) {
  const DbiasProblem p = with_few_batch_axes(problem);
  const KernelConfig c = configure(facts_of(p), arch_of(device));
  const int64 blocks =
      num_bias_entries(p) * num_bias_heads(p) * ceil_div(p.seqlen_q, c.block_q) * ceil_div(p.seqlen_kv, c.block_kv);
  launch(load(c, device).entry[0], blocks, num_threads(c), shared_bytes(c), stream, &p);
}

}  // namespace flash::cuda
