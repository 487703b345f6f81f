"""Attention divided over eight devices: the same numbers as on one, and no communication that is not needed."""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import assert_close
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flash import flash_api, flash_attention, flash_attention_varlen, paged_attention

Arrays = dict[str, jax.Array]

HEADS = P("data", None, "model")
BATCH = P("data")
ALL_BATCH = P(("data", "model"))
ALL_HEADS = P(None, None, ("data", "model"))
WHOLE = P()


def make_mesh(axis_type: AxisType):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)


@pytest.fixture
def auto_mesh():
    return make_mesh(AxisType.Auto)


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    return make_mesh(request.param)


def is_explicit(mesh) -> bool:
    return AxisType.Explicit in mesh.axis_types


def within(mesh):
    """Arrays over Explicit axes need the mesh as context; arrays over Auto axes bring it along."""
    return jax.set_mesh(mesh) if is_explicit(mesh) else contextlib.nullcontext()


def place(mesh, operands, specs):
    """A tree of arrays, or a dict of which those without a spec are on every device."""
    if isinstance(operands, dict):
        specs = {n: specs.get(n, WHOLE) for n in operands}
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), operands, specs)


def collectives(compiled) -> dict[str, int]:
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    return dict(collections.Counter(re.findall(rf" ({names})(?:-start)?\(", compiled.as_text())))


def types(tree):
    return jax.tree.map(jax.typeof, tree)


def named(arrays) -> Arrays:
    return dict(zip(("query", "key", "value"), arrays, strict=True))


# Functions of operands by name, the same objects in all tests: each unsharded program is compiled once.


def causal(operands: Arrays):
    return flash_attention(**operands, is_causal=True)


def full(operands: Arrays):
    return flash_attention(**operands)


def dropout(operands: Arrays):
    return flash_attention(**operands, dropout_rate=0.4, is_causal=True)


def varlen(operands: Arrays):
    rate = 0.4 if "dropout_key" in operands else 0.0
    return flash_attention_varlen(**operands, max_seqlen_q=12, max_seqlen_kv=16, is_causal=True, dropout_rate=rate)


def paged(operands: Arrays):
    return paged_attention(**operands, max_seqlen_q=5 if "cu_seqlens_q" in operands else None)


@functools.partial(jax.jit, static_argnums=0)
def forward(call, operands: Arrays):
    return call(operands)


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(call, operands: Arrays):
    """The result, and its pullback of a cotangent that differs from element to element."""
    trained = {n: operands[n] for n in ("query", "key", "value", "bias", "sinks") if n in operands}
    out, pull_back = jax.vjp(lambda trained: call(operands | trained), trained)
    return out, pull_back(jnp.cos(out))[0]


def check(call, operands: Arrays, mesh, specs: dict[str, P], backward_collectives=None) -> None:
    """Sharded equals unsharded; forwards there is no communication, backwards only what is expected."""
    expected = with_gradients(call, operands)
    with within(mesh):
        placed = place(mesh, operands, specs)
        compiled = with_gradients.lower(call, placed).compile()
        assert_close(compiled(placed), expected)
        assert collectives(compiled) == (backward_collectives or {})
        if backward_collectives:
            assert collectives(forward.lower(call, placed).compile()) == {}
        if is_explicit(mesh):
            out, grads = jax.eval_shape(functools.partial(with_gradients, call), placed)
            assert out.sharding.spec == jax.typeof(placed["query"]).sharding.spec
            assert {n: g.sharding for n, g in grads.items()} == {n: types(placed)[n].sharding for n in grads}


@pytest.mark.parametrize(
    ("heads", "heads_kv", "query_spec", "kv_spec", "backward_collectives"),
    [
        (8, 8, HEADS, HEADS, {}),
        (8, 4, HEADS, HEADS, {}),
        (8, 2, BATCH, BATCH, {}),
        (6, 2, BATCH, BATCH, {}),
        (8, 8, ALL_BATCH, ALL_BATCH, {}),
        (6, 2, ALL_BATCH, ALL_BATCH, {}),
        (8, 8, ALL_HEADS, ALL_HEADS, {}),
        (6, 2, P("model", None, "data"), P("model", None, "data"), {}),
        # Fewer key/value heads than devices: each device has a part of their gradient.
        (8, 2, HEADS, BATCH, {"all-reduce": 1}),
        (8, 1, HEADS, BATCH, {"all-reduce": 1}),
        (8, 1, ALL_HEADS, WHOLE, {"all-reduce": 1}),
    ],
)
def test_batch_and_heads(rng, mesh, heads, heads_kv, query_spec, kv_spec, backward_collectives):
    operands = named(rng.qkv(8, 6, 9, heads, heads_kv, 8))
    check(causal, operands, mesh, {"query": query_spec, "key": kv_spec, "value": kv_spec}, backward_collectives)


OPTIONS = {
    "lengths": (("query_seq_lengths", BATCH, (4,)), ("key_value_seq_lengths", BATCH, (4,))),
    "lengths, whole": (("query_seq_lengths", WHOLE, (4,)), ("key_value_seq_lengths", WHOLE, (4,))),
    "segment ids": (("query_segment_ids", BATCH, (4, 6)), ("key_value_segment_ids", BATCH, (4, 9))),
    "mask": (("mask", P("data", "model"), (4, 8, 6, 9)),),
    "mask, shared": (("mask", WHOLE, (1, 1, 6, 9)),),
    "alibi": (("alibi_slopes", P("model"), (8,)),),
    "alibi, by batch": (("alibi_slopes", P("data", "model"), (4, 8)),),
    "bias": (("bias", P("data", "model"), (4, 8, 6, 9)),),
    "bias, shared by the batch": (("bias", P(None, "model"), (1, 8, 6, 9)),),
    "bias, shared by heads": (("bias", P("data"), (4, 1, 1, 9)),),
    "bias, shared by all": (("bias", WHOLE, (1, 1, 6, 9)),),
    "sinks": (("sinks", P("model"), (8,)),),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(rng, mesh, option):
    """The gradient of what the batch or the heads share is summed over them; the rest needs nothing."""
    operands, specs = named(rng.qkv(4, 6, 9, 8, 4, 8)), dict.fromkeys(("query", "key", "value"), HEADS)
    for name, spec, shape in OPTIONS[option]:
        specs[name] = spec
        if name == "mask":
            operands[name] = rng.bernoulli(*shape, p=0.7)
        elif name in ("bias", "sinks", "alibi_slopes"):
            operands[name] = rng.normal(*shape)
        else:
            operands[name] = rng.integers(0, 6, *shape)
    shared = option.startswith(("bias, shared", "sinks"))
    check(full, operands, mesh, specs, {"all-reduce": 1} if shared else {})


@pytest.mark.parametrize(
    ("shape", "spec"), [((1, 1, 6, 9), WHOLE), ((1, 8, 1, 9), P(None, "model")), ((4, 1, 1, 1), P("data"))]
)
@pytest.mark.parametrize("heads_kv", [4, 2])
def test_gradient_of_a_shared_bias(rng, mesh, shape, spec, heads_kv):
    """One all-reduce for it, beside those for the keys and values that devices share; none if it is a constant."""
    args = *rng.qkv(4, 6, 9, 8, heads_kv, 8), rng.normal(*shape)
    kv_spec, shared_keys = (HEADS, {}) if heads_kv == 4 else (BATCH, {"all-reduce": 1})
    specs = (HEADS, kv_spec, kv_spec, spec)

    def loss(q, k, v, bias):
        return jnp.sum(jnp.sin(flash_attention(q, k, v, bias=bias)))

    def compiled(argnums, *args):
        return jax.jit(jax.grad(loss, argnums)).lower(*args).compile()

    expected = compiled((0, 1, 2, 3), *args)(*args)
    with within(mesh):
        placed = place(mesh, args, specs)
        assert collectives(compiled((0, 1, 2), *placed)) == shared_keys
        trained = compiled((0, 1, 2, 3), *placed)
        assert_close(trained(*placed), expected)
        assert collectives(trained).keys() == {"all-reduce"}


def test_gradient_of_a_shared_bias_in_16_bits(rng, mesh):
    """Devices' parts are rounded once each, and added up in float32."""
    *qkv, bias = *rng.qkv(4, 6, 9, 8, 4, 8), rng.normal(1, 8, 6, 9, dtype=jnp.bfloat16)

    def gradient(bias, *qkv):
        return jax.grad(lambda bias: jnp.sum(jnp.sin(flash_attention(*qkv, bias=bias))))(bias)

    expected = gradient(bias.astype(jnp.float32), *qkv)
    with within(mesh):
        placed = place(mesh, (bias, *qkv), (P(None, "model"), HEADS, HEADS, HEADS))
        compiled = jax.jit(gradient).lower(*placed).compile()
        assert re.search(r"f32\[[0-9,]*\][^=]* all-reduce\(", compiled.as_text())
        error = jnp.abs(compiled(*placed).astype(jnp.float32) - expected)
    assert error.max() <= 2**-7 * jnp.abs(expected).max()


@pytest.mark.parametrize(("heads_kv", "kv_spec"), [(4, HEADS), (2, BATCH)])
def test_dropout_does_not_depend_on_the_sharding(rng, mesh, heads_kv, kv_spec):
    operands = named(rng.qkv(4, 6, 9, 8, heads_kv, 8)) | {"dropout_key": jax.random.key(3)}
    specs = {"query": HEADS, "key": kv_spec, "value": kv_spec}
    check(dropout, operands, mesh, specs, {"all-reduce": 1} if heads_kv == 2 else {})


def test_varlen(rng, mesh):
    operands = named((rng.normal(12, 8, 8), rng.normal(16, 4, 8), rng.normal(16, 4, 8))) | {
        "cu_seqlens_q": jnp.int32([0, 5, 5, 12]),
        "cu_seqlens_kv": jnp.int32([0, 4, 9, 16]),
        "alibi_slopes": rng.normal(8),
        "sinks": rng.normal(8),
        "dropout_key": jax.random.key(3),
    }
    check(varlen, operands, mesh, dict.fromkeys(("query", "key", "value"), P(None, "model")) | {"sinks": P("model")})


@pytest.mark.parametrize("is_packed", [False, True])
def test_paged(rng, mesh, is_packed):
    pages, table = P(None, None, "model"), WHOLE if is_packed else BATCH
    operands = {
        "query": rng.normal(12, 8, 8) if is_packed else rng.normal(4, 3, 8, 8),
        "key_pages": rng.normal(7, 4, 4, 8),
        "value_pages": rng.normal(7, 4, 4, 8),
        "page_table": rng.integers(0, 6, 4, 3),
        "key_value_seq_lengths": jnp.int32([12, 5, 3, 7]),
    } | ({"cu_seqlens_q": jnp.int32([0, 5, 5, 8, 12])} if is_packed else {})
    query_spec = P(None, "model") if is_packed else HEADS
    specs = {"query": query_spec, "key_pages": pages, "value_pages": pages}
    expected = forward(paged, operands)
    with within(mesh):
        placed = place(mesh, operands, specs | {"page_table": table, "key_value_seq_lengths": table})
        compiled = forward.lower(paged, placed).compile()
        assert_close(compiled(placed), expected)
        assert collectives(compiled) == {}
        assert not is_explicit(mesh) or jax.typeof(forward(paged, placed)).sharding.spec == P(*query_spec, None)


@pytest.mark.parametrize(
    ("heads", "heads_kv", "query_spec", "kv_spec"),
    [
        (8, 4, P("data", "model"), P("data", "model")),  # the sequence
        (8, 4, HEADS, P("data", "model")),
        (12, 3, HEADS, BATCH),  # a device's three query heads need two of the key heads
        (8, 8, HEADS, WHOLE),
        (8, 4, WHOLE, HEADS),
        (8, 8, HEADS, P("model", None, "data")),
        (8, 8, P(None, None, None, "model"), P(None, None, None, "model")),  # the head dim
    ],
)
def test_other_shardings_are_right_too(rng, mesh, heads, heads_kv, query_spec, kv_spec):
    """With whatever communication it takes."""
    operands = named(rng.qkv(4, 8, 8, heads, heads_kv, 8))
    expected = with_gradients(causal, operands)
    with within(mesh):
        placed = place(mesh, operands, {"query": query_spec, "key": kv_spec, "value": kv_spec})
        assert all(len(x.addressable_shards) == 8 for x in placed.values())
        out, grads = with_gradients(causal, placed)
        assert_close((out, grads), expected)
        assert not is_explicit(mesh) or types(grads) == types(placed)


def test_sharded_sequences_are_gathered(rng, auto_mesh):
    operands = named(rng.qkv(4, 8, 8))
    placed = place(auto_mesh, operands, dict.fromkeys(operands, P("data", "model")))
    assert collectives(forward.lower(causal, placed).compile()) == {"all-gather": 3}


def test_eager(rng, mesh):
    operands = named(rng.qkv(2, 6, 9, 8, 4, 8))
    expected = with_gradients(causal, operands)
    with within(mesh):
        placed = place(mesh, operands, dict.fromkeys(operands, HEADS))
        out, pull_back = jax.vjp(causal, placed)
        assert_close((out, pull_back(jnp.cos(out))[0]), expected)
        assert not is_explicit(mesh) or jax.typeof(out) == jax.typeof(placed["query"])


@pytest.mark.parametrize("mapped_axis", [None, "data"])
@pytest.mark.parametrize("shared", [(), ("key", "value")])
def test_vmap(rng, mesh, mapped_axis, shared):
    """The mapped axis may itself be sharded; gradients inside and outside of the map."""
    operands = named(rng.qkv((2, 2), 6, 9, 8, 4, 8)) | {"dropout_key": jax.random.key(3)}
    operands = {n: x[0] if n in shared else x for n, x in operands.items()}
    axes = ({n: None if n in (*shared, "dropout_key") else 0 for n in operands},)
    batch = None if mapped_axis else "data"
    one, stacked = P(batch, None, "model"), P(mapped_axis, batch, None, "model")
    specs = {n: one if n in shared else stacked for n in ("query", "key", "value")}

    def inside(operands: Arrays):
        return jax.vmap(functools.partial(with_gradients, dropout), axes)(operands)

    def outside(operands: Arrays):
        return with_gradients(jax.vmap(dropout, axes), operands)

    for function in (inside, outside):
        jitted = jax.jit(function)
        expected = jitted(operands)
        with within(mesh):
            placed = place(mesh, operands, specs)
            compiled = jitted.lower(placed).compile()
            assert_close(compiled(placed), expected)
            if not shared:
                assert collectives(compiled) == {}
            if is_explicit(mesh):
                assert jax.eval_shape(function, placed)[0].sharding == jax.typeof(placed["query"]).sharding


def scan_with_remat(operands: Arrays):
    """Two layers that share key and value; all of dropout's key, lengths and sinks go in as constants."""

    @jax.checkpoint
    def layer(x, _):
        return x + dropout(operands | {"query": x}), None

    return jax.lax.scan(layer, operands["query"], length=2)[0]


def test_scan_with_remat(rng, mesh):
    operands = named(rng.qkv(2, 6, 9, 8, 4, 8)) | {
        "dropout_key": jax.random.key(3),
        "key_value_seq_lengths": jnp.int32([9, 4]),
        "sinks": rng.normal(8),
    }
    specs = dict.fromkeys(("query", "key", "value"), HEADS) | {"sinks": P("model"), "key_value_seq_lengths": BATCH}
    check(scan_with_remat, operands, mesh, specs, {"all-reduce": 1})


@pytest.mark.parametrize(("heads_kv", "kv_spec"), [(4, HEADS), (2, BATCH)])
def test_flash_api(rng, mesh, heads_kv, kv_spec):
    @jax.jit
    def forward_and_backward(q, k, v, key):
        options = {"p_dropout": 0.3, "is_causal": True}
        fwd = flash_api.mha_fwd(q, k, v, **options, dropout_key=key, return_softmax=True)
        state = {"philox_seed": fwd.philox_seed, "philox_offset": fwd.philox_offset}
        return fwd, flash_api.mha_bwd(jnp.cos(fwd.out), q, k, v, fwd.out, fwd.softmax_lse, **options, **state)

    args, key = rng.qkv(2, 6, 9, 8, heads_kv, 8), jax.random.key(3)
    expected = forward_and_backward(*args, key)
    with within(mesh):
        placed = place(mesh, args, (HEADS, kv_spec, kv_spec))
        compiled = forward_and_backward.lower(*placed, key).compile()
        assert_close(compiled(*placed, key), expected)
        assert collectives(compiled) == ({"all-reduce": 1} if heads_kv == 2 else {})
        if is_explicit(mesh):
            fwd, bwd = forward_and_backward(*placed, key)
            assert types((fwd.out, bwd.dq, bwd.dk, bwd.dv)) == types((placed[0], *placed))
            for x in (fwd.softmax_lse, bwd.softmax_d, fwd.S_dmask):
                assert jax.typeof(x).sharding.spec == P("data", "model", *(None,) * (x.ndim - 2))


# In a shard_map every array is local. Gradients of what devices share are summed by shard_map itself, outside of our
# calls, or inside if check_vma tells it what is shared.


@pytest.fixture(params=[True, False], ids=["check_vma", "no check_vma"])
def check_vma(request) -> bool:
    return request.param


def pulled_back(function):
    """The result and its gradients, as ``with_gradients`` but by position."""

    def out_and_gradients(*args):
        out, pull_back = jax.vjp(function, *args)
        return out, pull_back(jnp.cos(out))

    return out_and_gradients


def biased(q, k, v, bias, sinks):
    return flash_attention(q, k, v, bias=bias, sinks=sinks)


unsharded_biased = jax.jit(pulled_back(biased))


def test_shard_map(rng, mesh, check_vma):
    """Bias and sinks are replicated over "data", whose parts of their gradients are summed."""
    args = *rng.qkv(2, 6, 9, 8, 4, 8), rng.normal(1, 8, 6, 9), rng.normal(8)
    specs = (HEADS, HEADS, HEADS, P(None, "model"), P("model"))
    expected = unsharded_biased(*args)
    mapped = jax.shard_map(biased, mesh=mesh, in_specs=specs, out_specs=HEADS, check_vma=check_vma)
    with within(mesh):
        placed = place(mesh, args, specs)
        assert_close(mapped(*placed), expected[0])
        compiled = jax.jit(pulled_back(mapped)).lower(*placed).compile()
        assert_close(compiled(*placed), expected)
        assert collectives(compiled).keys() == {"all-reduce"}


@pytest.mark.parametrize("gradient", ["inside", "outside"])
def test_shard_map_over_queries(rng, mesh, check_vma, gradient):
    """Each device has some rows of the queries and all keys: dk and dv are sums over devices."""

    def attend(q, k, v):
        return flash_attention(q, k, v)

    def local(q, k, v):
        out, (dq, dk, dv) = pulled_back(attend)(q, k, v)
        if not check_vma:
            dk, dv = jax.lax.psum((dk, dv), ("data", "model"))
        return out, (dq, dk, dv)

    args = rng.qkv(1, 16, 9, 2, 1, 8)
    rows = P(None, ("data", "model"))
    shard = functools.partial(jax.shard_map, mesh=mesh, in_specs=(rows, WHOLE, WHOLE), check_vma=check_vma)
    if gradient == "inside":
        mapped = shard(local, out_specs=(rows, (rows, WHOLE, WHOLE)))
    else:
        mapped = pulled_back(shard(attend, out_specs=rows))
    expected = jax.jit(pulled_back(attend))(*args)
    with within(mesh):
        assert_close(jax.jit(mapped)(*place(mesh, args, (rows, WHOLE, WHOLE))), expected)


@pytest.mark.parametrize("vmap", ["inside", "outside"])
def test_shard_map_and_vmap(rng, mesh, check_vma, vmap):
    def attend(q, k, v):
        return flash_attention(q, k, v, is_causal=True)

    args = rng.normal(2, 2, 6, 8, 8), rng.normal(2, 9, 4, 8), rng.normal(2, 9, 4, 8)
    map_examples = functools.partial(jax.vmap, in_axes=(0, None, None))
    stacked = P(None, *HEADS)
    shard = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)
    if vmap == "inside":
        mapped = shard(map_examples(attend), in_specs=(stacked, HEADS, HEADS), out_specs=stacked)
    else:
        mapped = map_examples(shard(attend, in_specs=(HEADS,) * 3, out_specs=HEADS))
    expected = jax.jit(pulled_back(map_examples(attend)))(*args)
    with within(mesh):
        assert_close(jax.jit(pulled_back(mapped))(*place(mesh, args, (stacked, HEADS, HEADS))), expected)


@pytest.mark.parametrize("manual", ["data", "model"])
def test_shard_map_over_one_axis(rng, mesh, check_vma, manual):
    """The other axis stays Auto or Explicit and is sharded too."""
    operands = named(rng.qkv(2, 6, 9, 8, 4, 8))
    spec = P(*(axis if axis == manual else None for axis in HEADS))
    mapped = jax.shard_map(
        causal, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={manual}, check_vma=check_vma
    )  # fmt: skip
    expected = with_gradients(causal, operands)
    with within(mesh):
        assert_close(with_gradients(mapped, place(mesh, operands, dict.fromkeys(operands, HEADS))), expected)


def test_shard_map_with_a_dropout_key_of_its_own_per_device(rng, mesh, check_vma):
    def attend(q, k, v, key):
        return flash_attention(q, k, v, dropout_rate=0.4, dropout_key=key)

    def local(q, k, v, key):
        return attend(q, k, v, jax.random.fold_in(key, jax.lax.axis_index("data")))

    args, key = rng.qkv(2, 6, 9), jax.random.key(3)
    keys = [jax.random.fold_in(key, i) for i in range(2)]
    expected = [attend(*(x[i : i + 1] for x in args), k) for i, k in enumerate(keys)]
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(BATCH, BATCH, BATCH, WHOLE), out_specs=BATCH, check_vma=check_vma
    )
    with within(mesh):
        assert_close(jax.jit(mapped)(*place(mesh, args, (BATCH,) * 3), key), jnp.concatenate(expected))


PROGRAM = """
import jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 4)
from jax.sharding import PartitionSpec as P
from jax_flash import flash_attention
with jax.set_mesh(jax.make_mesh((4,), ("model",))):
    q = jax.device_put(jnp.ones((1, 4, 8, 8)), P(None, None, "model"))
    k, v = jnp.ones((2, 1, 4, 2, 8))
    gradient = jax.grad(lambda q, k, v: flash_attention(q, k, v).sum(), (0, 1, 2))
    print(jax.jit(gradient).lower(q, k, v).as_text())
"""


def test_every_process_makes_the_same_program(tmp_path):
    """Processes that disagree on the order of collectives hang; Python's string hashes differ between them."""
    programs = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("0", "1", "2", "3", "4")
    }
    assert len(programs) == 1
    assert "all_reduce" in programs.pop()
