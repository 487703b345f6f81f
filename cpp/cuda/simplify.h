// What comes before anything is found out about a problem: it is put as simply as it can be, so that few kernels serve
// all and each does no more than it must.
//
// Batch axes that lie one behind the other in all operands become one. And where a forward has one query of several
// heads that share keys, these heads become rows of one: the keys are read, and multiplied, once for all.
#pragma once

#include "common/problem.h"

namespace flash::cuda {

FwdProblem simplified(const FwdProblem& problem);
BwdProblem simplified(const BwdProblem& problem);
DbiasProblem simplified(const DbiasProblem& problem);

}  // namespace flash::cuda
