// What a build for one instruction set offers, and the units of work that its kernels take. attention_fwd.cc and
// attention_bwd.cc are compiled once per set (CMakeLists.txt); attention.cc picks the best one for the processor.
#pragma once

#include <atomic>

#include "common/mask.h"
#include "common/problem.h"

namespace flash::cpu {

// Rows and keys of a tile. A tile starts at a multiple of these inside its sequence, hence also at one of 32, which the
// dropout bits of common/philox.h ask for.
inline constexpr int64 kBlockQ = 64;
inline constexpr int64 kBlockKv = 64;

struct Sequence {
  int64 batch;  // linear batch entry
  int64 index;  // sequence inside the entry; 0 when dense
  int64 q_begin, q_len;
  int64 kv_begin, kv_len;
};

static inline MaskRule mask_rule(const Problem& p, const Sequence& s) {
  return make_mask_rule(s.q_len, s.kv_len, p.options.window_left, p.options.window_right, p.options.bottom_right);
}

// One block of queries of one head, over all its keys.
struct FwdUnit {
  Sequence sequence;
  int64 head;
  int64 q_begin;  // inside the sequence
};

// One kv head with all its query heads, over keys [kv_begin, kv_end) of the sequence and all its queries.
struct BwdUnit {
  Sequence sequence;
  int64 head_kv;
  int64 kv_begin, kv_end;
  View dq;                         // the result itself, or a float32 partial sum when the sequence's keys are split
  bool first_split;                // writes delta, which all splits compute alike
  std::atomic<int64>* unfinished;  // splits of the same sequence and kv head that are still running
};

// One block of queries of the bias, over all keys and over all sequences and heads that share this part of it.
struct DbiasUnit {
  int64 entry, head;  // see num_bias_entries
  int64 q_begin;      // a multiple of kBlockQ
};

struct FwdKernel {
  int64 (*scratch_floats)(const FwdProblem&);  // what one thread needs
  void (*run)(const FwdProblem&, const FwdUnit&, float* scratch);
};

struct BwdKernel {
  int64 (*scratch_floats)(const BwdProblem&, int64 max_unit_keys);
  void (*run)(const BwdProblem&, const BwdUnit&, float* scratch);
  // dq of the unit's sequence and heads = the sum of its `splits` float32 partials [splits, elements of dq].
  void (*sum_dq)(const BwdProblem&, const BwdUnit&, const float* partials, int64 splits);
};

struct DbiasKernel {
  int64 (*scratch_floats)(const DbiasProblem&);
  void (*run)(const DbiasProblem&, const Sequence* of_entry, const DbiasUnit&, float* scratch);
};

// One namespace per build; which of them exist depends on the architecture (CMakeLists.txt).
namespace baseline {
extern const FwdKernel fwd_kernel;
extern const BwdKernel bwd_kernel;
extern const DbiasKernel dbias_kernel;
}  // namespace baseline
namespace avx2 {
extern const FwdKernel fwd_kernel;
extern const BwdKernel bwd_kernel;
extern const DbiasKernel dbias_kernel;
}  // namespace avx2
namespace avx512 {
extern const FwdKernel fwd_kernel;
extern const BwdKernel bwd_kernel;
extern const DbiasKernel dbias_kernel;
}  // namespace avx512

}  // namespace flash::cpu
