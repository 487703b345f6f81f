"""Attention divided over eight devices: the same numbers as on one, and no communication that is not needed."""

from __future__ import annotations

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, assert_equal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flash import flash_api, flash_attention, flash_attention_varlen, paged_attention

Arrays = dict[str, jax.Array]


def make_mesh(axis_type: AxisType):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)


@pytest.fixture
def auto_mesh():
    return make_mesh(AxisType.Auto)


@pytest.fixture
def explicit_mesh():
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        yield mesh


def place(mesh, operands: Arrays, specs: dict[str, P]) -> Arrays:
    """Operands without a spec are on every device."""
    return {n: jax.device_put(x, NamedSharding(mesh, specs.get(n, P()))) for n, x in operands.items()}


def collectives(compiled) -> dict[str, int]:
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    return dict(collections.Counter(re.findall(rf" ({names})(?:-start)?\(", compiled.as_text())))


# Functions of operands by name. Each appears here once, so that its unsharded results are compiled once per shape.


def causal(operands: Arrays):
    return flash_attention(**operands, is_causal=True)


def full(operands: Arrays):
    return flash_attention(**operands)


def dropout(operands: Arrays):
    return flash_attention(**operands, dropout_rate=0.4)


def varlen(operands: Arrays):
    return flash_attention_varlen(**operands, max_seqlen_q=12, max_seqlen_kv=16, is_causal=True)


@functools.partial(jax.jit, static_argnums=0)
def forward(call, operands: Arrays):
    return call(operands)


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(call, operands: Arrays):
    """The result, and its pullback of a cotangent that differs from element to element."""
    trained = {n: operands[n] for n in ("query", "key", "value", "bias", "sinks") if n in operands}
    out, pull_back = jax.vjp(lambda trained: call(operands | trained), trained)
    return out, pull_back(jnp.cos(out))[0]


def check(call, operands: Arrays, mesh, specs: dict[str, P], backward_collectives=None):
    """Sharded equals unsharded; forwards there is no communication, backwards only what is expected."""
    expected = with_gradients(call, operands)
    placed = place(mesh, operands, specs)
    compiled = with_gradients.lower(call, placed).compile()
    assert_close(compiled(placed), expected)
    assert collectives(compiled) == (backward_collectives or {})
    if backward_collectives:
        assert collectives(forward.lower(call, placed).compile()) == {}


def named(arrays) -> Arrays:
    return dict(zip(("query", "key", "value"), arrays, strict=True))


HEADS = P("data", None, "model")
BATCH = P("data")
ALL_BATCH = P(("data", "model"))


@pytest.mark.parametrize(
    ("heads", "heads_kv", "query_spec", "kv_spec", "backward_collectives"),
    [
        (8, 8, HEADS, HEADS, {}),
        (8, 4, HEADS, HEADS, {}),
        (8, 8, BATCH, BATCH, {}),
        (8, 2, BATCH, BATCH, {}),
        (6, 2, BATCH, BATCH, {}),
        (8, 8, ALL_BATCH, ALL_BATCH, {}),
        (6, 2, ALL_BATCH, ALL_BATCH, {}),
        (8, 8, P(None, None, ("data", "model")), P(None, None, ("data", "model")), {}),
        (6, 2, P("model", None, "data"), P("model", None, "data"), {}),
        (8, 8, HEADS, BATCH, {}),
        # Fewer key/value heads than devices: each device has a part of their gradient.
        (8, 2, HEADS, BATCH, {"all-reduce": 1}),
        (8, 1, HEADS, BATCH, {"all-reduce": 1}),
        (8, 2, P("data", None, "model"), P("data", None, None), {"all-reduce": 1}),
        # The gradients of whole keys and values, each device having worked on some heads.
        (8, 4, HEADS, BATCH, {"all-gather": 2}),
    ],
)
def test_batch_and_heads_need_no_communication(
    rng, auto_mesh, heads, heads_kv, query_spec, kv_spec, backward_collectives
):
    operands = named(rng.qkv(8, 6, 9, heads, heads_kv, 8))
    specs = {"query": query_spec, "key": kv_spec, "value": kv_spec}
    check(causal, operands, auto_mesh, specs, backward_collectives)


OPTIONS = {
    "lengths": (lambda rng: {"query_seq_lengths": rng.integers(1, 6, 4), "key_value_seq_lengths": rng.integers(0, 9, 4)}, {"query_seq_lengths": BATCH, "key_value_seq_lengths": BATCH}, {}),
}


def test_probe(rng, auto_mesh):
    base = named(rng.qkv(4, 6, 9, 8, 4, 8))
    specs = dict.fromkeys(base, HEADS)
    cases = {
     "lengths": ({"query_seq_lengths": rng.integers(1, 6, 4), "key_value_seq_lengths": rng.integers(0, 9, 4)}, {"query_seq_lengths": BATCH, "key_value_seq_lengths": BATCH}),
     "lengths_repl": ({"query_seq_lengths": rng.integers(1, 6, 4), "key_value_seq_lengths": rng.integers(0, 9, 4)}, {}),
     "seg": ({"query_segment_ids": rng.integers(0, 1, 4, 6), "key_value_segment_ids": rng.integers(0, 1, 4, 9)}, {"query_segment_ids": BATCH, "key_value_segment_ids": BATCH}),
     "mask_full": ({"mask": rng.bernoulli(4, 8, 6, 9)}, {"mask": P("data", "model")}),
     "mask_shared": ({"mask": rng.bernoulli(1, 1, 6, 9)}, {}),
     "alibi": ({"alibi_slopes": rng.normal(8)}, {"alibi_slopes": P("model")}),
     "alibiB": ({"alibi_slopes": rng.normal(4, 8)}, {"alibi_slopes": P("data", "model")}),
     "alibi_repl": ({"alibi_slopes": rng.normal(8)}, {}),
     "sinks": ({"sinks": rng.normal(8)}, {"sinks": P("model")}),
     "sinks_repl": ({"sinks": rng.normal(8)}, {}),
     "bias_full": ({"bias": rng.normal(4, 8, 6, 9)}, {"bias": P("data", "model")}),
     "bias_heads": ({"bias": rng.normal(1, 8, 6, 9)}, {"bias": P(None, "model")}),
     "bias_batch": ({"bias": rng.normal(4, 1, 6, 9)}, {"bias": P("data")}),
     "bias_one": ({"bias": rng.normal(1, 1, 1, 9)}, {}),
     "bias_repl": ({"bias": rng.normal(4, 8, 6, 9)}, {}),
    }
    for name, (more, sp) in cases.items():
        ops, spp = base | more, specs | sp
        expected = with_gradients(full, ops)
        placed = place(auto_mesh, ops, spp)
        f = forward.lower(full, placed).compile()
        c = with_gradients.lower(full, placed).compile()
        try: assert_close(c(placed), expected); ok = "ok"
        except AssertionError as e: ok = str(e)
        print(name, ok, collectives(f), collectives(c))
