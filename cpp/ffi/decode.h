// From XLA's operands, results and attributes to a FwdProblem, BwdProblem or DbiasProblem.
#pragma once

#include "common/problem.h"
#include "ffi/attrs.h"
#include "xla/ffi/api/ffi.h"

namespace flash::ffi {

namespace xf = ::xla::ffi;

// All check ranks, sizes and dtypes of everything that will be read or written: Python has refused bad arguments with
// better words, so an error here means a broken caller of the custom call itself.
xf::ErrorOr<FwdProblem> decode_fwd(const Attrs& attrs, xf::RemainingArgs args, xf::RemainingRets rets);
xf::ErrorOr<BwdProblem> decode_bwd(const Attrs& attrs, xf::RemainingArgs args, xf::RemainingRets rets);
xf::ErrorOr<DbiasProblem> decode_dbias(const Attrs& attrs, xf::RemainingArgs args, xf::RemainingRets rets);

}  // namespace flash::ffi
