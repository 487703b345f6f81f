// What comes before a launch, alike for every kind of problem: its kernels are compiled, and loaded.
#include "cuda/attention.h"
#include "cuda/heuristics.h"
#include "cuda/jit.h"
#include "cuda/simplify.h"

namespace flash::cuda {
namespace {

template <class Problem>
void compile_for_visible_archs(const Problem& problem) {
  const KernelConfig facts = facts_of(simplified(problem));
  for (const Arch& arch : visible_archs()) compile(configure(facts, arch), arch);
}

template <class Problem>
void load_on(const Problem& problem, int32 device) {
  load(configure(facts_of(simplified(problem)), arch_of(device)), device);
}

}  // namespace

void compile(const FwdProblem& problem) {
  compile_for_visible_archs(problem);
}
void compile(const BwdProblem& problem) {
  compile_for_visible_archs(problem);
}
void compile(const DbiasProblem& problem) {
  compile_for_visible_archs(problem);
}

void load(const FwdProblem& problem, int32 device) {
  load_on(problem, device);
}
void load(const BwdProblem& problem, int32 device) {
  load_on(problem, device);
}
void load(const DbiasProblem& problem, int32 device) {
  load_on(problem, device);
}

}  // namespace flash::cuda
