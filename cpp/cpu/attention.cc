#include "cpu/attention.h"

#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/plan.h"

namespace flash::cpu {
namespace {

struct Build {
  const char* name;
  const FwdKernel* fwd;
  const BwdKernel* bwd;
  const DbiasKernel* dbias;
};

// Builds that this processor runs, the fastest first.
const std::vector<Build>& builds() {
  static const std::vector<Build> all = [] {
    std::vector<Build> found;
#ifdef FLASH_X86_BUILDS
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      found.push_back({"avx512", &avx512::fwd_kernel, &avx512::bwd_kernel, &avx512::dbias_kernel});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      found.push_back({"avx2", &avx2::fwd_kernel, &avx2::bwd_kernel, &avx2::dbias_kernel});
#endif
    found.push_back({"baseline", &baseline::fwd_kernel, &baseline::bwd_kernel, &baseline::dbias_kernel});
    return found;
  }();
  return all;
}

std::atomic<const Build*> chosen_build{nullptr};

const Build& build() {
  const Build* chosen = chosen_build;
  return chosen ? *chosen : builds().front();
}

// Multiply-adds below which one thread is faster than waking others (about 20 us of work).
constexpr double kInlineWork = 1 << 20;

bool is_small(const Problem& p) {
  return double(num_batch_entries(p)) * double(p.num_heads) * double(p.seqlen_q) * double(p.seqlen_kv) *
             double(p.head_dim + p.head_dim_v) <
         kInlineWork;
}

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Floats = std::unique_ptr<float[], AlignedDelete>;

Floats allocate(int64 floats) {
  return Floats(static_cast<float*>(::operator new[](sizeof(float) * max_of<int64>(floats, 1), std::align_val_t{64})));
}

int64 element_size(DType dtype) {
  return dtype == DType::kF32 ? 4 : 2;
}

// Sets rows [begin, end) of every head to zero; zero is all bits zero in each dtype.
void zero_rows(const Problem& p, const View& view, int64 heads, int64 dim, const std::vector<RowRange>& ranges) {
  const int64 bytes = element_size(view.dtype);
  for (const RowRange& range : ranges)
    for (int64 row = range.begin; row < range.end; ++row)
      for (int64 head = 0; head < heads; ++head)
        __builtin_memset(static_cast<char*>(view.data) + bytes * offset_of(p, view, range.batch, head, row), 0,
                         bytes * dim);
}

// Sets rows [begin, end) of a [batch, head, row] float32 result.
void fill_row_values(const Problem& p, const View& view, float value, const std::vector<RowRange>& ranges) {
  for (const RowRange& range : ranges)
    for (int64 head = 0; head < p.num_heads; ++head)
      for (int64 row = range.begin; row < range.end; ++row) *pointer_to<float>(p, view, range.batch, head, row) = value;
}

// ---- backward: how it is split ----

// Splitting the keys buys parallelism with float32 copies of dq: no more of them than idle threads can use, nor than 8.
int64 choose_splits(int64 independent_units, int64 num_threads, int64 seqlen_kv) {
  const int64 wanted = ceil_div(num_threads, max_of<int64>(independent_units, 1));
  return clamp_to<int64>(wanted, 1, clamp_to<int64>(seqlen_kv / 256, 1, 8));
}

struct BwdJob {
  BwdProblem problem;
  int64 splits = 1;         // of each sequence's keys
  int64 max_unit_keys = 0;  // in the longest split
  std::vector<BwdUnit> units;
  Floats dq_partials;                                // [splits, elements of dq], if splits > 1
  std::unique_ptr<std::atomic<int64>[]> unfinished;  // [sequence, kv head]: splits still running
};

void make_units(const Plan& plan, int64 num_threads, BwdJob& job) {
  const BwdProblem& p = job.problem;
  const int64 sequences = int64(plan.sequences.size());
  job.splits = choose_splits(sequences * p.num_heads_kv, num_threads, p.seqlen_kv);
  const int64 dq_elements = num_batch_entries(p) * p.seqlen_q * p.num_heads * p.head_dim;
  if (job.splits > 1) job.dq_partials = allocate(job.splits * dq_elements);
  job.unfinished.reset(new std::atomic<int64>[sequences * p.num_heads_kv]);

  for (int64 i = 0; i < sequences; ++i) {
    const Sequence& s = plan.sequences[i];
    const int64 split_keys = round_up(ceil_div(s.kv_len, job.splits), kBlockKv);
    job.max_unit_keys = max_of(job.max_unit_keys, split_keys);
    for (int64 head = 0; head < p.num_heads_kv; ++head) {
      job.unfinished[i * p.num_heads_kv + head] = job.splits;
      for (int64 split = 0; split < job.splits; ++split) {
        View dq = p.dq;
        if (job.splits > 1) {
          dq.data = job.dq_partials.get() + split * dq_elements;
          dq.dtype = DType::kF32;
        }
        job.units.push_back({s, head, min_of(split * split_keys, s.kv_len), min_of((split + 1) * split_keys, s.kv_len),
                             dq, split == 0, &job.unfinished[i * p.num_heads_kv + head]});
      }
    }
  }
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Build& b : builds()) names.push_back(b.name);
  return names;
}

void use_instruction_set(const std::string& name) {
  for (const Build& b : builds())
    if (b.name == name) {
      chosen_build = &b;
      return;
    }
  throw std::invalid_argument("this processor or build has no instruction set \"" + name + "\"");
}

void forward(const FwdProblem& problem, const Executor& executor) {
  struct Job {
    FwdProblem problem;
    std::vector<FwdUnit> units;
  };
  auto job = std::make_shared<Job>(Job{problem, {}});
  const FwdProblem& p = job->problem;
  const Plan plan = make_plan(p);
  zero_rows(p, p.o, p.num_heads, p.head_dim_v, plan.unused_q_rows);
  fill_row_values(p, p.lse, -__builtin_inff(), plan.unused_q_rows);
  if (p.options.return_softmax)
    __builtin_memset(p.probs.data, 0, sizeof(float) * num_batch_entries(p) * p.num_sequences * p.probs_sequence_stride);
  for (const Sequence& s : plan.sequences)
    for (int64 head = 0; head < p.num_heads; ++head)
      for (int64 q_begin = 0; q_begin < s.q_len; q_begin += kBlockQ) job->units.push_back({s, head, q_begin});

  parallel_for(executor, int64(job->units.size()), is_small(p), [job] {
    const FwdKernel& kernel = *build().fwd;
    std::shared_ptr<float[]> scratch = allocate(kernel.scratch_floats(job->problem));
    return [job, &kernel, scratch](int64 i) { kernel.run(job->problem, job->units[i], scratch.get()); };
  });
}

void backward(const BwdProblem& problem, const Executor& executor) {
  auto job = std::make_shared<BwdJob>();
  job->problem = problem;
  const BwdProblem& p = job->problem;
  const Plan plan = make_plan(p);
  zero_rows(p, p.dq, p.num_heads, p.head_dim, plan.unused_q_rows);
  fill_row_values(p, p.delta, 0.0f, plan.unused_q_rows);
  zero_rows(p, p.dk, p.num_heads_kv, p.head_dim, plan.unused_kv_rows);
  zero_rows(p, p.dv, p.num_heads_kv, p.head_dim_v, plan.unused_kv_rows);
  make_units(plan, executor.num_threads, *job);

  parallel_for(executor, int64(job->units.size()), is_small(p), [job] {
    const BwdKernel& kernel = *build().bwd;
    std::shared_ptr<float[]> scratch = allocate(kernel.scratch_floats(job->problem, job->max_unit_keys));
    return [job, &kernel, scratch](int64 i) {
      const BwdUnit& unit = job->units[i];
      kernel.run(job->problem, unit, scratch.get());
      // The last split of a head to end adds the partial dq up, in the order of the splits: always the same sum.
      if (--*unit.unfinished == 0 && job->splits > 1)
        kernel.sum_dq(job->problem, unit, job->dq_partials.get(), job->splits);
    };
  });
}

void bias_gradient(const DbiasProblem& problem, const Executor& executor) {
  struct Job {
    DbiasProblem problem;
    std::vector<Sequence> sequences;  // one for each batch entry
    std::vector<DbiasUnit> units;
  };
  auto job = std::make_shared<Job>(Job{problem, make_plan(problem).sequences, {}});
  const DbiasProblem& p = job->problem;
  for (int64 entry = 0; entry < num_bias_entries(p); ++entry)
    for (int64 head = 0; head < num_bias_heads(p); ++head)
      for (int64 q_begin = 0; q_begin < p.seqlen_q; q_begin += kBlockQ) job->units.push_back({entry, head, q_begin});

  parallel_for(executor, int64(job->units.size()), is_small(p), [job] {
    const DbiasKernel& kernel = *build().dbias;
    std::shared_ptr<float[]> scratch = allocate(kernel.scratch_floats(job->problem));
    return [job, &kernel, scratch](int64 i) {
      kernel.run(job->problem, job->sequences.data(), job->units[i], scratch.get());
    };
  });
}

}  // namespace flash::cpu
