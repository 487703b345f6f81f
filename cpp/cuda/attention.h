// Attention on NVIDIA GPUs, in the three steps that XLA gives a custom call. All throw Error with a sentence for the
// user; `launch` does so only on what a broken driver can cause, since the other two have checked everything.
#pragma once

#include "common/problem.h"
#include "cuda/driver.h"

namespace flash::cuda {

// Checks the problem and compiles its kernels for every visible GPU. Pointers are not looked at.
void compile(const FwdProblem& problem);
void compile(const BwdProblem& problem);
void compile(const DbiasProblem& problem);

// Makes sure that the kernels are loaded on the device.
void load(const FwdProblem& problem, int32 device);
void load(const BwdProblem& problem, int32 device);
void load(const DbiasProblem& problem, int32 device);

// Enqueues the work. Allocates nothing and waits for nothing, so that it may be captured into a graph.
void launch(const FwdProblem& problem, int32 device, Stream stream);
void launch(const BwdProblem& problem, int32 device, Stream stream);
void launch(const DbiasProblem& problem, int32 device, Stream stream);

}  // namespace flash::cuda
