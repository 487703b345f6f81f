// Which kernel runs a problem: the only place where tile sizes are chosen.
#pragma once

#include <map>
#include <string>

#include "common/config.h"
#include "common/problem.h"
#include "cuda/driver.h"

namespace flash::cuda {

// The facts of a problem that select code; head dims are the real ones, tile sizes are 0.
KernelConfig facts_of(const FwdProblem& problem);
KernelConfig facts_of(const BwdProblem& problem);
KernelConfig facts_of(const DbiasProblem& problem);

// Rounds the head dims up to tiles and fills in the tile sizes for an architecture. Throws Error (unimplemented) where
// there is no kernel, as for float32.
KernelConfig configure(KernelConfig facts, const Arch& arch);

// The order in which Hopper's kernels work, on so many units at once: heads whose operands lie in the L2 cache
// together, long units before short.
UnitOrder unit_order(const FwdProblem& problem, const KernelConfig& config, int64 units_at_once);
UnitOrder unit_order(const BwdProblem& problem, const KernelConfig& config, int64 units_at_once);

// For tests and measurements: values of fields, by name, that configure() takes in place of its own choice until the
// next call. A family that has no kernel for a config is not taken; with a direction, the others are for that one only.
void override_config(std::map<std::string, int32> fields);
// How often that was called, for who remembers what configure() has chosen.
uint64 override_count();

}  // namespace flash::cuda
