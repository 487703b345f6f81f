// Which kernel runs a problem: the only place where tile sizes are chosen.
#pragma once

#include "common/config.h"
#include "common/problem.h"
#include "cuda/driver.h"

namespace flash::cuda {

// The facts of a problem that select code; head dims are the real ones, tile sizes are 0.
KernelConfig facts_of(const FwdProblem& problem);
KernelConfig facts_of(const BwdProblem& problem);

// Rounds the head dims up to tiles and fills in the tile sizes for an architecture. Throws Error (unimplemented) where
// there is no kernel, as for float32.
KernelConfig configure(KernelConfig facts, const Arch& arch);

}  // namespace flash::cuda
