"""Attention under JAX's transformations: each gives what plain calls give, and those without a rule say so."""

from __future__ import annotations

import functools
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CPU_ONLY, assert_close, assert_equal

from jax_flash import _reference, flash_attention, flash_attention_varlen, paged_attention

pytestmark = pytest.mark.usefixtures("device")

FORWARD, BACKWARD, DBIAS = "jax_flash_fwd", "jax_flash_bwd", "jax_flash_dbias"
Arrays = dict[str, jax.Array]


def num_calls(compiled, target: str) -> int:
    """Calls of one of our targets in a compiled program."""
    return len(re.findall(f'custom_call_target="{target}"', compiled.as_text()))


def attend(q, k, v):
    return flash_attention(q, k, v, is_causal=True)


def reference(q, k, v):
    return _reference.attention(q, k, v, window=(-1, 0))[0]


def gradients(function, argnums=(0, 1, 2)):
    """Of a scalar whose derivative differs from element to element."""
    return jax.grad(lambda *args: jnp.sum(jnp.sin(function(*args))), argnums)


def with_vjp(function):
    """The result, and the gradients of the same scalar."""

    def out_and_gradients(*args):
        out, pull_back = jax.vjp(function, *args)
        return out, pull_back(jnp.cos(out))

    return jax.jit(out_and_gradients)


# Every operand of each entry point, for three examples at once. A call takes the operands of one example by name.


def dense_examples(rng) -> Arrays:
    return {
        "query": rng.activations(3, 2, 6, 4, 8),
        "key": rng.activations(3, 2, 9, 2, 8),
        "value": rng.activations(3, 2, 9, 2, 8),
        "bias": rng.normal(3, 1, 4, 6, 9),
        "mask": rng.bernoulli(3, 2, 1, 6, 9, p=0.8),
        "alibi_slopes": jnp.abs(rng.normal(3, 4)),
        "sinks": rng.normal(3, 4),
        "query_seq_lengths": jnp.int32([[6, 4], [3, 6], [5, 5]]),
        "key_value_seq_lengths": jnp.int32([[9, 5], [6, 8], [9, 9]]),
        "query_segment_ids": rng.integers(0, 1, 3, 2, 6),
        "key_value_segment_ids": rng.integers(0, 1, 3, 2, 9),
        "dropout_key": jax.random.split(jax.random.key(1), 3),
    }


def varlen_examples(rng) -> Arrays:
    return {
        "query": rng.activations(3, 12, 4, 8),
        "key": rng.activations(3, 16, 2, 8),
        "value": rng.activations(3, 16, 2, 8),
        "cu_seqlens_q": jnp.int32([[0, 5, 5, 12], [0, 3, 8, 10], [0, 0, 7, 12]]),
        "cu_seqlens_kv": jnp.int32([[0, 4, 9, 16], [0, 6, 6, 15], [0, 5, 11, 16]]),
        "seqused_kv": jnp.int32([[4, 3, 6], [2, 1, 7], [5, 6, 2]]),
        "alibi_slopes": jnp.abs(rng.normal(3, 4)),
        "sinks": rng.normal(3, 4),
        "dropout_key": jax.random.split(jax.random.key(2), 3),
    }


def paged_examples(rng) -> Arrays:
    return {
        "query": rng.activations(3, 2, 3, 4, 8),
        "key_pages": rng.activations(3, 7, 4, 2, 8),
        "value_pages": rng.activations(3, 7, 4, 2, 8),
        "page_table": rng.integers(0, 6, 3, 2, 3),
        "key_value_seq_lengths": jnp.int32([[12, 5], [8, 4], [3, 11]]),
        "alibi_slopes": jnp.abs(rng.normal(3, 4)),
        "sinks": rng.normal(3, 4),
    }


def paged_packed_examples(rng) -> Arrays:
    offsets = jnp.int32([[0, 2, 6], [0, 5, 5], [0, 1, 4]])
    return paged_examples(rng) | {"query": rng.activations(3, 6, 4, 8), "cu_seqlens_q": offsets}


def dense(operands: Arrays):
    return flash_attention(**operands, is_causal=True, dropout_rate=0.25, return_lse=True)


def varlen(operands: Arrays):
    return flash_attention_varlen(
        **operands, max_seqlen_q=12, max_seqlen_kv=16, is_causal=True, dropout_rate=0.25, return_lse=True
    )


def paged(operands: Arrays):
    packed = {"max_seqlen_q": 6} if "cu_seqlens_q" in operands else {}
    return paged_attention(**operands, **packed, return_lse=True)


DENSE = (
    "query key value bias mask alibi_slopes sinks query_seq_lengths key_value_seq_lengths query_segment_ids "
    "key_value_segment_ids dropout_key"
)
VARLEN = "query key value cu_seqlens_q cu_seqlens_kv seqused_kv alibi_slopes sinks dropout_key"
PAGED = "query key_pages value_pages page_table key_value_seq_lengths alibi_slopes sinks"
KINDS = {
    "dense": (dense, dense_examples, DENSE.split()),
    "varlen": (varlen, varlen_examples, VARLEN.split()),
    "paged": (paged, paged_examples, PAGED.split()),
    "paged_packed": (paged, paged_packed_examples, [*PAGED.split(), "cu_seqlens_q"]),
}


def with_gradients(call, operands: Arrays):
    """Output, lse, and gradients through both of every operand that has one."""
    if call is paged:
        return call(operands), {}
    trained = {n: operands[n] for n in ("query", "key", "value", "bias", "sinks") if n in operands}

    def scalar(trained: Arrays):
        out, lse = call(operands | trained)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isneginf(lse), 0, lse)), (out, lse)

    grads, results = jax.grad(scalar, has_aux=True)(trained)
    return results, grads


jitted_with_gradients = jax.jit(with_gradients, static_argnums=0)


def looped(call, operands: Arrays, mapped: set[str]):
    """One call per example, stacked; operands that are not ``mapped`` are the first example's."""
    each = [jitted_with_gradients(call, {n: x[i if n in mapped else 0] for n, x in operands.items()}) for i in range(3)]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *each)


def check_vmap(call, operands: Arrays, mapped: set[str]):
    args = {n: x if n in mapped else x[0] for n, x in operands.items()}
    in_axes = ({n: 0 if n in mapped else None for n in operands},)
    actual = jax.jit(jax.vmap(functools.partial(with_gradients, call), in_axes))(args)
    expected = looped(call, operands, mapped)
    assert_close(actual, expected)
    return expected


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, (*_, names) in KINDS.items() for name in names])
def test_vmap_over_one_operand(rng, kind, name):
    """The others are shared, yet each example has gradients of its own for them."""
    call, make_examples, names = KINDS[kind]
    operands = make_examples(rng)
    assert operands.keys() == set(names)
    (out, _), _ = check_vmap(call, operands, {name})
    assert not np.array_equal(out[0], out[1]), "the operand under test has no effect"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", ["query", None])
def test_vmap_over_several_operands(rng, kind, shared):
    call, make_examples, names = KINDS[kind]
    check_vmap(call, make_examples(rng), set(names) - {shared})


@pytest.mark.parametrize(("in_axis", "out_axis"), [(0, 0), (1, 3), (2, 1), (-1, 2), (4, -1)])
def test_vmap_along_any_axis(rng, in_axis, out_axis):
    q, k, v = (jnp.moveaxis(x, 0, in_axis) for x in rng.qkv((3, 2), 6, 9))
    actual = jax.vmap(attend, (in_axis, in_axis, in_axis), out_axis)(q, k, v)
    expected = [attend(*(jnp.take(x, i, in_axis) for x in (q, k, v))) for i in range(3)]
    assert_close(actual, jnp.stack(expected, out_axis))


def test_nested_vmap_with_operands_shared_on_either_level(rng):
    """The query is mapped by both levels, key and value by the inner one, the bias by the outer one."""
    q, (_, k, v), bias = rng.activations(3, 2, 2, 6, 4, 16), rng.qkv((2, 2), 6, 9), rng.normal(3, 1, 4, 6, 9)

    def call(q, k, v, bias):
        return flash_attention(q, k, v, bias=bias)

    def nested(call):
        return jax.jit(jax.vmap(jax.vmap(call, (1, 0, 0, None)), (0, None, None, 0)))

    def looped(call):
        each = [call(q[i, :, j], k[j], v[j], bias[i]) for i in range(3) for j in range(2)]
        return jax.tree.map(lambda *xs: jnp.stack(xs).reshape(3, 2, *xs[0].shape), *each)

    gradient = gradients(call, (0, 1, 2, 3))
    each = looped(jax.jit(gradient))
    assert_close(nested(call)(q, k, v, bias), looped(call))
    assert_close(nested(gradient)(q, k, v, bias), each)
    # The gradient of a map sums over examples what the map of a gradient keeps apart.
    summed = (jnp.moveaxis(each[0], 1, 2), each[1].sum(0), each[2].sum(0), each[3].sum(1))
    assert_close(jax.jit(gradients(nested(call), (0, 1, 2, 3)))(q, k, v, bias), summed)


def test_vmap_of_dropout_is_a_loop_over_keys(rng):
    args = rng.qkv(2, 6, 9)
    keys = jax.random.split(jax.random.key(0), 3)

    def call(key, q, k, v):
        return flash_attention(q, k, v, dropout_rate=0.4, dropout_key=key)

    each = [call(key, *args) for key in keys]
    assert not np.array_equal(each[0], each[1])
    assert_equal(jax.vmap(call, (0, None, None, None))(keys, *args), jnp.stack(each))
    same_key = jax.vmap(call, (None, 0, 0, 0))(keys[1], *(jnp.stack([x, x]) for x in args))
    assert_equal(same_key, jnp.stack([each[1]] * 2))


@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_value_and_grad(rng, transform):
    def loss(attention):
        return jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(attention(*args))), (0, 1, 2))

    args = rng.qkv(2, 6, 9)
    assert_close(transform(loss(attend))(*args), jax.jit(loss(reference))(*args))


def test_jacrev(rng):
    args = rng.qkv(1, 3, 5, heads=2, heads_kv=1, dim=4)
    assert_close(jax.jacrev(attend, (0, 1, 2))(*args), jax.jit(jax.jacrev(reference, (0, 1, 2)))(*args))


def unrolled(attention, x, k, v):
    """Three layers of attention, of which the others below are loops."""
    for layer in range(3):
        x = x + attention(x, k[layer], v[layer])
    return x


def scanned(x, k, v):
    return jax.lax.scan(lambda x, kv: (x + attend(x, *kv), None), x, (k, v))[0]


def scanned_with_remat(x, k, v):
    return jax.lax.scan(jax.checkpoint(lambda x, kv: (x + attend(x, *kv), None)), x, (k, v))[0]


def fori(x, k, v):
    return jax.lax.fori_loop(0, 3, lambda i, x: x + attend(x, k[i], v[i]), x)


def conditional(x, k, v):
    """The layers in every other step, behind a condition."""

    def step(x, i):
        return jax.lax.cond(i % 2 == 0, lambda: x + attend(x, k[i // 2], v[i // 2]), lambda: x), None

    return jax.lax.scan(step, x, jnp.arange(6))[0]


expected_layers = with_vjp(functools.partial(unrolled, reference))


@pytest.mark.parametrize("layers", [scanned, scanned_with_remat, fori, conditional])
def test_control_flow(rng, layers):
    args = rng.activations(2, 6, 4, 16), rng.activations(3, 2, 9, 2, 16), rng.activations(3, 2, 9, 2, 16)
    assert_close(with_vjp(layers)(*args), expected_layers(*args), 1e-4)


def test_while_loop(rng):
    """A number of layers that is known only when running, forward only."""
    x, k, v = rng.activations(2, 6, 4, 16), rng.activations(3, 2, 9, 2, 16), rng.activations(3, 2, 9, 2, 16)
    layers = jax.jit(lambda n: jax.lax.fori_loop(0, n, lambda i, x: x + attend(x, k[i], v[i]), x))
    assert_close(layers(3), unrolled(attend, x, k, v))


def save(*names):
    return functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*names))


@pytest.mark.parametrize(
    ("remat", "forward_calls"),
    [(None, 1), (jax.checkpoint, 2), (save("flash_out", "flash_lse"), 1), (save("flash_out"), 2)],
    ids=["none", "all", "save out and lse", "save out"],
)
def test_saving_out_and_lse_spares_the_second_forward(rng, remat, forward_calls):
    """Counted in a scan: elsewhere XLA may find by itself that two calls are the same."""

    def layer(x, kv):
        return x + attend(x, *kv), None

    def layers(x, k, v):
        return jax.lax.scan(remat(layer) if remat else layer, x, (k, v))[0]

    args = rng.activations(2, 6, 4, 16), rng.activations(3, 2, 9, 2, 16), rng.activations(3, 2, 9, 2, 16)
    compiled = with_vjp(layers).lower(*args).compile()
    assert num_calls(compiled, FORWARD) == forward_calls
    assert num_calls(compiled, BACKWARD) == 1
    assert_close(compiled(*args), expected_layers(*args), 1e-4)


def biased(q, k, v, bias):
    return flash_attention(q, k, v, bias=bias, is_causal=True)


def scanned_with_bias(x, k, v, bias):
    return jax.lax.scan(lambda x, kv: (x + biased(x, *kv, bias), None), x, (k, v))[0]


@pytest.mark.parametrize("layers", [biased, scanned_with_bias])
@pytest.mark.parametrize(("argnums", "calls"), [((0, 1, 2), 0), ((0, 1, 2, 3), 1), ((3,), 1)])
def test_only_a_bias_whose_gradient_is_used_has_one(rng, layers, argnums, calls):
    """A constant bias is not to cost the kernel that forms its gradient."""
    k, v = rng.activations(2, 2, 9, 2, 16) if layers is biased else rng.activations(2, 3, 2, 9, 2, 16)
    args = rng.activations(2, 6, 4, 16), k, v, rng.normal(1, 4, 6, 9)
    compiled = jax.jit(gradients(layers, argnums)).lower(*args).compile()
    assert num_calls(compiled, BACKWARD) == 1
    assert num_calls(compiled, DBIAS) == calls


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(
    ("shape", "result"),
    [((1, 4, 70, 90), (1, 4, 70, 90)), ((2, 1, 1, 90), (2, 1, 2, 90)), ((1, 1, 70, 1), (1, 1, 70, 2))],
)
def test_type_of_the_bias_gradient(rng, dtype, shape, result):
    """One with all queries and keys leaves the kernel as it is asked for; others as float32 sums over blocks."""
    q, k, v = rng.qkv(2, 70, 90)
    compiled = jax.jit(gradients(biased, 3)).lower(q, k, v, rng.normal(*shape, dtype=dtype)).compile()
    (call,) = (x for x in compiled.as_text().splitlines() if f'custom_call_target="{DBIAS}"' in x)
    names = {jnp.bfloat16: "bf16", jnp.float16: "f16", jnp.float32: "f32"}
    name = names[dtype] if shape == result else "f32"
    assert f"{name}[{','.join(map(str, result))}]" in call.split("custom-call")[0]
    assert compiled.out_info.dtype == dtype and compiled.out_info.shape == shape


@pytest.mark.parametrize("shape", [(1, 4, 6, 9), (1, 1, 1, 9), (2, 1, 6, 1)])
def test_vmap_over_a_shared_bias(rng, shape):
    """Each example has a gradient of its own, which a gradient of the whole sums up."""
    q, k, v = rng.qkv((3, 2), 6, 9)
    bias = rng.normal(*shape)
    in_axes, gradient = (0, 0, 0, None), gradients(biased, (0, 1, 2, 3))
    each = [jax.jit(gradient)(q[i], k[i], v[i], bias) for i in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)
    assert_close(jax.jit(jax.vmap(gradient, in_axes))(q, k, v, bias), stacked)
    summed = (*stacked[:3], stacked[3].sum(0))
    assert_close(jax.jit(gradients(jax.vmap(biased, in_axes), (0, 1, 2, 3)))(q, k, v, bias), summed)


@CPU_ONLY
def test_pmap(rng):
    q, k, v = rng.qkv((8, 1), 6, 9)
    assert_close(jax.pmap(attend)(q, k, v), attend(q.squeeze(1), k.squeeze(1), v.squeeze(1))[:, None])
    k, v = k[0], v[0]
    actual = jax.pmap(gradients(attend), in_axes=(0, None, None))(q, k, v)
    assert_close(actual, jax.vmap(gradients(attend), (0, None, None))(q, k, v))


def test_donated_buffers_are_reused(rng):
    """JAX warns, and so fails here, where a donated buffer finds no use."""
    q, k, v = rng.qkv(2, 9, 9, heads=4, heads_kv=4)
    expected, expected_gradients = jax.device_get((attend(q, k, v), gradients(attend)(q, k, v)))
    forward = jax.jit(attend, donate_argnums=0)
    assert forward.lower(q, k, v).compile().memory_analysis().alias_size_in_bytes == q.nbytes
    assert_close(forward(q + 0, k, v), expected)

    donated = q + 0, k + 0, v + 0
    actual = jax.jit(gradients(attend), donate_argnums=(0, 1, 2))(*donated)
    assert_close(actual, expected_gradients)
    assert all(x.is_deleted() for x in donated)


def test_x64_mode(rng):
    """The same bits for float32 inputs, dropout and lengths included; float64 is refused."""
    q, k, v = rng.qkv(2, 6, 9)
    lengths, slopes, key = jnp.int32([5, 9]), jnp.abs(rng.normal(4)), jax.random.key(3)

    def call(q, k, v):
        options = {"alibi_slopes": slopes, "sinks": slopes, "dropout_rate": 0.3, "dropout_key": key}
        return flash_attention(q, k, v, key_value_seq_lengths=lengths, is_causal=True, **options)

    expected = call(q, k, v), gradients(call)(q, k, v)
    with jax.enable_x64(True):
        assert jnp.zeros(1).dtype == jnp.float64
        actual = jax.jit(lambda *args: (call(*args), gradients(call)(*args)))(q, k, v)
        assert_equal(call(q, k, v), expected[0])
        with pytest.raises(NotImplementedError, match="`query` has dtype float64; supported are float32, bfloat16"):
            attend(*(np.asarray(x, np.float64) for x in (q, k, v)))
    assert jax.tree.map(lambda x: x.dtype, actual) == jax.tree.map(lambda x: x.dtype, expected)
    assert_equal(actual[0], expected[0])
    assert_close(actual[1], expected[1])


@pytest.mark.parametrize("kind", KINDS)
def test_eval_shape_runs_nothing(rng, kind):
    call, make_examples, _ = KINDS[kind]
    operands = {n: x[0] for n, x in make_examples(rng).items()}
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands)
    actual = jax.eval_shape(functools.partial(with_gradients, call), types)
    expected = jitted_with_gradients(call, operands)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), actual) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_operands(rng, kind):
    call, make_examples, _ = KINDS[kind]
    operands = {n: x[0] for n, x in make_examples(rng).items()}
    raw = {n: np.asarray(jax.random.key_data(x) if n == "dropout_key" else x) for n, x in operands.items()}
    assert_equal(call(raw), call(operands))
    assert_close(with_gradients(call, raw), with_gradients(call, operands))


@CPU_ONLY
@pytest.mark.parametrize("kind", KINDS)
def test_lowering_for_cuda_from_a_cpu_host(rng, kind):
    call, make_examples, _ = KINDS[kind]
    operands = {n: x[0] for n, x in make_examples(rng).items()}
    text = jitted_with_gradients.trace(call, operands).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(f"@{FORWARD}(") == 1
    assert text.count(f"@{BACKWARD}(") == (0 if call is paged else 1)


def test_what_changes_every_step_does_not_recompile(rng):
    q, k, v = rng.qkv(2, 6, 9)

    @jax.jit
    def step(key, lengths, bias):
        options = {"dropout_rate": 0.3, "dropout_key": key, "key_value_seq_lengths": lengths, "bias": bias}
        return gradients(lambda *args: flash_attention(*args, **options))(q, k, v)

    results = [step(jax.random.key(i), jnp.int32([9 - i, i]), rng.normal(1, 1, 1, 9)) for i in range(1, 4)]
    assert step._cache_size() == 1
    assert not np.array_equal(results[0][0], results[1][0])


FORWARD_MODE = "forward-mode differentiation .* is not implemented for attention; use reverse mode"
TWICE = "attention is differentiable once. A second derivative .* is not implemented"
DERIVATIVES = {
    "jvp": (lambda f, x: jax.jvp(f, (x,), (x,)), FORWARD_MODE),
    "jacfwd": (lambda f, x: jax.jacfwd(f)(x), FORWARD_MODE),
    "linearize": (lambda f, x: jax.linearize(f, x)[1](x), FORWARD_MODE),
    "grad of grad": (lambda f, x: gradients(gradients(f, 0), 0)(x), TWICE),
    "jacrev of grad": (lambda f, x: jax.jacrev(gradients(f, 0))(x), TWICE),
    "hessian": (lambda f, x: jax.hessian(lambda x: jnp.sum(f(x)))(x), f"{TWICE}|{FORWARD_MODE}"),
}
CONTEXTS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: lambda x: jax.vmap(f)(jnp.stack([x, x])),
    "scan": lambda f: lambda x: jax.lax.scan(lambda carry, y: (carry, f(y)), 0, x[None])[1],
    "remat": jax.checkpoint,
}


@CPU_ONLY
@pytest.mark.parametrize("derivative_is", ["inside", "outside"])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_what_has_no_rule_says_so(rng, derivative, context, derivative_is):
    x = rng.activations(1, 3, 2, 4)
    differentiate, message = DERIVATIVES[derivative]
    wrap = CONTEXTS[context]

    def attention(x):
        return attend(x, x, x)

    with pytest.raises(NotImplementedError, match=message):
        if derivative_is == "inside":
            wrap(lambda x: differentiate(attention, x))(x)
        else:
            differentiate(wrap(attention), x)


@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "sinks"])
def test_forward_mode_is_refused_for_each_operand(rng, name):
    operands = {n: x[0] for n, x in dense_examples(rng).items()}
    with pytest.raises(NotImplementedError, match=FORWARD_MODE):
        jax.jvp(lambda x: dense(operands | {name: x})[0], (operands[name],), (operands[name],))


def test_forward_mode_past_constant_attention(rng):
    """Only attention whose own inputs are perturbed is refused."""
    q, k, v = rng.qkv(1, 3, 3)
    out, tangent = jax.jvp(lambda x: jnp.sum(x * attend(q, k, v)), (2.0,), (1.0,))
    assert_close(out, 2 * tangent)


@pytest.mark.parametrize("kind", ["paged", "paged_packed"])
@pytest.mark.parametrize("name", ["query", "key_pages", "value_pages", "sinks"])
@pytest.mark.parametrize("context", ["eager", "jit"])
def test_paged_attention_has_no_gradient(rng, kind, name, context):
    operands = {n: x[0] for n, x in KINDS[kind][1](rng).items()}
    gradient = jax.grad(lambda x: jnp.sum(paged(operands | {name: x})[0]))
    with pytest.raises(NotImplementedError, match="paged attention is for inference and has no gradient"):
        CONTEXTS[context](gradient)(operands[name])


@CPU_ONLY
def test_many_calls_in_flight(rng):
    """Handlers run on the pool that does their work: one that waited for it would stop the process for good."""
    args = rng.qkv(4, 64, 64, heads=4)
    expected = jax.device_get(gradients(attend)(*args))
    step = jax.jit(gradients(attend))
    failures = []

    def run_in_thread(index: int):
        try:
            placed = jax.device_put(args, jax.devices()[index % 8])
            for result in [step(*placed) for _ in range(5)]:  # all are under way before the first is waited for
                assert_close(result, expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run_in_thread, args=(i,), daemon=True) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads), "the calls wait for each other"
    assert not failures
