"""Ties the forward call to the backward call. Every public function goes through ``attend``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_flash import _ffi, _partitioning, compat
from jax_flash._attrs import Attrs

Arrays = dict[str, jax.Array]

# Names for ``jax.checkpoint_policies.save_only_these_names``: with both saved, rematerialisation does not run the
# forward kernel again.
OUT_NAME = "flash_out"
LSE_NAME = "flash_lse"


def attend(attrs: Attrs, operands: Arrays) -> tuple[jax.Array, jax.Array]:
    """Differentiable attention: ``out [..., T, N, D]`` and ``lse [..., N, T]``, on any mesh.

    Both cotangents are honoured. Gradients reach query, key, value, bias and sinks; the other operands are constants.
    A paged call (one with a page table) has no gradient.
    """
    # Both outside of custom_vjp, whose gradients must have the types of what goes in.
    operands = compat.unify_varying(_partitioning.resharded(operands))
    if "page_table" in operands:
        results = _forward_paged(attrs, operands)
        return results["out"], results["lse"]
    floating = {n for n, x in operands.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    return _attend(attrs, {n: _reverse_only_p.bind(x) if n in floating else x for n, x in operands.items()})


def probabilities(attrs: Attrs, operands: Arrays) -> jax.Array:
    """The attention matrix itself (``Attrs.return_softmax``), for tests; a constant to differentiation."""
    attrs = dataclasses.replace(attrs, return_softmax=True)
    return _ffi.forward(attrs, jax.lax.stop_gradient(operands))["probs"]


def _without_derivative(function: Callable, why: str) -> Callable:
    """``function(attrs, operands)``, which raises NotImplementedError(why) when differentiated."""
    wrapped = jax.custom_jvp(function, nondiff_argnums=(0,))

    @wrapped.defjvp
    def _(attrs, primals, tangents):
        raise NotImplementedError(why)

    return wrapped


_forward_paged = _without_derivative(
    _ffi.forward,
    "jax_flash: paged attention is for inference and has no gradient. For training use flash_attention or "
    "flash_attention_varlen.",
)
_ONCE = (
    "jax_flash: attention is differentiable once. A second derivative (grad of grad, hessian) is not implemented; "
    "jax.nn.dot_product_attention has one."
)
# The backward calls by themselves (``_ffi.backward``, ``_ffi.bias_gradient``).
backward = _without_derivative(_ffi.backward, _ONCE)
bias_gradient = _without_derivative(_ffi.bias_gradient, _ONCE)


def _attend_primal(attrs: Attrs, operands: Arrays) -> tuple[jax.Array, jax.Array]:
    results = _ffi.forward(attrs, operands)
    return results["out"], results["lse"]


_attend = jax.custom_vjp(_attend_primal, nondiff_argnums=(0,))


def _attend_fwd(attrs: Attrs, operands: Arrays):
    # XLA of jaxlib 0.11.2 fuses the call with the writing of `out` to a scan's stack of residuals, and computes it a
    # second time for all else that takes `out` (openxla/xla pull request 45799). It does not look behind a barrier.
    out, lse = jax.lax.optimization_barrier(_attend(attrs, operands))
    out, lse = checkpoint_name(out, OUT_NAME), checkpoint_name(lse, LSE_NAME)
    return (out, lse), (operands, out, lse)


def _attend_bwd(attrs: Attrs, residuals, cotangents):
    operands, out, lse = residuals
    d_out, d_lse = cotangents
    # A sink is no operand of the backward call: it acts through lse alone.
    inputs = {n: x for n, x in operands.items() if n != "sinks"} | {"lse": lse, "d_out": d_out}
    results = backward(attrs, {**inputs, "out": out, "d_lse": d_lse})
    gradients = {n: results[n] for n in ("query", "key", "value")}
    if "bias" in operands:
        bias, sums = operands["bias"], bias_gradient(attrs, {**inputs, "delta": results["delta"]})["bias"]
        gradients["bias"] = _summed_to(bias.shape, sums).astype(bias.dtype)
    if "sinks" in operands:
        gradients["sinks"] = _sinks_gradient(operands["sinks"], lse, results["delta"])
    return ({name: gradients.get(name) for name in operands},)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _summed_to(shape: tuple[int, ...], x: jax.Array) -> jax.Array:
    """``x`` summed over the axes that have size 1 in ``shape``, of as many axes."""
    shared = tuple(a for a, size in enumerate(shape) if size != x.shape[a])
    return jnp.sum(x, axis=shared, keepdims=True)


def _sinks_gradient(sinks: jax.Array, lse: jax.Array, delta: jax.Array) -> jax.Array:
    """-sum over rows of p_sink * delta, with p_sink = exp(sink - lse), summed over batch axes that ``sinks`` shares.

    A sink is a key whose value is zero, so of dS = P * (dP - delta) only delta is left.
    """
    probability = jnp.where(jnp.isneginf(lse), 0.0, jnp.exp(sinks[..., None] - lse))  # [..., N, T]
    return _summed_to(sinks.shape, -jnp.sum(probability * delta, axis=-1))


# Forward-mode differentiation of a custom_vjp fails with a sentence about custom_vjp. An identity in front of it makes
# the sentence ours: its tangent map is a linear primitive that knows only its transpose. Reverse mode transposes it
# away; forward mode runs it, batches it (jacfwd) or lowers it (under jit), and all three refuse.
_FORWARD_MODE = (
    "jax_flash: forward-mode differentiation (jax.jvp, jax.jacfwd, jax.linearize) is not implemented for attention; "
    "use reverse mode (jax.grad, jax.vjp, jax.jacrev)."
)


def _refuse_forward_mode(*args, **params):
    raise NotImplementedError(_FORWARD_MODE)


_tangent_p = Primitive("jax_flash_tangent")
_tangent_p.def_impl(_refuse_forward_mode)
_tangent_p.def_abstract_eval(lambda aval: aval)
ad.deflinear2(_tangent_p, lambda cotangent, _: [cotangent])
batching.primitive_batchers[_tangent_p] = _refuse_forward_mode
mlir.register_lowering(_tangent_p, _refuse_forward_mode)

_reverse_only_p = Primitive("jax_flash_reverse_only")
_reverse_only_p.def_impl(lambda x: x)
_reverse_only_p.def_abstract_eval(lambda aval: aval)
ad.defjvp(_reverse_only_p, lambda tangent, x: _tangent_p.bind(tangent))
batching.defvectorized(_reverse_only_p)
mlir.register_lowering(_reverse_only_p, lambda context, x: [x])


def dropout_stream(
    key: jax.Array, batch: tuple[int, ...], num_heads: int, *, offset: jax.Array | int = 0, broadcast: bool = False
) -> jax.Array:
    """The operand that names each (batch, head)'s random bits: uint32 ``[*batch, N, 4]`` = key, batch and head index.

    The indices are data, sharded and mapped like any operand, so the bits of a (batch, head) are the same wherever it
    is computed. ``offset`` shifts the batch index. With ``broadcast`` all indices are 0: one mask for all.
    """
    batch_index = jnp.arange(math.prod(batch), dtype=jnp.uint32).reshape((*batch, 1))
    head_index = jnp.arange(num_heads, dtype=jnp.uint32)
    indices = jnp.stack(jnp.broadcast_arrays(batch_index, head_index), axis=-1)
    if broadcast:
        indices = jnp.zeros_like(indices)
    indices = indices + jnp.stack([jnp.asarray(offset, jnp.uint32), jnp.uint32(0)])
    return jnp.concatenate([jnp.broadcast_to(key, indices.shape), indices], axis=-1)
