// Attention on the CPU: any FwdProblem or BwdProblem, on the threads of an Executor.
#pragma once

#include "cpu/parallel.h"
#include "problem.h"

namespace flash::cpu {

// Both copy the problem, return at once and report through executor.done.
void forward(const FwdProblem& problem, const Executor& executor);
void backward(const BwdProblem& problem, const Executor& executor);

// The instruction set in use: "avx512", "avx2" or "baseline" (SSE2 on x86-64, NEON on arm64).
const char* instruction_set();

}  // namespace flash::cpu
