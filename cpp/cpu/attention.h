// Attention on the CPU: any FwdProblem, BwdProblem or DbiasProblem, on the threads of an Executor.
#pragma once

#include <string>
#include <vector>

#include "common/problem.h"
#include "cpu/parallel.h"

namespace flash::cpu {

// All copy the problem, return at once and report through executor.done.
void forward(const FwdProblem& problem, const Executor& executor);
void backward(const BwdProblem& problem, const Executor& executor);
void bias_gradient(const DbiasProblem& problem, const Executor& executor);

// Instruction sets that this processor runs, the fastest first, which is the one in use: "avx512", "avx2", "baseline"
// (SSE2 on x86-64, NEON on arm64).
std::vector<std::string> instruction_sets();

// Switches to another of them, for tests. Throws std::invalid_argument.
void use_instruction_set(const std::string& name);

}  // namespace flash::cpu
