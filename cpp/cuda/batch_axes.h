// Batch axes that lie one behind the other in all operands become one, so that kernels see one, seldom more.
#pragma once

#include "common/problem.h"

namespace flash::cuda {

FwdProblem with_few_batch_axes(const FwdProblem& problem);
BwdProblem with_few_batch_axes(const BwdProblem& problem);
DbiasProblem with_few_batch_axes(const DbiasProblem& problem);

}  // namespace flash::cuda
