"""How a call is divided over devices: batch and heads freely, everything else whole. Nothing else knows about meshes.

Attention mixes neither batch entries nor heads, so a call whose operands are sharded over those axes runs on each
device's part with no communication. Two exceptions add one all-reduce to the backward pass: key/value heads fewer than
the devices they are needed on (dk, dv), and a bias that is shared by what is sharded, where its gradient is used.

Meshes with Auto axes are served by ``partitioned`` (a Shardy rule), those with Explicit axes by ``in_explicit_mesh``
(a shard_map); inside a user's shard_map every array is local already.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_flash._attrs import operand_axes

Arrays = dict[str, jax.Array]
# A label names one axis of one array: "b0", "b1", ... for batch, the letters of _attrs for the rest, None for an axis
# of size 1 that is broadcast and thus never divided.
Labels = tuple[str | None, ...]


def _labels(axes: str, shape: tuple[int, ...]) -> Labels:
    """Labels of an array with ``axes`` behind its batch axes."""
    num_batch = len(shape) - len(axes)
    labels = [f"b{i}" for i in range(num_batch)] + [a.upper() for a in axes]
    broadcasts = [True] * num_batch + [a.islower() for a in axes]
    return tuple(None if size == 1 and b else a for a, b, size in zip(labels, broadcasts, shape, strict=True))


def _may_be_divided(label: str | None) -> bool:
    return label is not None and (label.startswith("b") or label in ("N", "K"))


def _mesh_axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


class _Division:
    """Which mesh axes divide which labelled axis, for the operands of one call.

    The query's present sharding is followed, and the others' where the query leaves an axis undivided. Key heads go
    with query heads where their number allows. Where there are fewer key heads than parts, each device takes the one
    key head that its query heads share (``slices_kv``); where that does not work out either, heads are not divided.

    Args:
      mesh_sizes: size of each mesh axis.
      shapes: the operands' global shapes, by name.
      specs: their present shardings, as tuples of PartitionSpec entries, one per axis.
    """

    def __init__(self, mesh_sizes: dict[str, int], shapes: dict[str, tuple], specs: dict[str, tuple]):
        names = tuple(shapes)
        self.labels = {name: _labels(operand_axes(name, names), shapes[name]) for name in names}
        self.divided = self._present(mesh_sizes, shapes, specs)

        num_heads, num_heads_kv = shapes["query"][-2], shapes["key"][-2]
        heads = heads_kv = self.divided.get("N", self.divided.get("K"))
        parts = math.prod(mesh_sizes[axis] for axis in _mesh_axes(heads))
        self.group = num_heads // num_heads_kv
        self.slices_kv = False
        if num_heads % parts:
            heads = heads_kv = None
        elif num_heads_kv % parts:
            heads_kv = None
            self.slices_kv = self.group % (num_heads // parts) == 0
            heads = heads if self.slices_kv else None
        self.divided["N"], self.divided["K"] = heads, heads_kv

    def _present(
        self, mesh_sizes: dict[str, int], shapes: dict[str, tuple], specs: dict[str, tuple]
    ) -> dict[str | None, Any]:
        """Batch and head labels with the PartitionSpec entry that divides them evenly, each mesh axis used once."""
        divided: dict[str | None, Any] = {}
        taken: set[str] = set()
        for name in ("query", *specs):  # the query first
            for label, size, entry in zip(self.labels[name], shapes[name], specs[name], strict=True):
                axes = _mesh_axes(entry)
                # Heads that do not divide evenly are looked at once the query's and the key's are known.
                is_even = label in ("N", "K") or size % math.prod(mesh_sizes[a] for a in axes) == 0
                is_free = label not in divided and taken.isdisjoint(axes)
                if axes and _may_be_divided(label) and is_even and is_free:
                    divided[label] = entry
                    taken.update(axes)
        return divided

    def spec(self, labels: Labels) -> PartitionSpec:
        return PartitionSpec(*(self.divided.get(label) for label in labels))

    def local_heads(self, operands: Arrays) -> Arrays:
        """Cuts out the key head that this device's query heads share, where devices outnumber key heads."""
        if not self.slices_kv:
            return operands
        head = self._local_kv_head(operands)
        cut = {n: jax.lax.dynamic_slice_in_dim(operands[n], head, 1, operands[n].ndim - 2) for n in ("key", "value")}
        return {**operands, **cut}

    def _local_kv_head(self, operands: Arrays) -> jax.Array:
        """The key head that this device's query heads share."""
        return _linear_index(_mesh_axes(self.divided["N"])) * operands["query"].shape[-2] // self.group

    def sum_shared(self, results: Arrays, operands: Arrays) -> Arrays:
        """Adds up, over devices, the gradients of what several devices read: a shared key head or bias.

        The results of a forward call have no such gradients and pass unchanged.
        """
        summed = dict(results)
        if self.slices_kv and "key" in results:
            head = self._local_kv_head(operands)
            for name in ("key", "value"):  # in one order everywhere: processes must agree on that of collectives
                part = results[name]
                whole = jnp.zeros((*part.shape[:-2], operands[name].shape[-2], part.shape[-1]), part.dtype)
                whole = jax.lax.dynamic_update_slice_in_dim(whole, part, head, part.ndim - 2)
                summed[name] = jax.lax.psum(whole, _mesh_axes(self.divided["N"]))
        if "bias" in results:
            own = set(self.labels["bias"])
            axes = [a for label, e in self.divided.items() if label not in own and label != "K" for a in _mesh_axes(e)]
            if axes:  # in float32, as there may be many devices
                part = results["bias"]
                summed["bias"] = jax.lax.psum(part.astype(jnp.float32), tuple(axes)).astype(part.dtype)
        return summed


def _linear_index(axes: tuple[str, ...]) -> jax.Array:
    index = jnp.int32(0)
    for axis in axes:
        index = index * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
    return index


def partitioned(call: Callable, names: tuple[str, ...], result_axes: dict[str, str]) -> Callable:
    """``call(*arrays)`` with a rule that divides it under jit over a mesh with Auto axes.

    Args:
      call: the custom call on whole or local arrays, positional in the order of ``names``; returns a tuple.
      names: its operands.
      result_axes: its results and their axes behind the batch, as in ``_attrs``.
    """

    def result_labels(types) -> list[Labels]:
        return [_labels(axes, t.shape) for axes, t in zip(result_axes.values(), types, strict=True)]

    def rule(mesh, operand_types, result_types):
        del mesh
        shapes = [tuple(t.shape) for t in operand_types]
        labels = [_labels(operand_axes(n, names), s) for n, s in zip(names, shapes, strict=True)]
        num_heads, num_heads_kv = (shapes[names.index(n)][-2] for n in ("query", "key"))
        factors: list[str] = []
        whole: list[str] = []

        def factor(label: str | None) -> str:
            name = (
                f"one{len(factors)}"
                if label is None
                else "n"
                if label == "K" and num_heads == num_heads_kv
                else label.lower()
            )
            if name not in factors:
                factors.append(name)
                if not _may_be_divided(label):
                    whole.append(name)
            return name

        def side(all_labels) -> str:
            return ", ".join(" ".join(map(factor, one)) for one in all_labels)

        text = f"{side(labels)} -> {side(result_labels(result_types))}"
        return text, {"need_replication_factors": tuple(whole)}

    def partition(mesh, operand_types, result_types):
        shapes = {n: tuple(t.shape) for n, t in zip(names, operand_types, strict=True)}
        specs = {n: _spec_of(t.sharding, len(t.shape)) for n, t in zip(names, operand_types, strict=True)}
        division = _Division(dict(mesh.shape), shapes, specs)

        def local_call(*arrays):
            operands = dict(zip(names, arrays, strict=True))
            outs = call(*division.local_heads(operands).values())
            return tuple(division.sum_shared(dict(zip(result_axes, outs, strict=True)), operands).values())

        def shardings(all_labels):
            return tuple(NamedSharding(mesh, division.spec(labels)) for labels in all_labels)

        return mesh, local_call, shardings(result_labels(result_types)), shardings(division.labels.values())

    # custom_partitioning binds arguments by name; a starred parameter takes any number of them.
    divided = custom_partitioning(call)
    divided.def_partition(partition=partition, sharding_rule=rule)
    return divided


def _spec_of(sharding: Any, ndim: int) -> tuple:
    """The spec padded to ``ndim``. In a shard_map with some axes left Auto XLA hands over a sharding without one."""
    spec = tuple(getattr(sharding, "spec", ()))
    return spec + (None,) * (ndim - len(spec))


def _axes_of_type(axis_type: AxisType) -> set[str]:
    """Axes of the current mesh; none outside of any mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return {a for a, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == axis_type}


def is_local() -> bool:
    """Whether every array here is one device's part: within a shard_map over all axes of the mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and _axes_of_type(AxisType.Manual) == set(mesh.axis_names)


def _divide_by_type(operands: Arrays) -> tuple[_Division, dict[str, PartitionSpec]]:
    """The division that the operands' types ask for, and the sharding that it wants of each."""
    shapes = {name: x.shape for name, x in operands.items()}
    specs = {name: _spec_of(jax.typeof(x).sharding, x.ndim) for name, x in operands.items()}
    division = _Division(dict(jax.sharding.get_abstract_mesh().shape), shapes, specs)
    return division, {name: division.spec(labels) for name, labels in division.labels.items()}


def resharded(operands: Arrays) -> Arrays:
    """Over a mesh with Explicit axes: the operands, sharded as the call divides them."""
    if not _axes_of_type(AxisType.Explicit):
        return operands
    _, wanted = _divide_by_type(operands)

    def moved(x: jax.Array, spec: PartitionSpec) -> jax.Array:
        return x if _spec_of(jax.typeof(x).sharding, x.ndim) == tuple(spec) else jax.sharding.reshard(x, spec)

    return {name: moved(x, wanted[name]) for name, x in operands.items()}


def in_explicit_mesh(call: Callable[[Arrays], Arrays], operands: Arrays, result_axes: dict[str, str]) -> Arrays:
    """``call(operands)``, inside a shard_map over the Explicit axes of the current mesh if it has any.

    Args:
      call: takes the operands and returns the results by name.
      operands: global arrays; their types say how they are sharded.
      result_axes: the axes behind the batch of each result, as in ``_attrs``.
    """
    explicit = _axes_of_type(AxisType.Explicit)
    if not explicit:
        return call(operands)
    division, wanted = _divide_by_type(operands)
    batch_labels = tuple(f"b{i}" for i in range(operands["query"].ndim - 3))
    out_specs = {name: division.spec((*batch_labels, *axes)) for name, axes in result_axes.items()}
    if "bias" in out_specs:
        out_specs["bias"] = wanted["bias"]

    def local_call(operands: Arrays) -> Arrays:
        return division.sum_shared(call(division.local_heads(operands)), operands)

    # No names mean all axes but those that an enclosing vmap maps over, for which JAX has no public name.
    axis_names = frozenset() if explicit == set(jax.sharding.get_abstract_mesh().axis_names) else explicit
    divided = jax.shard_map(local_call, in_specs=(wanted,), out_specs=out_specs, axis_names=axis_names)
    return divided(resharded(operands))
