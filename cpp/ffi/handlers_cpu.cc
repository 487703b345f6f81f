// The custom calls "jax_flash_fwd", "jax_flash_bwd" and "jax_flash_dbias" on the CPU. They return a future at once: the
// work runs on XLA's own thread pool, on which the handler itself runs too, so waiting for it here could dead-lock.
#include <new>
#include <string>

#include "cpu/attention.h"
#include "ffi/decode.h"
#include "ffi/handlers.h"

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

template <class Problem>
xf::Future run(xf::ErrorOr<Problem> problem, void (*start)(const Problem&, const cpu::Executor&),
               xf::ThreadPool& pool) {
  if (problem.has_error()) return failed(problem.error());
  xf::CountDownPromise promise(1);
  xf::Future future(promise);
  try {
    start(*problem, make_executor(pool, promise));
  } catch (const std::bad_alloc&) {
    return failed(xf::Error(xf::ErrorCode::kResourceExhausted, "jax_flash: out of memory for a plan of the work"));
  }
  return future;
}

xf::Future fwd(xf::ThreadPool pool, Attrs attrs, xf::RemainingArgs args, xf::RemainingRets rets) {
  return run(decode_fwd(attrs, args, rets), cpu::forward, pool);
}

xf::Future bwd(xf::ThreadPool pool, Attrs attrs, xf::RemainingArgs args, xf::RemainingRets rets) {
  return run(decode_bwd(attrs, args, rets), cpu::backward, pool);
}

xf::Future dbias(xf::ThreadPool pool, Attrs attrs, xf::RemainingArgs args, xf::RemainingRets rets) {
  return run(decode_dbias(attrs, args, rets), cpu::bias_gradient, pool);
}

}  // namespace
}  // namespace flash::ffi

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_flash_fwd_cpu, flash::ffi::fwd,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().Attrs<flash::ffi::Attrs>().RemainingArgs().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_flash_bwd_cpu, flash::ffi::bwd,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().Attrs<flash::ffi::Attrs>().RemainingArgs().RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_flash_dbias_cpu, flash::ffi::dbias,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().Attrs<flash::ffi::Attrs>().RemainingArgs().RemainingRets());
