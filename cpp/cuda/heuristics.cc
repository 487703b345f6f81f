#include "cuda/heuristics.h"

#include <atomic>
#include <limits>
#include <type_traits>

namespace flash::cuda {
namespace {

// What override_config() has set; older ones are kept, as another thread may look at them.
using Fields = std::map<std::string, int32>;
std::atomic<const Fields*> overridden = new Fields;
std::atomic<uint64> overrides = 0;

KernelConfig facts_of_all(const Problem& p, Direction direction) {
  // Two keys of a row of a bias or mask lie side by side, and always on an even place.
  auto paired = [&](const View& view) { return !view.data || (view.col_stride == 1 && p.seqlen_kv % 2 == 0); };
  KernelConfig c = {};
  c.direction = direction;
  c.dtype = p.dtype;
  c.head_dim = int32(p.head_dim);
  c.head_dim_v = int32(p.head_dim_v);
  c.num_batch_axes = p.num_batch_axes;
  c.aligned = p.head_dim % 8 == 0 && p.head_dim_v % 8 == 0;  // XLA's buffers are; so then are all rows
  // A denormal scale is 0 to the kernels.
  c.positive_scale = p.options.scale >= std::numeric_limits<float>::min();
  c.softcap = p.options.softcap != 0.0f;
  c.alibi = p.alibi_slopes.data && p.num_sequences > 0;  // else there are none, which nobody may read
  c.bias = p.bias.data;
  c.bias_dtype = p.bias.dtype;
  // With a row for each query, as the copy engine cannot read one of them many times.
  c.bias_tiled =
      c.bias && p.bias.dtype != DType::kF32 && p.bias.row_stride != 0 && p.bias.col_stride == 1 && p.seqlen_kv % 8 == 0;
  c.mask = p.mask.data;
  c.mask_wide = c.mask && p.mask.col_stride == 1 && p.seqlen_q > 0 && p.seqlen_kv > 0 && p.seqlen_kv % 16 == 0;
  c.paired = (c.bias || c.mask) && paired(p.bias) && paired(p.mask);
  c.segments = p.q_segment_ids.data;
  c.dropout = p.options.keep_threshold < 256;
  c.paged = p.page_size != 0;
  return c;
}

// The least tile, a multiple of `unit`, that holds a head dim.
int32 tiled_head_dim(int32 head_dim, int32 unit) {
  for (int32 tile : {32, 64, 96, 128, 192}) {
    if (head_dim <= tile && tile % unit == 0) return tile;
  }
  return 256;
}

struct Tiling {
  int32 block_q, block_kv, num_warps, warps_d, num_stages, min_blocks;
};

// Whether the copy engine can bring the bias, and shared memory has room for it beside large tiles of all operands.
bool is_for_hopper_dbias(const KernelConfig& c) {
  return c.bias_tiled && max_of(c.head_dim, c.head_dim_v) <= 128;
}

// What Hopper's kernels cannot do: rows that the copy engine cannot address, keys that lie on pages, batch axes that it
// cannot take as one. And what is a testing aid.
bool is_for_hopper(const KernelConfig& c, const Arch& arch) {
  return arch.sm == 90 && c.aligned && c.head_dim > 0 && c.head_dim_v > 0 && !c.paged && !c.return_softmax &&
         c.num_batch_axes == 1 && (c.direction != Direction::kDbias || is_for_hopper_dbias(c));
}

// Whether nothing is done to scores but to scale them and to mask them by position.
bool is_plain(const KernelConfig& c) {
  return !(c.softcap || c.alibi || c.bias || c.mask || c.segments || c.dropout);
}

// Registers bound the tiles: two warpgroups have 232 per thread, for 64 rows of O and of scores and for the weights.
// Then shared memory, of which two buffers each of K and V shall fit. Three warpgroups of 160 registers hide each
// other's softmax better, if there are queries enough for them: see suits_large_blocks.
Tiling hopper_fwd_tiling(const KernelConfig& c, int32 head_dim) {
  if (c.large_blocks && head_dim <= 128 && is_plain(c)) return {192, 128, 12, 1, head_dim > 64 ? 2 : 4, 1};
  if (head_dim > 192) return {128, c.dropout ? 64 : 80, 8, 1, 2, 1};
  if (head_dim > 128 && c.head_dim_v > 128) return {128, c.dropout ? 96 : 112, 8, 1, 2, 1};
  return {128, 128, 8, 1, head_dim > 64 ? 2 : c.bias_tiled ? 3 : 4, 1};
}

// Operands that each score needs hold registers of their own: with several of them, or with rows that are copied
// element by element, tiles must be smaller lest the main loop spills.
bool is_crowded(const KernelConfig& c) {
  return !c.aligned || c.softcap + c.alibi + 2 * c.bias + c.mask + c.segments + c.dropout > 2;
}

// Warps own 32 queries where their part of O and of the scores then still fits into 255 registers: every fragment of
// K and V that they read serves two products instead of one. Otherwise they own 16. Always 128 threads, so that two
// thread blocks, whose softmax and products overlap, share a multiprocessor.
Tiling fwd_tiling(const KernelConfig& c, int32 head_dim) {
  if (is_crowded(c) || head_dim > 128) return {64, 64, 4, 1, 1, 2};
  if (head_dim <= 64 && !c.bias && !c.mask && !c.segments) return {128, 128, 4, 1, 1, 2};
  return {128, 64, 4, 1, 1, 2};
}

// dK and dV of a warpgroup's 64 keys take all registers that S^T and dP^T of 64 queries leave, up to head dim 128.
// Beyond, one thread block of a pair has dV and the other one dK; of up to three stages they take as many as fit. At
// head dim 64 there is room for 128 queries, if scores need nothing else (cycles in millions, 4096 full: 4.45, with 64
// queries 5.15).
Tiling hopper_bwd_tiling(const KernelConfig& c, int32 head_dim) {
  return {head_dim <= 64 && is_plain(c) ? 128 : 64, 128, 8, 1, head_dim > 128 ? 3 : 2, 1};
}

// dK and dV of a warp's keys stay in registers; where they would not fit, warps_d warps share them.
Tiling bwd_tiling(const KernelConfig& c, int32 head_dim, const Arch& arch) {
  const bool small = arch.max_shared_bytes < 160 * 1024;  // 8.6, 8.9 and 12.x have 99 KB
  if (head_dim > 128) {
    if (small) return {32, 32, 4, 2, 1, 1};
    return {64, 64, 8, 4, arch.max_shared_bytes >= 220 * 1024 ? 2 : 1, 1};
  }
  if (is_crowded(c)) return {32, 64, 4, 1, 1, 1};
  if (head_dim <= 64) return {32, 128, 4, 1, 2, 2};
  return small ? Tiling{64, 64, 4, 2, 1, 1} : Tiling{64, 128, 8, 2, 2, 1};
}

// A warp has 32 keys, and three accumulators: S^T, dP^T and the sums. With 64 queries, for which each operand is
// fetched half as often, they leave registers for little else than a bias that comes through shared memory.
Tiling dbias_tiling(const KernelConfig& c, int32 head_dim, const Arch& arch) {
  const bool small = arch.max_shared_bytes < 160 * 1024;  // see bwd_tiling
  if (head_dim > 128) return {64, 64, 4, 2, small ? 1 : 2, 1};
  if (small && head_dim > 64) return {64, 64, 4, 2, 2, 1};
  if (is_crowded(c) || !c.bias_tiled) return {64, 128, 8, 2, 2, 1};
  // Two thread blocks a multiprocessor where they fit: one computes while the other one waits for its operands.
  if (head_dim <= (small ? 32 : 64) || arch.max_shared_bytes >= 220 * 1024) return {64, 128, 4, 1, 2, 2};
  return {128, 128, 8, 2, 2, 1};
}

// S^T, dP^T and the sums of a warpgroup's 64 keys and 128 queries take 192 of 240 registers: larger tiles, whose
// operands would serve more scores, do not fit. Beside the bias, shared memory has room for the operands of two
// sharers, at head dim 128 of one and a half: of two pairs one is on its way at most times, of more mostly two.
Tiling hopper_dbias_tiling(int32 head_dim) {
  return {128, 128, 8, 1, head_dim > 96 ? 3 : 4, 1};
}

Tiling tiling(const KernelConfig& c, int32 head_dim, const Arch& arch) {
  const bool hopper = c.family == Family::kSm90;
  switch (c.direction) {
    case Direction::kFwd: return hopper ? hopper_fwd_tiling(c, head_dim) : fwd_tiling(c, head_dim);
    case Direction::kBwd: return hopper ? hopper_bwd_tiling(c, head_dim) : bwd_tiling(c, head_dim, arch);
    case Direction::kDbias: break;
  }
  return hopper ? hopper_dbias_tiling(head_dim) : dbias_tiling(c, head_dim, arch);
}

// Of all sequences and batch entries.
int64 all_heads(const Problem& p, int64 num_heads) {
  return num_heads * p.num_sequences * num_batch_entries(p);
}

// Whether blocks of 192 queries shall do, by three warpgroups, and not of 128. Cycles in thousands of both, on an H100:
// head dim 64: 512 full 306, 331, causal 303, 279; 1024 causal 399, 394; 2048 causal 576, 607; 16384 full 6329, 7513;
// head dim 96 (both take less since): 1024 full 463, 498, causal 352, 341; 2048 causal 512, 532; head dim 128: 1024
// full 390, 373; 2048 full 656, 669, causal 431, 406; 4096 causal 707, 688; 8192 causal 1314, 1266; 16384 causal 2357,
// 2415, full 4703, 4841.
bool suits_large_blocks(const FwdProblem& p) {
  constexpr int64 kMultiprocessors = 132;  // of an H100 or H200 as most are
  const Options& o = p.options;
  const int64 head_dim = max_of(p.head_dim, p.head_dim_v);
  // Where queries see different keys, large blocks do more in vain.
  const bool all_see_all = o.window_left < 0 && o.window_right < 0;
  const int64 least_of_full = head_dim <= 64 ? 512 : head_dim <= 96 ? 1024 : 2048;
  const int64 least = all_see_all ? least_of_full : head_dim <= 96 ? 2048 : 16384;
  if (min_of<int64>(p.max_seqlen_q, o.window_left < 0 ? p.max_seqlen_q : o.window_left) < least) return false;
  // A block of 192 takes 6 to 14 % less time for each query, but there are fewer to share among multiprocessors. Of
  // packed sequences only the greatest length is known here.
  auto rounds_of = [&](int64 block_q) {
    const int64 blocks = ceil_div(p.max_seqlen_q, block_q) * all_heads(p, p.num_heads);
    return ceil_div(blocks, kMultiprocessors);
  };
  return rounds_of(192) * 192 * (head_dim <= 96 ? 86 : 94) <= rounds_of(128) * 128 * 100;
}

}  // namespace

KernelConfig facts_of(const FwdProblem& problem) {
  KernelConfig c = facts_of_all(problem, Direction::kFwd);
  c.return_softmax = problem.options.return_softmax;
  c.large_blocks = suits_large_blocks(problem);
  return c;
}

KernelConfig facts_of(const BwdProblem& problem) {
  KernelConfig c = facts_of_all(problem, Direction::kBwd);
  c.deterministic = problem.tickets.data;
  return c;
}

KernelConfig facts_of(const DbiasProblem& problem) {
  return facts_of_all(problem, Direction::kDbias);
}

KernelConfig configure(KernelConfig facts, const Arch& arch) {
  if (facts.dtype == DType::kF32)
    throw Error(Error::Code::kUnimplemented,
                "float32 attention is not supported on GPUs: cast query, key and value to bfloat16 or float16.");
  KernelConfig c = facts;
  const Fields& fields = *overridden.load();
  const auto family = fields.find("family");
  const bool portable = family != fields.end() && Family(family->second) == Family::kSm80;
  if (is_for_hopper(c, arch) && !portable) c.family = Family::kSm90;
  const int32 largest_head_dim = max_of(facts.head_dim, facts.head_dim_v);
  const Tiling t = tiling(c, largest_head_dim, arch);
  // Each of warps_d warps has blocks of 16 columns, and each thread block of a pair whole panels of dQ.
  const int32 unit_v = t.warps_d > 2 ? 64 : 32;
  const int32 unit = in_pairs(c.direction, c.family, largest_head_dim) ? 64 : unit_v;
  c.head_dim = tiled_head_dim(facts.head_dim, unit);
  c.head_dim_v = tiled_head_dim(facts.head_dim_v, unit_v);
  c.exact = c.head_dim == facts.head_dim && c.head_dim_v == facts.head_dim_v;
  c.block_q = t.block_q;
  c.block_kv = t.block_kv;
  c.num_warps = t.num_warps;
  c.warps_d = t.warps_d;
  c.num_stages = t.num_stages;
  c.min_blocks = t.min_blocks;
  c.large_blocks = false;
  // A pair has as many stages as fit.
  while (in_pairs(c) && c.num_stages > 2 && shared_bytes(c) > arch.max_shared_bytes) --c.num_stages;
  // Else the bias is read element by element.
  c.bias_tiled = c.bias_tiled && c.block_kv % 32 == 0 && shared_bytes(c) <= arch.max_shared_bytes;
  const auto direction = fields.find("direction");
  if (direction == fields.end() || Direction(direction->second) == c.direction)
    for_each_field(c, [&](const char* name, auto& field) {
      const auto it = fields.find(name);
      if (it != fields.end() && it != family) field = static_cast<std::remove_reference_t<decltype(field)>>(it->second);
    });
  return c;
}

namespace {

// Query heads of a key head, 1 if there are none of either.
int64 group_of(const Problem& p) {
  return max_of<int64>(p.num_heads / max_of<int64>(p.num_heads_kv, 1), 1);
}

// Whether units of work differ in length.
bool is_uneven(const Problem& p) {
  const Options& o = p.options;
  return (!p.rows_are_heads && o.window_left < 0 && o.window_right >= 0) || p.cu_seqlens_q.data ||
         p.cu_seqlens_kv.data || p.q_lens.data || p.kv_lens.data || p.q_segment_ids.data;
}

// For num_heads heads of each sequence; the rest is UnitOrderOf's.
UnitOrder order_of(const Problem& p, int64 num_heads, int64 blocks, int64 section, int64 late, int64 first_blocks) {
  auto divisor = [](int64 n) { return n > 0 ? make_divisor(uint32(n)) : Divisor{}; };
  return {divisor(section),     divisor(late),
          divisor(blocks),      divisor(first_blocks),
          divisor(num_heads),   divisor(p.num_sequences),
          divisor(group_of(p)), uint32(all_heads(p, num_heads))};
}

// So many heads at a time, in the end with those that are left over.
UnitOrder in_sections(const Problem& p, int64 num_heads, int64 blocks, int64 section) {
  const int64 heads = all_heads(p, num_heads);
  section = clamp_to<int64>(section, 1, max_of<int64>(heads, 1));
  return order_of(p, num_heads, blocks, section, min_of(section + heads % section, heads), 0);
}

// For units that become shorter with each block of a head. Sections are of so many groups of `group` heads, which
// divides num_heads, or of as many fewer as it takes to divide all heads; more than 64 groups gain nothing. The shorter
// half of a few heads' units comes last, so that all thread blocks are done at about the same time: of as many heads as
// have, in the mean, four units for each that runs at once; more would not stay in the L2 cache.
UnitOrder with_short_ones_last(const Problem& p, int64 num_heads, int64 blocks, int64 mean_blocks, int64 group,
                               int64 groups, int64 units_at_once) {
  const int64 heads = all_heads(p, num_heads);
  groups = clamp_to<int64>(groups, 1, 64);
  while (heads % (groups * group) != 0) --groups;
  const int64 section = groups * group, late = ceil_div(4 * units_at_once, max_of<int64>(mean_blocks, 1));
  return order_of(p, num_heads, blocks, section, min_of(ceil_div(late, section) * section, heads), blocks - blocks / 2);
}

// Of a sequence, packed or not, with so many rows in all.
int64 mean_blocks_of(const Problem& p, int64 rows, bool packed, int64 block_rows) {
  return ceil_div(packed ? ceil_div(rows, max_of<int64>(p.num_sequences, 1)) : rows, block_rows);
}

// How many times rows of so many bytes fit into 10 MB, which stay in the L2 cache beside what else goes through it.
int64 times_in_cache(int64 rows, int64 row_bytes) {
  return (10 << 20) / max_of<int64>(rows * row_bytes, 1);
}

}  // namespace

// Where all units take equally long, those that share K and V follow each other, so that these are read from memory
// once (512 full, head dim 128: 258 MB in all and 270 thousand cycles, with sections of 32 MB 516 MB and 330).
// Otherwise small sections do so too, while several heads at a time suit short units (512 causal, head dim 64 and 128,
// sections of one group 317 and 217, of 10 MB 289 and 214, of 32 MB 290 and 250).
UnitOrder unit_order(const FwdProblem& p, const KernelConfig& c, int64 units_at_once) {
  const int64 blocks = ceil_div(p.max_seqlen_q, c.block_q), group = group_of(p);
  if (!is_uneven(p)) return in_sections(p, p.num_heads, blocks, group);
  // K and V in 16 bits, which the query heads of a group share.
  const int64 groups = times_in_cache(p.max_seqlen_kv, 2 * (p.head_dim + p.head_dim_v));
  return with_short_ones_last(p, p.num_heads, blocks, mean_blocks_of(p, p.seqlen_q, p.cu_seqlens_q.data, c.block_q),
                              group, groups, units_at_once);
}

// If deterministic, short units come first, and turns are passed on fast only while dq_accum is in the L2 cache
// (causal, 16384, head dim 128: 16 million cycles with 12 heads at a time, 10.2 with one).
UnitOrder unit_order(const BwdProblem& p, const KernelConfig& c, int64 units_at_once) {
  const int64 blocks = ceil_div(p.max_seqlen_kv, c.block_kv);
  if (!is_uneven(p) || c.deterministic) return in_sections(p, p.num_heads_kv, blocks, 1);
  // Blocks go through the query heads of a group in turn, soon not all through the same one: as few key heads at a time
  // as keep the multiprocessors busy (32 heads on 8, causal, head dim 128, 1024 to 8192: 8 to 26 % faster).
  if (group_of(p) > 1) return in_sections(p, p.num_heads_kv, blocks, units_at_once / max_of<int64>(blocks, 1));
  // q and dO in 16 bits, and dq_accum in 32.
  const int64 groups = times_in_cache(p.max_seqlen_q, 2 * (3 * p.head_dim + p.head_dim_v));
  return with_short_ones_last(p, p.num_heads_kv, blocks,
                              mean_blocks_of(p, p.seqlen_kv, p.cu_seqlens_kv.data, c.block_kv), 1, groups,
                              units_at_once);
}

void override_config(Fields fields) {
  overridden = new Fields(std::move(fields));
  ++overrides;
}

uint64 override_count() {
  return overrides;
}

}  // namespace flash::cuda
