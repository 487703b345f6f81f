"""The custom calls as JAX functions: registration, result types, and the rules for vmap and for sharded jit.

``forward``, ``backward`` and ``bias_gradient`` take the static ``Attrs`` and a dict of operands (``_attrs.OPERANDS``)
and choose nothing: they call what XLA finds under the target's name on the platform at hand. From the inside out each
is ``custom_vmap(custom_partitioning(ffi_call))``, with a shard_map between the two where the mesh has Explicit axes.
"""

from __future__ import annotations

import functools

import jax
import jax.export
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jax_flash import _cuda, _partitioning, compat
from jax_flash._attrs import (
    MAX_BATCH_AXES,
    OPERANDS,
    Attrs,
    backward_axes,
    backward_scratch_axes,
    bias_gradient_axes,
    bias_gradient_type,
    ffi_attributes,
    forward_axes,
    forward_scratch_axes,
    operand_axes,
)

try:
    from jax_flash import _core
except ImportError as error:
    raise ImportError(
        f"jax_flash: its compiled part cannot be imported ({error}). Inside a checkout, Python finds the sources in "
        "place of the installed package: install with `pip install .` and start Python from another directory."
    ) from error

FORWARD_TARGET = "jax_flash_fwd"
BACKWARD_TARGET = "jax_flash_bwd"
DBIAS_TARGET = "jax_flash_dbias"

_core.set_nvrtc_directories(_cuda.nvrtc_directories())
for _platform in ("cpu", "CUDA"):
    for _name, _stages in _core.targets(_platform).items():
        jax.ffi.register_ffi_target(_name, _stages, platform=_platform)

# For ``jax.export.export(..., disabled_checks=...)``: exported programs may contain these custom calls.
DISABLED_CHECKS = tuple(
    jax.export.DisabledSafetyCheck.custom_call(target) for target in (FORWARD_TARGET, BACKWARD_TARGET, DBIAS_TARGET)
)

Arrays = dict[str, jax.Array]


def forward(attrs: Attrs, operands: Arrays) -> Arrays:
    """Attention: ``out [..., T, N, D]``, ``lse [..., N, T]`` and, with ``attrs.return_softmax``, ``probs``."""
    return _call(FORWARD_TARGET, attrs, _sorted_names(operands))(operands)


def backward(attrs: Attrs, operands: Arrays) -> Arrays:
    """Gradients by operand name (``query key value``) and ``delta [..., N, T]``.

    ``delta`` is rowsum(d_out * out) - d_lse: the gradient of the logsumexp's shift, from which that of sinks follows.
    """
    return _call(BACKWARD_TARGET, attrs, _sorted_names(operands))(operands)


def bias_gradient(attrs: Attrs, operands: Arrays) -> Arrays:
    """The gradient of ``bias``, as ``bias_gradient_type`` says: to be summed over the blocks that it may have.

    A call of its own, so that under jit a bias whose gradient nobody uses costs nothing: the call is dropped then.
    """
    return _call(DBIAS_TARGET, attrs, _sorted_names(operands))(operands)


def _sorted_names(operands: Arrays) -> tuple[str, ...]:
    return tuple(name for name in OPERANDS if name in operands)


def _result_axes(target: str, attrs: Attrs, names: tuple[str, ...]) -> dict[str, str]:
    if target == FORWARD_TARGET:
        return forward_axes(attrs, names)
    return backward_axes() if target == BACKWARD_TARGET else bias_gradient_axes()


def _scratch_axes(target: str, attrs: Attrs) -> dict[str, str]:
    if target == FORWARD_TARGET:
        return forward_scratch_axes()
    return backward_scratch_axes(attrs) if target == BACKWARD_TARGET else {}


def _result_types(target: str, attrs: Attrs, operands: Arrays) -> dict[str, jax.ShapeDtypeStruct]:
    """Abstract evaluation, of scratch arrays too: shapes and dtypes follow from the operands' alone."""
    names = tuple(operands)
    query = operands["query"]
    batch = query.shape[:-3]
    sizes = {"X": attrs.max_seqlen_q, "Y": attrs.max_seqlen_kv}
    for name, x in operands.items():
        axes = operand_axes(name, names)
        sizes.update(zip(axes, x.shape[x.ndim - len(axes) :], strict=True))
    sizes["B"] = sizes.get("C", 2) - 1
    sizes["U"], sizes["F"] = sizes["T"] // 16 + sizes["B"], 16 * (sizes["H"] + 7 & -8)
    sizes["G"], sizes["E"] = sizes["T"] // 128 + sizes["B"], 2 * 128

    def result_type(name: str, axes: str) -> jax.ShapeDtypeStruct:
        if name == "bias":
            bias = operands["bias"]
            return compat.result_type(*bias_gradient_type(bias.shape, bias.dtype, (sizes["T"], sizes["S"])), operands)
        float32 = name in ("lse", "delta", "probs", "dq_accum", "statistics")
        dtype = jnp.float32 if float32 else jnp.int32 if name in ("next_unit", "tickets") else query.dtype
        return compat.result_type((*batch, *(sizes[a] for a in axes)), dtype, operands)

    results = _result_axes(target, attrs, names) | _scratch_axes(target, attrs)
    return {name: result_type(name, axes) for name, axes in results.items()}


@functools.cache
def _call(target: str, attrs: Attrs, names: tuple[str, ...]):
    """The function ``operands -> results`` for one choice of static facts."""

    def ffi_call(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        operands = dict(zip(names, arrays, strict=True))
        types = _result_types(target, attrs, operands)
        call = jax.ffi.ffi_call(target, tuple(types.values()))
        return tuple(call(*arrays, **ffi_attributes(attrs, names)))[: len(results)]

    results = _result_axes(target, attrs, names)
    partitioned = _partitioning.partitioned(ffi_call, names, results)

    def local(operands: Arrays) -> Arrays:
        operands = compat.unify_varying(operands)
        function = ffi_call if _partitioning.is_local() else partitioned
        return dict(zip(results, function(*(operands[name] for name in names)), strict=True))

    # Inside of custom_vmap, so that a mapped axis that is itself sharded is one more batch axis to be divided.
    @custom_vmap
    def call(operands: Arrays) -> Arrays:
        return _partitioning.in_explicit_mesh(local, operands, results)

    @call.def_vmap
    def batched(size: int, is_batched: tuple[dict[str, bool]], operands: Arrays):
        """The mapped axis becomes one more batch axis, of size 1 where an operand is shared: no loop, few copies."""
        if operands["query"].ndim - 3 - is_batched[0]["query"] >= MAX_BATCH_AXES:
            raise NotImplementedError(
                f"jax_flash: at most {MAX_BATCH_AXES} batch axes are supported, those of vmap included."
            )

        def widen(name: str, x: jax.Array) -> jax.Array:
            if is_batched[0][name]:
                return x
            # The query sets the batch axes, and each example needs its own gradient of a shared bias.
            full = name == "query" or (name == "bias" and target == DBIAS_TARGET)
            return jnp.broadcast_to(x, (size, *x.shape)) if full else x[None]

        out = call({name: widen(name, x) for name, x in operands.items()})
        return out, dict.fromkeys(results, True)

    return call
