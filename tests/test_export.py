"""Attention outside of the process that traced it: jax.export, the compilation cache, serialized executables."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import assert_close
from jax.experimental import serialize_executable
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flash
from jax_flash import flash_attention, flash_attention_varlen, paged_attention

pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers")

OFFSETS_Q, OFFSETS_KV = jnp.int32([0, 5, 5, 12]), jnp.int32([0, 4, 9, 16])

export = functools.partial(jax.export.export, disabled_checks=jax_flash.DISABLED_CHECKS)


def dense(q, k, v, key):
    """Every kind of operand that a step may change, so that none is baked into the program."""
    return flash_attention(q, k, v, is_causal=True, sinks=q[0, 0, :, 0], dropout_rate=0.3, dropout_key=key)


def varlen(q, k, v, key):
    options = {"max_seqlen_q": 12, "max_seqlen_kv": 16, "dropout_rate": 0.3, "dropout_key": key}
    return flash_attention_varlen(q, k, v, OFFSETS_Q, OFFSETS_KV, **options)


def arguments(call, rng):
    """Of ``dense`` or ``varlen``; the key is raw, as exported programs cannot take typed keys."""
    qkv = rng.qkv(2, 6, 9) if call is dense else (rng.normal(12, 4, 8), rng.normal(16, 2, 8), rng.normal(16, 2, 8))
    return *qkv, jax.random.key_data(jax.random.key(3))


def gradients(function):
    return jax.jit(jax.grad(lambda *args: jnp.sum(jnp.sin(function(*args))), (0, 1, 2)))


def round_trip(exported, **options):
    return jax.export.deserialize(exported.serialize(**options))


@pytest.mark.parametrize("platforms", [None, ("cpu", "cuda")])
@pytest.mark.parametrize("call", [dense, varlen])
def test_gradients(rng, call, platforms):
    args = arguments(call, rng)
    exported = round_trip(export(gradients(call), platforms=platforms)(*args))
    assert exported.platforms == (platforms or ("cpu",))
    assert_close(exported.call(*args), gradients(call)(*args))


@pytest.mark.parametrize("call", [dense, varlen])
def test_derivative_of_an_exported_function(rng, call):
    args = arguments(call, rng)
    exported = round_trip(export(jax.jit(call))(*args), vjp_order=1)
    assert_close(exported.call(*args), call(*args))
    assert_close(gradients(exported.call)(*args), gradients(call)(*args))


def test_paged(rng):
    table = rng.integers(0, 6, 2, 3)
    args = rng.normal(2, 1, 4, 8), rng.normal(7, 4, 2, 8), rng.normal(7, 4, 2, 8), table, jnp.int32([12, 5])
    exported = round_trip(export(jax.jit(paged_attention), platforms=("cpu", "cuda"))(*args))
    assert_close(exported.call(*args), paged_attention(*args))


def test_custom_calls_must_be_allowed(rng):
    """That is, DISABLED_CHECKS is what makes the tests above pass."""
    args = arguments(dense, rng)
    with pytest.raises(ValueError, match="jax_flash_fwd"):
        jax.export.export(jax.jit(dense))(*args)


@pytest.mark.parametrize("symbols", ["b", "b, t"])
def test_symbolic_dimensions(rng, symbols):
    """One program for any batch size, or for any batch size and length."""
    length = "t" if "t" in symbols else "6"
    (shape,) = {jax.export.symbolic_shape(f"b, {length}, 4, 16")}
    step = gradients(functools.partial(flash_attention, is_causal=True))
    exported = round_trip(export(step, platforms=("cpu", "cuda"))(*[jax.ShapeDtypeStruct(shape, jnp.float32)] * 3))
    for batch, seqlen in ((1, 6), (3, 6), (2, 11 if "t" in symbols else 6)):
        args = rng.qkv(batch, seqlen, seqlen, heads_kv=4)
        assert_close(exported.call(*args), step(*args))


@pytest.mark.parametrize("with_gradients", [False, True])
def test_shard_map_over_eight_devices(rng, with_gradients):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    spec = P("data", None, "model")

    def attend(q, k, v):
        return flash_attention(q, k, v, is_causal=True)

    mapped = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)
    transform = gradients if with_gradients else jax.jit
    args = rng.qkv(2, 6, 9, heads=8, heads_kv=4)
    placed = jax.device_put(args, NamedSharding(mesh, spec))
    exported = round_trip(export(transform(mapped), platforms=("cpu", "cuda"))(*placed))
    assert exported.nr_devices == 8
    assert_close(jax.jit(exported.call)(*placed), transform(attend)(*args))


@pytest.mark.parametrize("call", [dense, varlen])
def test_serialized_executable(rng, call):
    args = arguments(call, rng)
    compiled = gradients(call).lower(*args).compile()
    serialized = serialize_executable.serialize(compiled)
    loaded = serialize_executable.deserialize_and_load(*serialized, execution_devices=jax.devices()[:1])
    assert_close(loaded(*args), compiled(*args))


# Prints how often the compiler's cache was hit and missed by one program.
CACHE_SCRIPT = """
import collections
import jax, jax.monitoring, jax.numpy as jnp
from jax_flash import flash_attention

events = collections.Counter()
x = jnp.ones((1, 6, 2, 8))
step = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(flash_attention(x, x, x, is_causal=True)))))
jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
step(x).block_until_ready()
print(*(events[f"/jax/compilation_cache/cache_{outcome}"] for outcome in ("hits", "misses")))
"""


def test_persistent_compilation_cache_hits_in_another_process(tmp_path):
    """No pointer or other trace of the process may be part of the program."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def hits_and_misses() -> str:
        # -P: the working directory may hold our sources, without the extension.
        command = [sys.executable, "-P", "-c", CACHE_SCRIPT]
        return subprocess.run(
            command, stdout=subprocess.PIPE, text=True, timeout=120, check=True, env=environment
        ).stdout

    assert hits_and_misses().split() == ["0", "1"]
    entries = set(tmp_path.glob("*-cache"))
    assert hits_and_misses().split() == ["1", "0"]
    assert set(tmp_path.glob("*-cache")) == entries != set()
