// The gradient of the bias on a GPU: one kernel, with a thread block for each block of the bias.
#include "cuda/attention.h"
#include "cuda/heuristics.h"
#include "cuda/jit.h"
#include "cuda/simplify.h"
#include "cuda/tensor_map.h"

namespace flash::cuda {
namespace {

void launch_hopper(const DbiasProblem& p, const KernelConfig& c, Function kernel, int64 blocks, Stream stream) {
  HopperDbiasProblem h = {p};
  encode_tensor_maps(h, c);
  launch(kernel, blocks, num_threads(c), shared_bytes(c), stream, &h);
}

}  // namespace

void launch(const DbiasProblem& problem, int32 device, Stream stream) {
  const DbiasProblem p = simplified(problem);
  const KernelConfig c = configure(facts_of(p), arch_of(device));
  const int64 blocks =
      num_bias_entries(p) * num_bias_heads(p) * ceil_div(p.seqlen_q, c.block_q) * ceil_div(p.seqlen_kv, c.block_kv);
  const Function kernel = load(c, device).entry[0];
  if (c.family == Family::kSm90 && blocks > 0) return launch_hopper(p, c, kernel, blocks, stream);
  launch(kernel, blocks, num_threads(c), shared_bytes(c), stream, &p);
}

}  // namespace flash::cuda
