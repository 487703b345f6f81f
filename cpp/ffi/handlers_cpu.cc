// The custom calls "jax_flash_fwd" and "jax_flash_bwd" on the CPU. They return a future at once: the work runs on XLA's
// own thread pool, on which the handler itself runs too, so waiting for it here could dead-lock.
#include "ffi/handlers.h"

#include "cpu/attention.h"
#include "ffi/decode.h"

namespace flash::ffi {
namespace {

// The executor borrows `pool`, which XLA lends only until the handler returns; `cpu/` schedules all work before that.
cpu::Executor make_executor(xf::ThreadPool& pool, xf::CountDownPromise promise) {
  return {pool.num_threads(), [&pool](std::function<void()> work) { pool.Schedule(std::move(work)); },
          [promise](const char* error) mutable {
            promise.CountDown(error ? xf::Error(xf::ErrorCode::kResourceExhausted, std::string("jax_flash: ") + error)
                                    : xf::Error::Success());
          }};
}

xf::Future failed(const xf::Error& error) {
  xf::Promise promise;
  xf::Future future(promise);
  promise.SetError(error);
  return future;
}

xf::Future fwd(xf::ThreadPool pool, Attrs attrs, xf::RemainingArgs args, xf::RemainingRets rets) {
  auto problem = decode_fwd(attrs, args, rets);
  if (problem.has_error()) return failed(problem.error());
  xf::CountDownPromise promise(1);
  xf::Future future(promise);
  cpu::forward(*problem, make_executor(pool, promise));
  return future;
}

xf::Future bwd(xf::ThreadPool pool, Attrs attrs, xf::RemainingArgs args, xf::RemainingRets rets) {
  auto problem = decode_bwd(attrs, args, rets);
  if (problem.has_error()) return failed(problem.error());
  xf::CountDownPromise promise(1);
  xf::Future future(promise);
  cpu::backward(*problem, make_executor(pool, promise));
  return future;
}

}  // namespace
}  // namespace flash::ffi

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_flash_fwd_cpu, flash::ffi::fwd,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().Attrs<flash::ffi::Attrs>().RemainingArgs().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_flash_bwd_cpu, flash::ffi::bwd,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().Attrs<flash::ffi::Attrs>().RemainingArgs().RemainingRets());
