"""The one place that knows how JAX versions differ (0.9.1 to current): types inside shard_map.

Under ``shard_map(check_vma=True)`` every array carries the set of manual mesh axes over which it varies ("vma"). JAX
0.10.2 renamed that part of the type; the functions here hide both spellings.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

_ManualAxisType = getattr(jax.sharding, "ManualAxisType", None)


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Manual mesh axes over which ``x`` varies."""
    aval = jax.typeof(x)
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset(manual.varying) if manual is not None else frozenset(getattr(aval, "vma", ()))


def result_type(shape: tuple[int, ...], dtype: Any, operands: dict[str, jax.Array]) -> jax.ShapeDtypeStruct:
    """Type of a result that varies wherever one of ``operands`` does."""
    varying = frozenset().union(*map(varying_axes, operands.values()))
    if not varying:
        return jax.ShapeDtypeStruct(shape, dtype)
    manual = {"vma": varying} if _ManualAxisType is None else {"manual_axis_type": _ManualAxisType(varying=varying)}
    replicated = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec(*(None,) * len(shape)))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated, **manual)


def unify_varying(operands: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Makes all operands vary over the union of their axes.

    To be called outside of ``custom_vjp``: the transpose of this cast is the sum of cotangents over the added axes.
    """
    union = frozenset().union(*map(varying_axes, operands.values()))

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(union - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return {name: cast(x) for name, x in operands.items()}
