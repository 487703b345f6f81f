// The custom calls "jax_flash_fwd", "jax_flash_bwd" and "jax_flash_dbias" on NVIDIA GPUs, in three stages.
//
// - instantiate, when XLA compiles: reports what is not supported and compiles the kernels. XLA skips it where an
//   executable comes from a cache, so that nothing may rely on it.
// - initialize, in front of every execution, also where XLA replays a graph: the kernels are loaded when it is done.
//   What else can fail is checked here, outside of any capture, but for a grid of 2^31 thread blocks or more.
// - execute launches. It may be captured into a graph, where an error would break the executable for good.
#include <bit>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <string>
#include <unordered_set>

#include "cuda/attention.h"
#include "cuda/heuristics.h"
#include "cuda/jit.h"
#include "ffi/decode.h"
#include "ffi/handlers.h"

namespace flash::ffi {
namespace {

xf::ErrorCode code_of(const cuda::Error& error) {
  switch (error.code()) {
    case cuda::Error::Code::kUnimplemented: return xf::ErrorCode::kUnimplemented;
    case cuda::Error::Code::kFailedPrecondition: return xf::ErrorCode::kFailedPrecondition;
    case cuda::Error::Code::kInternal: break;
  }
  return xf::ErrorCode::kInternal;
}

// Calls step(problem); exceptions become errors.
template <class Problem, class Step>
xf::Error run(const xf::ErrorOr<Problem>& problem, Step step) {
  if (problem.has_error()) return problem.error();
  const std::string prefix = "jax_flash: ";
  try {
    step(*problem);
    return xf::Error::Success();
  } catch (const cuda::Error& error) {
    return xf::Error(code_of(error), prefix + error.what());
  } catch (const std::bad_alloc&) {
    return xf::Error(xf::ErrorCode::kResourceExhausted, prefix + "out of host memory");
  } catch (const std::exception& error) {
    return xf::Error(xf::ErrorCode::kInternal, prefix + error.what());
  }
}

// A stage for a direction, which `decode` stands for.
template <auto decode>
xf::Error instantiate(Attrs attrs, xf::RemainingArgs args, xf::RemainingRets rets) {
  // Some versions of XLA show no operands here. The next stage compiles then.
  if (args.size() == 0) return xf::Error::Success();
  return run(decode(attrs, args, rets), [](const auto& problem) { cuda::compile(problem); });
}

// Stands for all that a call of initialize depends on.
uint64 fingerprint(int32 device, const Attrs& a, const xf::RemainingArgs& args, const xf::RemainingRets& rets) {
  uint64 hash = cuda::override_count();
  auto add = [&](uint64 x) { hash = cuda::mixed(hash, x); };
  auto add_buffer = [&](const xf::AnyBuffer& buffer) {
    add(uint64(buffer.element_type()) << 32 | buffer.dimensions().size());
    for (int64 size : buffer.dimensions()) add(uint64(size));
  };
  for (int32 x : {device, a.operands, std::bit_cast<int32>(a.scale), std::bit_cast<int32>(a.logits_soft_cap),
                  a.window_left, a.window_right, int32(a.bottom_right), a.keep_threshold, int32(a.deterministic),
                  int32(a.return_softmax), a.max_seqlen_q, a.max_seqlen_kv, a.num_splits})
    add(uint64(x));
  for (size_t i = 0; i < args.size(); ++i)
    if (const auto buffer = args.get<xf::AnyBuffer>(i); buffer.has_value()) add_buffer(*buffer);
  for (size_t i = 0; i < rets.size(); ++i)
    if (auto buffer = rets.get<xf::AnyBuffer>(i); buffer.has_value()) add_buffer(**buffer);
  return hash;
}

template <auto decode>
xf::Error initialize(int32_t device, Attrs attrs, xf::RemainingArgs args, xf::RemainingRets rets) {
  // Most executions are not the first one, and shall not look at everything again.
  static std::shared_mutex& mutex = *new std::shared_mutex;  // never destroyed: threads of XLA may outlive it
  static std::unordered_set<uint64>& initialized = *new std::unordered_set<uint64>;
  const uint64 call = fingerprint(device, attrs, args, rets);
  {
    std::shared_lock lock(mutex);
    if (initialized.contains(call)) return xf::Error::Success();
  }
  const xf::Error error = run(decode(attrs, args, rets), [&](const auto& problem) { cuda::load(problem, device); });
  if (error.success()) {
    std::unique_lock lock(mutex);
    initialized.insert(call);
  }
  return error;
}

template <auto decode>
xf::Error execute(cuda::Stream stream, int32_t device, Attrs attrs, xf::RemainingArgs args, xf::RemainingRets rets) {
  return run(decode(attrs, args, rets), [&](const auto& problem) { cuda::launch(problem, device, stream); });
}

auto bind_instantiate() {
  return xf::Ffi::Bind<xf::ExecutionStage::kInstantiate>().Attrs<Attrs>().RemainingArgs().RemainingRets();
}

auto bind_initialize() {
  return xf::Ffi::Bind<xf::ExecutionStage::kInitialize>()
      .Ctx<xf::DeviceOrdinal>()
      .Attrs<Attrs>()
      .RemainingArgs()
      .RemainingRets();
}

auto bind_execute() {
  return xf::Ffi::Bind()
      .Ctx<xf::PlatformStream<cuda::Stream>>()
      .Ctx<xf::DeviceOrdinal>()
      .Attrs<Attrs>()
      .RemainingArgs()
      .RemainingRets();
}

}  // namespace
}  // namespace flash::ffi

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flash_fwd_cuda_instantiate, flash::ffi::instantiate<flash::ffi::decode_fwd>,
                              flash::ffi::bind_instantiate());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flash_bwd_cuda_instantiate, flash::ffi::instantiate<flash::ffi::decode_bwd>,
                              flash::ffi::bind_instantiate());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flash_dbias_cuda_instantiate, flash::ffi::instantiate<flash::ffi::decode_dbias>,
                              flash::ffi::bind_instantiate());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flash_fwd_cuda_initialize, flash::ffi::initialize<flash::ffi::decode_fwd>,
                              flash::ffi::bind_initialize());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flash_bwd_cuda_initialize, flash::ffi::initialize<flash::ffi::decode_bwd>,
                              flash::ffi::bind_initialize());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flash_dbias_cuda_initialize, flash::ffi::initialize<flash::ffi::decode_dbias>,
                              flash::ffi::bind_initialize());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flash_fwd_cuda_execute, flash::ffi::execute<flash::ffi::decode_fwd>,
                              flash::ffi::bind_execute(), {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flash_bwd_cuda_execute, flash::ffi::execute<flash::ffi::decode_bwd>,
                              flash::ffi::bind_execute(), {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flash_dbias_cuda_execute, flash::ffi::execute<flash::ffi::decode_dbias>,
                              flash::ffi::bind_execute(), {xla::ffi::Traits::kCmdBufferCompatible});
