#include "cpu/plan.h"

namespace flash::cpu {
namespace {

int64 read_int(const Problem& p, const View& view, int64 batch, int64 row) {
  return *pointer_to<int32>(p, view, batch, 0, row);
}

// The rows of sequence `index`: its own slot when packed, the whole entry when dense.
struct Slot {
  int64 begin, end;
};

std::vector<Slot> slots(const Problem& p, const View& cu_seqlens, int64 batch, int64 rows) {
  if (!cu_seqlens.data) return std::vector<Slot>(p.num_sequences, Slot{0, rows});
  std::vector<Slot> result;
  int64 end = clamp_to<int64>(read_int(p, cu_seqlens, batch, 0), 0, rows);
  for (int64 i = 0; i < p.num_sequences; ++i) {
    const int64 begin = end;
    end = clamp_to(read_int(p, cu_seqlens, batch, i + 1), begin, rows);
    result.push_back({begin, end});
  }
  return result;
}

int64 used_rows(const Problem& p, const View& lens, int64 batch, int64 index, const Slot& slot) {
  const int64 capacity = slot.end - slot.begin;
  return lens.data ? clamp_to<int64>(read_int(p, lens, batch, index), 0, capacity) : capacity;
}

}  // namespace

Plan make_plan(const Problem& p) {
  Plan plan;
  const int64 entries = num_batch_entries(p);
  for (int64 batch = 0; batch < entries; ++batch) {
    const std::vector<Slot> q_slots = slots(p, p.cu_seqlens_q, batch, p.seqlen_q);
    const std::vector<Slot> kv_slots = slots(p, p.cu_seqlens_kv, batch, p.seqlen_kv);
    int64 q_end = 0, kv_end = 0;
    auto skip_to = [batch](std::vector<RowRange>& unused, int64& from, int64 to) {
      if (from < to) unused.push_back({batch, from, to});
      from = to;
    };
    for (int64 i = 0; i < p.num_sequences; ++i) {
      const Sequence s = {batch,
                          i,
                          q_slots[i].begin,
                          used_rows(p, p.q_lens, batch, i, q_slots[i]),
                          kv_slots[i].begin,
                          used_rows(p, p.kv_lens, batch, i, kv_slots[i])};
      plan.sequences.push_back(s);
      skip_to(plan.unused_q_rows, q_end, s.q_begin);
      q_end += s.q_len;
      if (p.page_size) continue;
      skip_to(plan.unused_kv_rows, kv_end, s.kv_begin);
      kv_end += s.kv_len;
    }
    skip_to(plan.unused_q_rows, q_end, p.seqlen_q);
    if (!p.page_size) skip_to(plan.unused_kv_rows, kv_end, p.seqlen_kv);
  }
  return plan;
}

}  // namespace flash::cpu
