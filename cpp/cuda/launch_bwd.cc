// The backward pass on a GPU: preprocess, the kernel proper, postprocess.
#include "cuda/attention.h"
#include "cuda/heuristics.h"
#include "cuda/jit.h"
#include "cuda/simplify.h"
#include "cuda/tensor_map.h"

namespace flash::cuda {
namespace {

void launch_hopper(const BwdProblem& p, const KernelConfig& c, Function kernel, int64 units, bool is_counter_zero,
                   int32 device, Stream stream, bool starts_early) {
  HopperBwdProblem h = {p};
  encode_tensor_maps(h, c);
  const int32 at_once = max_of(multiprocessors_of(device) / cluster_size(c), 1);
  h.order = unit_order(p, c, at_once);
  const bool stay = stays_on_multiprocessor(c) && is_counter_zero;
  const int64 clusters = stay ? min_of<int64>(units, at_once) : units;
  if (stay) check_count(units + clusters);  // so far the counter goes
  launch(kernel, clusters * cluster_size(c), num_threads(c), shared_bytes(c), stream, &h, starts_early);
}

}  // namespace

void launch(const BwdProblem& problem, int32 device, Stream stream) {
  const BwdProblem p = simplified(problem);
  const KernelConfig c = configure(facts_of(p), arch_of(device));
  const Kernels& kernels = load(c, device);
  const int64 entries = num_batch_entries(p);
  int64 row_blocks = ceil_div(p.max_seqlen_q, kRowKernelRows) * p.num_heads * p.num_sequences * entries;
  if (p.cu_seqlens_q.data) row_blocks += ceil_div(p.seqlen_q, kRowKernelThreads) * entries;
  int64 units = ceil_div(p.max_seqlen_kv, c.block_kv) * p.num_heads_kv * p.num_sequences * entries;
  if (p.cu_seqlens_kv.data) units += ceil_div(p.seqlen_kv, 32 * c.num_warps) * entries;
  const bool early = can_start_early(device);
  launch(kernels.entry[0], row_blocks, kRowKernelThreads, 0, stream, &p);
  if (c.family == Family::kSm90 && units > 0)
    launch_hopper(p, c, kernels.entry[1], units, row_blocks > 0, device, stream, early);
  else
    launch(kernels.entry[1], units, num_threads(c), shared_bytes(c), stream, &p, early);
  launch(kernels.entry[2], row_blocks, kRowKernelThreads, 0, stream, &p, early);
}

}  // namespace flash::cuda
