"""``jax_flash.linen``: ``attention_fn`` in Flax's own layer, and ``SelfAttention`` against that layer and plain jnp.

The function ``attention_fn`` itself is that of ``jax_flash.nnx`` and is tested there.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jax_flash.nnx
from jax_flash.linen import SelfAttention, attention_fn

B, T, S, N, H = 2, 13, 17, 4, 16
F = N * H


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def assert_close(actual, expected, tolerance=2e-5):
    assert actual.dtype == expected.dtype
    np.testing.assert_allclose(np.float32(actual), np.float32(expected), rtol=tolerance, atol=tolerance)


def random_biases(params):
    """``params`` with biases that are not 0, as those would not be tested."""
    return {
        name: leaf | ({"bias": normal(7, *leaf["bias"].shape)} if "bias" in leaf else {})
        for name, leaf in params.items()
    }


def values_and_gradients(layer, params, *inputs, **kwargs):
    """``(out, (dparams, dinputs))`` of the mean square of the layer's output."""

    def loss(params, *inputs):
        out = layer.apply({"params": params}, *inputs, **kwargs)
        return (out**2).mean(), out

    grads, out = jax.jit(jax.grad(loss, argnums=tuple(range(1 + len(inputs))), has_aux=True))(params, *inputs)
    return out, grads


def test_attention_fn_is_the_one_of_nnx():
    assert attention_fn is jax_flash.nnx.attention_fn


# --- attention_fn in Flax's layer -----------------------------------------------------------------------------------


def flax_layer(fn=attention_fn, **options):
    return nn.MultiHeadDotProductAttention(N, attention_fn=fn, **options)


@pytest.mark.parametrize(
    ("mask", "cross"),
    [
        (None, False),
        (None, True),
        (nn.make_causal_mask(np.ones((B, T)), dtype=bool), False),
        (nn.make_causal_mask(np.ones((B, T))), False),  # Float, Flax's default.
        (nn.make_attention_mask(np.ones((B, T)), np.arange(S) < np.array([[5], [9]])), True),
        (np.random.default_rng(0).random((B, N, T, S)) < np.where(np.arange(S), 0.5, 1.0), True),
    ],
    ids=["none", "cross", "causal_bool", "causal_float", "padding_float", "heads_bool"],
)
def test_in_flax_layer(mask, cross):
    inputs = (normal(0, B, T, F), normal(1, B, S, F)) if cross else (normal(0, B, T, F),)
    params = random_biases(flax_layer().init(jax.random.key(0), *inputs)["params"])
    ours = values_and_gradients(flax_layer(), params, *inputs, mask=mask)
    theirs = values_and_gradients(flax_layer(nn.dot_product_attention), params, *inputs, mask=mask)
    jax.tree.map(assert_close, ours, theirs)


def test_in_flax_layer_decode_equals_causal_call():
    layer, x = flax_layer(decode=True), normal(0, B, T, F)
    variables = layer.init(jax.random.key(0), x)
    params, cache = variables["params"], variables["cache"]
    step = jax.jit(lambda cache, x: layer.apply({"params": params, "cache": cache}, x, mutable=["cache"]))
    out = []
    for t in range(T):
        y, updated = step(cache, x[:, t : t + 1])
        out.append(y)
        cache = updated["cache"]
    full = flax_layer().apply({"params": params}, x, mask=nn.make_causal_mask(x[..., 0]))
    assert_close(jnp.concatenate(out, 1), full)


@pytest.mark.parametrize("broadcast", [True, False])
def test_in_flax_layer_dropout(broadcast):
    layer = flax_layer(dropout_rate=0.5, broadcast_dropout=broadcast)
    x = jnp.broadcast_to(normal(0, 1, T, F), (B, T, F))  # Equal batch entries: only dropout tells them apart.
    params = layer.init(jax.random.key(0), x, deterministic=True)["params"]

    def apply(seed, **kwargs):
        return layer.apply({"params": params}, x, rngs={"dropout": jax.random.key(seed)}, **kwargs)

    out = apply(0, deterministic=False)
    assert (out[0] == out[1]).all() == broadcast
    np.testing.assert_array_equal(out, apply(0, deterministic=False))
    assert (out != apply(1, deterministic=False)).any()
    assert_close(apply(0, deterministic=True), flax_layer(nn.dot_product_attention).apply({"params": params}, x))


def test_in_flax_layer_dtype():
    x = normal(0, B, T, F)
    params = flax_layer().init(jax.random.key(0), x)["params"]
    out = flax_layer(dtype=jnp.bfloat16, force_fp32_for_softmax=True).apply({"params": params}, x)
    assert out.dtype == jnp.bfloat16
    assert_close(out.astype(jnp.float32), flax_layer().apply({"params": params}, x), 0.05)


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({}, {"sow_weights": True}, "expected module=None, received MultiHeadDotProductAttention"),
        ({"precision": "BF16_BF16_F32_X3"}, {}, "expected precision to be None or a jax.lax.Precision"),
        (
            {
                "qk_attn_weights_einsum_cls": lambda: jnp.einsum,
                "attn_weights_value_einsum_cls": lambda: jnp.einsum,
            },
            {},
            "expected qk_attn_weights_einsum=None",
        ),
    ],
    ids=["sow_weights", "precision", "einsum"],
)
def test_in_flax_layer_what_cannot_be_honoured_raises(options, call, message):
    with pytest.raises(NotImplementedError, match=message):
        flax_layer(**options).init(jax.random.key(0), normal(0, B, T, F), **call)


# --- SelfAttention --------------------------------------------------------------------------------------------------


def make_layer(x, **options):
    """A layer and its parameters."""
    layer = SelfAttention(**{"num_heads": N} | options)
    return layer, random_biases(layer.init(jax.random.key(0), x)["params"])


def flax_params(params):
    """The parameters of a grouped-query layer for Flax's layer, which has a key and a value head per query head."""
    groups = N // params["key"]["kernel"].shape[-2]
    repeated = jax.tree.map(lambda a: jnp.repeat(a, groups, -2), {name: params[name] for name in ("key", "value")})
    return params | repeated


@pytest.mark.parametrize("num_kv_heads", [None, 1, 2])
@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ({}, None),
        ({"is_causal": True}, np.tri(T, dtype=bool)),
        ({"local_window_size": (4, 2)}, np.tri(T, k=2, dtype=bool) & ~np.tri(T, k=-5, dtype=bool)),
        ({"local_window_size": 3, "is_causal": True}, np.tri(T, dtype=bool) & ~np.tri(T, k=-4, dtype=bool)),
        ({"use_bias": False}, None),
    ],
    ids=["full", "causal", "window", "causal_window", "no_bias"],
)
def test_layer_equals_flax_layer(options, mask, num_kv_heads):
    x = normal(0, B, T, F)
    layer, params = make_layer(x, num_kv_heads=num_kv_heads, **options)
    theirs = flax_layer(nn.dot_product_attention, use_bias=options.get("use_bias", True))

    def reference(params, x):
        out = theirs.apply({"params": flax_params(params)}, x, mask=None if mask is None else mask[None, None])
        return (out**2).mean(), out

    out, grads = values_and_gradients(layer, params, x)
    expected_grads, expected = jax.jit(jax.grad(reference, argnums=(0, 1), has_aux=True))(params, x)
    assert_close(out, expected)
    jax.tree.map(assert_close, grads, expected_grads)


def test_layer_head_dim_soft_cap_and_segments():
    x, cap, head_dim = normal(0, B, T, F), 0.7, 24
    segment_ids = jnp.array([[0] * 4 + [1] * (T - 4), [5] * (T - 3) + [2] * 3], jnp.int32)
    layer, params = make_layer(x, head_dim=head_dim, logits_soft_cap=cap)
    q, k, v = (
        jnp.einsum("btf,fnh->btnh", x, params[name]["kernel"]) + params[name]["bias"]
        for name in ("query", "key", "value")
    )
    scores = cap * jnp.tanh(jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(head_dim) / cap)
    visible = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
    out = jnp.einsum("bnts,bsnh,nhf->btf", weights, v, params["out"]["kernel"]) + params["out"]["bias"]
    assert_close(layer.apply({"params": params}, x, segment_ids=segment_ids), out)


def test_layer_dtypes():
    x = normal(0, B, T, F)
    layer = SelfAttention(N, dtype=jnp.bfloat16, is_causal=True, decode=True)
    variables = layer.init(jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype(jnp.float32)}
    assert variables["cache"]["cached_key"].dtype == jnp.bfloat16
    assert layer.apply(variables, x, mutable=["cache"])[0].dtype == jnp.bfloat16


def test_layer_dropout():
    x = normal(0, B, T, F)
    plain, params = make_layer(x)
    layer = SelfAttention(N, dropout_rate=0.5)

    def apply(seed, **kwargs):
        return layer.apply({"params": params}, x, rngs={"dropout": jax.random.key(seed)}, **kwargs)

    assert (apply(0, deterministic=False) != apply(1, deterministic=False)).any()
    given = {"deterministic": False, "dropout_rng": jax.random.key(5)}
    np.testing.assert_array_equal(apply(0, **given), apply(1, **given))
    assert_close(apply(0, deterministic=True), plain.apply({"params": params}, x))
    evaluated = SelfAttention(N, dropout_rate=0.5, deterministic=True)
    assert_close(evaluated.apply({"params": params}, x), plain.apply({"params": params}, x))


# --- SelfAttention: decoding ----------------------------------------------------------------------------------------


def make_decoder(max_length, batch=(B,), **options):
    """Parameters, an empty cache, and a jitted ``step(cache, x) -> (out, cache)``."""
    layer = SelfAttention(N, is_causal=True, decode=True, **options)
    variables = layer.init(jax.random.key(0), jnp.zeros((*batch, max_length, F)))

    @jax.jit
    def step(cache, x):
        out, updated = layer.apply({"params": variables["params"], "cache": cache}, x, mutable=["cache"])
        return out, updated["cache"]

    return variables["params"], variables["cache"], step


@pytest.mark.parametrize(
    ("batch", "chunks", "max_length", "options"),
    [
        ((B,), (1,) * T, T, {}),
        ((B,), (5, 1, 1, 3, 3), T + 10, {"num_kv_heads": 2, "local_window_size": 3}),
        ((), (5, 1, 1, 3, 3), T, {"local_window_size": 4}),
        ((2, 1), (T,), T + 1, {"num_kv_heads": 1, "logits_soft_cap": 3.0}),
    ],
    ids=str,
)
def test_decode_equals_full_forward(batch, chunks, max_length, options):
    x = normal(0, *batch, T, F)
    params, cache, step = make_decoder(max_length, batch, **options)
    out, starts = [], np.cumsum((0, *chunks))
    for a, b in itertools.pairwise(starts):
        y, cache = step(cache, x[..., a:b, :])
        out.append(y)
    full = SelfAttention(N, is_causal=True, **options).apply({"params": params}, x)
    assert_close(jnp.concatenate(out, -2), full)
    assert cache["cache_index"] == T


def test_init_leaves_the_cache_empty():
    _, cache, _ = make_decoder(8)
    assert cache["cached_key"].shape == (B, 8, N, H)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(cache))


def test_decode_past_the_end_raises_where_the_index_is_known():
    layer = SelfAttention(N, is_causal=True, decode=True)
    variables = layer.init(jax.random.key(0), jnp.zeros((B, 8, F)))
    _, cache = layer.apply(variables, jnp.zeros((B, 7, F)), mutable=["cache"])
    with pytest.raises(ValueError, match="at most max_length - used = 8 - 7 = 1 new tokens, received 2"):
        layer.apply(variables | cache, jnp.zeros((B, 2, F)), mutable=["cache"])


def test_decode_past_the_end_under_jit_gives_nan_and_keeps_the_cache():
    x = normal(0, B, T, F)
    _, cache, step = make_decoder(8)
    _, cache = step(cache, x[:, :7])
    out, after = step(cache, x[:, :2])
    assert jnp.isnan(out).all()
    jax.tree.map(np.testing.assert_array_equal, after, cache)


# --- SelfAttention: errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"num_kv_heads": 3}, {}, "num_heads to be a multiple of num_kv_heads, received num_heads=4, num_kv_heads=3"),
        ({"num_heads": 5}, {}, r"features of x to be a multiple of num_heads, .* \(2, 13, 64\), num_heads=5"),
        ({"decode": True}, {}, "decode=True expects is_causal=True, received False"),
        (
            {"decode": True, "is_causal": True},
            {"segment_ids": jnp.zeros((B, T), jnp.int32)},
            "decode=True expects segment_ids=None",
        ),
    ],
    ids=["num_kv_heads", "num_heads", "causal", "segment_ids"],
)
def test_layer_rejects(options, call, message):
    with pytest.raises(ValueError, match=message):
        SelfAttention(**{"num_heads": N} | options).init(jax.random.key(0), normal(0, B, T, F), **call)


def test_decode_without_a_cache_raises():
    x = normal(0, B, T, F)
    _, params = make_layer(x)
    with pytest.raises(ValueError, match='expects a "cache" collection among the variables, and there is none'):
        SelfAttention(N, is_causal=True, decode=True).apply({"params": params}, x, mutable=["cache"])
