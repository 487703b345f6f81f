// The handlers that module.cc hands to JAX.
#pragma once

#include "xla/ffi/api/ffi.h"

XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_flash_fwd_cpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_flash_bwd_cpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_flash_dbias_cpu);

// One for each stage of XLA's.
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_flash_fwd_cuda_instantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_flash_fwd_cuda_initialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_flash_fwd_cuda_execute);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_flash_bwd_cuda_instantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_flash_bwd_cuda_initialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_flash_bwd_cuda_execute);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_flash_dbias_cuda_instantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_flash_dbias_cuda_initialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_flash_dbias_cuda_execute);
