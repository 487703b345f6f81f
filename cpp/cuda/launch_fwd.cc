// The forward pass on a GPU: one kernel, and on Hopper mostly a small one in front of it.
#include "cuda/attention.h"
#include "cuda/heuristics.h"
#include "cuda/jit.h"
#include "cuda/simplify.h"
#include "cuda/tensor_map.h"

namespace flash::cuda {
namespace {

void launch_hopper(const FwdProblem& p, const KernelConfig& c, int32 device, Stream stream, int64 units) {
  HopperFwdProblem h = {p};
  encode_tensor_maps(h, c);
  check_count(units);
  const int64 at_once = multiprocessors_of(device), blocks = min_of(units, at_once);
  h.order = unit_order(p, c, at_once);
  const Kernels& kernels = load(c, device);
  const bool counts = units > blocks;
  if (counts) launch(kernels.entry[0], 1, kFwdPrepareThreads, 0, stream, &p);
  launch(kernels.entry[1], blocks, num_threads(c), shared_bytes(c), stream, &h, counts && can_start_early(device));
}

}  // namespace

void launch(const FwdProblem& problem, int32 device, Stream stream) {
  const FwdProblem p = simplified(problem);
  const KernelConfig c = configure(facts_of(p), arch_of(device));
  const int64 entries = num_batch_entries(p);
  int64 blocks = ceil_div(p.max_seqlen_q, c.block_q) * p.num_heads * p.num_sequences * entries;
  if (p.cu_seqlens_q.data) blocks += ceil_div(p.seqlen_q, 32 * c.num_warps) * entries;
  if (blocks == 0) return;
  if (p.probs.data)  // the kernel writes what is visible
    set_zero(p.probs.data, 4 * p.probs_sequence_stride * p.num_sequences * entries, stream);
  if (c.family == Family::kSm90) return launch_hopper(p, c, device, stream, blocks);
  launch(load(c, device).entry[0], blocks, num_threads(c), shared_bytes(c), stream, &p);
}

}  // namespace flash::cuda
