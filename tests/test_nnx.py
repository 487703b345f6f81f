"""``jax_flash.nnx``: ``attention_fn`` against Flax's own function and layer, ``SelfAttention`` against plain jnp."""

import inspect
import itertools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_flash.nnx import SelfAttention, attention_fn, cached_attention

B, T, S, N, H = 2, 13, 17, 4, 16
F = N * H


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def make_qkv(kv_heads=N, batch=(B,), kv_len=S):
    return normal(0, *batch, T, N, H), normal(1, *batch, kv_len, kv_heads, H), normal(2, *batch, kv_len, kv_heads, H)


def random_mask(*shape):
    """A random bool mask in which every query sees key 0: Flax gives other results than 0 for queries without keys."""
    return jax.random.bernoulli(jax.random.key(3), 0.5, shape).at[..., 0].set(True)


def assert_close(actual, expected, tolerance=2e-5):
    assert actual.dtype == expected.dtype
    np.testing.assert_allclose(np.float32(actual), np.float32(expected), rtol=tolerance, atol=tolerance)


def assert_same_values_and_gradients(fn, reference, *args):
    """Compares ``fn(*args)`` with ``reference(*args)``, and the gradients of a generic scalar of them."""

    def values_and_gradients(f):
        def loss(*args):
            out = f(*args)
            return (out * normal(9, *out.shape)).sum(), out

        return jax.jit(jax.grad(loss, argnums=tuple(range(len(args))), has_aux=True))(*args)

    (grads, out), (expected_grads, expected) = values_and_gradients(fn), values_and_gradients(reference)
    assert_close(out, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected_grad, 1e-4)


# --- attention_fn: the function -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flax_fn", [nnx.dot_product_attention, flax.linen.dot_product_attention])
def test_every_keyword_of_flax_is_named_in_flaxs_order(flax_fn):
    ours, theirs = (inspect.signature(f).parameters for f in (attention_fn, flax_fn))
    assert set(theirs) <= set(ours)
    assert not any(p.kind is p.VAR_KEYWORD for p in ours.values())  # It would hide what is not honoured.
    positional = [name for name, p in ours.items() if p.kind is not p.KEYWORD_ONLY]
    assert positional == list(theirs)[: len(positional)]
    for name in set(theirs) - {"promote_dtype"}:
        assert ours[name].default == theirs[name].default, name


@pytest.mark.parametrize(
    ("mask_shape", "mask_dtype"),
    [
        ((B, 1, T, S), bool),
        ((B, 1, T, S), jnp.float32),
        ((B, N, T, S), bool),
        ((B, N, T, S), jnp.bfloat16),
        ((1, N, 1, S), jnp.int32),
        ((B, 1, 1, S), jnp.float32),
        ((N, T, S), bool),
        ((S,), jnp.float32),
    ],
    ids=str,
)
def test_mask(mask_shape, mask_dtype):
    mask = random_mask(*mask_shape)
    # Any nonzero value attends, a negative one included.
    ours = mask if mask_dtype is bool else jnp.where(mask, -2, 0).astype(mask_dtype)
    padded = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    assert_same_values_and_gradients(
        lambda *qkv: attention_fn(*qkv, mask=ours),
        lambda *qkv: nnx.dot_product_attention(*qkv, mask=padded),
        *make_qkv(),
    )


def test_numpy_mask_and_inputs():
    mask = np.asarray(random_mask(B, 1, T, S), np.float32)
    qkv = [np.asarray(x) for x in make_qkv()]
    assert_close(
        attention_fn(*qkv, mask=mask), nnx.dot_product_attention(*map(jnp.asarray, qkv), mask=jnp.asarray(mask))
    )


@pytest.mark.parametrize("bias_shape", [(B, N, T, S), (1, N, T, S), (B, 1, 1, S), (N, T, S), (T, S)], ids=str)
def test_bias(bias_shape):
    def reference(*args):
        *qkv, bias = args
        return nnx.dot_product_attention(*qkv, jnp.broadcast_to(bias, (B, N, T, S)))

    assert_same_values_and_gradients(attention_fn, reference, *make_qkv(), normal(4, *bias_shape))


@pytest.mark.parametrize("kv_len", [T - 4, T, S])
def test_causal_is_top_left(kv_len):
    expected = jax.nn.dot_product_attention
    assert_same_values_and_gradients(
        lambda *qkv: attention_fn(*qkv, is_causal=True),
        lambda *qkv: expected(*qkv, is_causal=True),
        *make_qkv(kv_len=kv_len),
    )


def test_causal_with_mask_and_bias():
    mask, bias = random_mask(B, N, T, S), normal(4, B, N, T, S)
    options = {"mask": mask, "bias": bias, "is_causal": True}
    assert_same_values_and_gradients(
        lambda *qkv: attention_fn(*qkv, **options), lambda *qkv: nnx.dot_product_attention(*qkv, **options), *make_qkv()
    )


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_query_heads(kv_heads):
    mask = random_mask(B, N, T, S)
    assert_same_values_and_gradients(
        lambda *qkv: attention_fn(*qkv, mask=mask),
        lambda *qkv: nnx.dot_product_attention(*qkv, mask=mask),
        *make_qkv(kv_heads),
    )


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_batch_axes(batch):
    mask = random_mask(*batch, 1, T, S)
    assert_same_values_and_gradients(
        lambda *qkv: attention_fn(*qkv, mask=mask),
        lambda *qkv: flax.linen.dot_product_attention(*qkv, mask=mask),
        *make_qkv(batch=batch),
    )


def test_query_without_keys_gives_zero():
    mask = random_mask(B, 1, T, S).at[1, :, 5].set(False)
    out = attention_fn(*make_qkv(), mask=mask)
    assert (out[1, 5] == 0).all() and (out[0, 5] != 0).any()


def test_dtype_casts_the_inputs():
    qkv = make_qkv()
    out = attention_fn(*qkv, dtype=jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, attention_fn(*(x.astype(jnp.bfloat16) for x in qkv)))
    assert_close(out.astype(jnp.float32), attention_fn(*qkv), 0.03)


def test_mixed_dtypes_are_promoted():
    q, k, v = make_qkv()
    out = attention_fn(q.astype(jnp.bfloat16), k, v)
    assert_close(out, attention_fn(q.astype(jnp.bfloat16).astype(jnp.float32), k, v))


def test_promote_dtype_is_called_as_nnx_calls_it():
    def promote(args, /, *, dtype=None):
        assert dtype == jnp.float16 and isinstance(args, tuple)
        return tuple(x.astype(jnp.bfloat16) for x in args)

    assert attention_fn(*make_qkv(), dtype=jnp.float16, promote_dtype=promote).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "precision", [None, "highest", "float32", jax.lax.Precision.HIGH, (jax.lax.Precision.HIGHEST,) * 2], ids=str
)
def test_precisions_and_float32_softmax_change_nothing(precision):
    out = attention_fn(*make_qkv(), precision=precision, force_fp32_for_softmax=True)
    np.testing.assert_array_equal(out, attention_fn(*make_qkv()))


# --- attention_fn: dropout ------------------------------------------------------------------------------------------


def dropped_weights(rate, seed=5, **options):
    """The attention weights ``[B, N, T, S]`` after dropout: the output for values that are the identity."""
    q, k = normal(0, 3, 64, N, H) * 0.1, normal(1, 3, 96, N, H) * 0.1
    v = jnp.broadcast_to(jnp.eye(96)[:, None], (3, 96, N, 96))
    out = attention_fn(q, k, v, dropout_rate=rate, dropout_rng=jax.random.key(seed), **options)
    return np.asarray(out).transpose(0, 2, 1, 3)


@pytest.mark.parametrize("broadcast", [True, False])
def test_dropout_statistics(broadcast):
    rate = 0.25
    plain, dropped = dropped_weights(0.0), dropped_weights(rate, broadcast_dropout=broadcast)
    independent = dropped[0, 0] if broadcast else dropped
    spread = 5 * np.sqrt(rate * (1 - rate) / independent.size)
    assert abs((independent == 0).mean() - rate) < spread
    kept = dropped != 0
    # Rates are honoured to within one part in 256 of the weights that stay.
    np.testing.assert_allclose(dropped[kept], plain[kept] / (1 - rate), rtol=1 / 256)
    np.testing.assert_array_equal(dropped, dropped_weights(rate, broadcast_dropout=broadcast))
    assert (dropped != dropped_weights(rate, seed=6, broadcast_dropout=broadcast)).any()


def test_broadcast_dropout_shares_one_mask():
    shared = dropped_weights(0.5) == 0  # As in Flax, sharing is the default.
    assert (shared == shared[:1, :1]).all()
    own = dropped_weights(0.5, broadcast_dropout=False) == 0
    for b, n in [(0, 1), (1, 0), (2, 3)]:
        assert 0.4 < (own[b, n] == own[0, 0]).mean() < 0.6


def test_deterministic_switches_dropout_off():
    off = dropped_weights(0.5, deterministic=True)
    np.testing.assert_array_equal(off, dropped_weights(0.0))


def test_dropout_gradients_use_the_mask_of_the_forward():
    q, k, v = make_qkv()

    def fn(v):
        return attention_fn(q, k, v, dropout_rate=0.5, dropout_rng=jax.random.PRNGKey(0)).sum()

    # The output is linear in the values, so it equals the inner product of the values with their gradient.
    assert_close((jax.grad(fn)(v) * v).sum(), fn(v), 1e-3)


# --- attention_fn: what cannot be honoured --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"module": object()}, NotImplementedError, "expected module=None, received object: .* never formed"),
        (
            {"einsum_dot_general": jax.lax.dot_general},
            NotImplementedError,
            "expected einsum_dot_general=None, received",
        ),
        ({"qk_attn_weights_einsum": jnp.einsum}, NotImplementedError, "expected qk_attn_weights_einsum=None"),
        ({"attn_weights_value_einsum": jnp.einsum}, NotImplementedError, "expected attn_weights_value_einsum=None"),
        (
            {"precision": "BF16_BF16_F32_X3"},
            NotImplementedError,
            "expected precision to be None .* 'BF16_BF16_F32_X3'",
        ),
        (
            {"precision": jax.lax.DotAlgorithmPreset.F16_F16_F16},
            NotImplementedError,
            "expected precision to be None .*F16_F16_F16",
        ),
        ({"dropout_rate": 0.1}, ValueError, "expects dropout_rng to be a JAX key, received None"),
        ({"dropout_rate": 1.5, "dropout_rng": jax.random.key(0)}, ValueError, "dropout_rate"),
        ({"mask": jnp.ones((B, 1, T, S + 1))}, ValueError, "mask"),
        ({"mask": jnp.ones((1, B, 1, T, S))}, ValueError, "mask"),
        ({"bias": jnp.ones((B, N, T + 1, S))}, ValueError, "bias"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_what_cannot_be_honoured_raises(options, error, message):
    with pytest.raises(error, match=message):
        attention_fn(*make_qkv(), **options)


# --- attention_fn in Flax's layer -----------------------------------------------------------------------------------


def flax_layer(fn=None, **options):
    if fn is not None:
        options["attention_fn"] = fn
    return nnx.MultiHeadAttention(N, F, **{"decode": False, "rngs": nnx.Rngs(0)} | options)


TAKES_IS_CAUSAL = "is_causal" in inspect.signature(nnx.MultiHeadAttention.__call__).parameters  # Not in 0.12.6.


@pytest.mark.parametrize("call", ["plain", "causal", "mask", "cross", "heads"])
def test_in_flax_layer(call):
    if call == "causal" and not TAKES_IS_CAUSAL:
        pytest.skip("this Flax's layer has no is_causal")
    x = normal(0, B, T, F)
    options = {"num_kv_heads": 2} if call == "heads" else {}
    kwargs = {"causal": {"is_causal": True}, "mask": {"mask": nnx.make_causal_mask(x[..., 0])}}.get(call, {})
    inputs = (x, normal(1, B, S, F)) if call == "cross" else (x,)

    def loss(layer):
        return (layer(*inputs, **kwargs) ** 2).mean()

    results = [nnx.jit(nnx.value_and_grad(loss))(flax_layer(fn, **options)) for fn in (attention_fn, None)]
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        assert_close(ours, theirs, 1e-5)


def test_in_flax_layer_decode_equals_causal_call():
    layer, x = flax_layer(attention_fn, decode=True), normal(0, B, T, F)
    full = layer(x, mask=nnx.make_causal_mask(x[..., 0]), decode=False)
    layer.init_cache(x.shape)
    steps = [layer(x[:, t : t + 1]) for t in range(T)]
    assert_close(jnp.concatenate(steps, 1), full)


def test_in_flax_layer_dropout():
    layer, x = flax_layer(attention_fn, dropout_rate=0.5, deterministic=False), normal(0, B, T, F)
    first, second = layer(x), layer(x)
    assert (first != second).any()
    assert_close(layer(x, deterministic=True), flax_layer()(x))


def test_in_flax_layer_sow_weights_raises():
    with pytest.raises(NotImplementedError, match="received MultiHeadAttention"):
        flax_layer(attention_fn)(normal(0, B, T, F), sow_weights=True)


def test_in_flax_layer_dtype():
    layer = flax_layer(attention_fn, dtype=jnp.bfloat16)
    out = layer(normal(0, B, T, F))
    assert out.dtype == jnp.bfloat16
    assert_close(out.astype(jnp.float32), flax_layer()(normal(0, B, T, F)), 0.05)


# --- SelfAttention --------------------------------------------------------------------------------------------------


def plain_self_attention(params, x, *, is_causal=False, window=None, soft_cap=None, segment_ids=None):
    """The layer in plain jnp, from ``params`` ``{query: {kernel, bias}, ...}`` and ``x`` ``[..., T, F]``."""

    def project(name, equation):
        return jnp.einsum(equation, x, params[name]["kernel"]) + params[name]["bias"]

    q, k, v = (project(name, "...tf,fnh->...tnh") for name in ("query", "key", "value"))
    k, v = (jnp.repeat(a, q.shape[-2] // a.shape[-2], axis=-2) for a in (k, v))
    scores = jnp.einsum("...tnh,...snh->...nts", q, k) / np.sqrt(q.shape[-1])
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    i, j = jnp.arange(x.shape[-2])[:, None], jnp.arange(x.shape[-2])
    left, right = (len(j), len(j)) if window is None else window
    visible = (i - left <= j) & (j <= i + (0 if is_causal else right))
    if segment_ids is not None:
        visible &= (segment_ids[..., :, None] == segment_ids[..., None, :])[..., None, :, :]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
    out = jnp.einsum("...nts,...snh->...tnh", weights, v)
    return jnp.einsum("...tnh,nhf->...tf", out, params["out"]["kernel"]) + params["out"]["bias"]


def make_layer(**options):
    layer = SelfAttention(N, F, **{"rngs": nnx.Rngs(0)} | options)
    for leaf in (layer.query, layer.key, layer.value, layer.out):  # Biases of 0 would not be tested.
        if leaf.bias is not None:
            leaf.bias[...] = normal(7, *leaf.bias.shape, dtype=leaf.bias.dtype)
    return layer


def params_of(layer):
    return nnx.to_pure_dict(nnx.state(layer, nnx.Param))


CASES = {
    "full": ({}, {}),
    "causal": ({"is_causal": True}, {"is_causal": True}),
    "window": ({"local_window_size": (5, 2)}, {"window": (5, 2)}),
    "causal_window": ({"is_causal": True, "local_window_size": 3}, {"is_causal": True, "window": (3, 0)}),
    "grouped": ({"num_kv_heads": 2, "is_causal": True}, {"is_causal": True}),
    "multi_query": ({"num_kv_heads": 1}, {}),
    "soft_cap": ({"logits_soft_cap": 2.0}, {"soft_cap": 2.0}),
    "head_dim": ({"head_dim": 24}, {}),
}


@pytest.mark.parametrize(("options", "plain_options"), CASES.values(), ids=CASES)
def test_layer_equals_plain_jnp(options, plain_options):
    layer, x = make_layer(**options), normal(0, B, T, F)

    def loss(layer, x):
        out = layer(x)
        return (out**2).mean(), out

    def plain_loss(params, x):
        out = plain_self_attention(params, x, **plain_options)
        return (out**2).mean(), out

    (grad_layer, grad_x), out = nnx.jit(nnx.grad(loss, argnums=(0, 1), has_aux=True))(layer, x)
    expected, plain_out = jax.jit(jax.grad(plain_loss, argnums=(0, 1), has_aux=True))(params_of(layer), x)
    assert_close(out, plain_out)
    actual = (nnx.to_pure_dict(grad_layer), grad_x)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), actual, expected)


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_layer_batch_axes(batch):
    layer, x = make_layer(is_causal=True), normal(0, *batch, T, F)
    assert_close(layer(x), plain_self_attention(params_of(layer), x, is_causal=True))


def test_layer_segment_ids():
    layer, x = make_layer(is_causal=True), normal(0, B, T, F)
    segment_ids = jnp.array([[0] * 4 + [1] * (T - 4), [0] * (T - 3) + [2] * 3], jnp.int32)
    expected = plain_self_attention(params_of(layer), x, is_causal=True, segment_ids=segment_ids)
    assert_close(layer(x, segment_ids=segment_ids), expected)


def test_layer_exchanges_parameters_with_flax_layer():
    ours, theirs, x = make_layer(num_kv_heads=2, is_causal=True), flax_layer(num_kv_heads=2), normal(0, B, T, F)
    nnx.update(theirs, nnx.state(ours, nnx.Param))
    assert_close(ours(x), theirs(x, mask=nnx.make_causal_mask(x[..., 0])))


def test_layer_without_bias_has_none():
    layer = make_layer(use_bias=False)
    assert {path[-1] for path, _ in nnx.to_flat_state(nnx.state(layer, nnx.Param))} == {"kernel"}
    assert layer(normal(0, B, T, F)).shape == (B, T, F)


def test_layer_dtypes():
    layer = make_layer(dtype=jnp.bfloat16)
    assert layer(normal(0, B, T, F)).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(params_of(layer))} == {jnp.dtype(jnp.float32)}
    layer.init_cache(B, T)
    assert layer.cached_key.dtype == jnp.bfloat16
    assert make_layer(param_dtype=jnp.bfloat16).query.kernel.dtype == jnp.bfloat16


def test_layer_dropout_obeys_train_and_eval():
    layer, x = make_layer(dropout_rate=0.5), normal(0, B, T, F)
    assert (layer(x) != layer(x)).any()
    expected = plain_self_attention(params_of(layer), x)
    assert_close(layer(x, deterministic=True), expected)
    layer.eval()
    assert_close(layer(x), expected)
    layer.train()
    assert (layer(x) != expected).any()


# --- SelfAttention: decoding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "chunks", "max_length", "options"),
    [
        ((B,), (1,) * T, T, {}),
        ((B,), (1,) * T, T + 10, {"num_kv_heads": 2, "local_window_size": 3}),
        ((B,), (5, 1, 1, 3, 3), T + 10, {}),
        ((B,), (5, 1, 1, 3, 3), T, {"num_kv_heads": 1, "local_window_size": (2, -1), "logits_soft_cap": 3.0}),
        ((), (5, 1, 1, 3, 3), T, {"local_window_size": 4}),
        ((2, 1), (T,), T + 1, {}),
    ],
    ids=str,
)
def test_decode_equals_full_forward(batch, chunks, max_length, options):
    layer, x = make_layer(is_causal=True, **options), normal(0, *batch, T, F)
    step = nnx.jit(lambda layer, x: layer(x, decode=True))
    layer.init_cache(batch, max_length)
    starts = np.cumsum((0, *chunks))
    out = [step(layer, x[..., a:b, :]) for a, b in itertools.pairwise(starts)]
    assert_close(jnp.concatenate(out, -2), layer(x))
    assert layer.cache_index[...] == T


def test_decode_outside_jit_and_restart():
    layer, x = make_layer(is_causal=True), normal(0, B, T, F)
    full = layer(x)
    for _ in range(2):
        layer.init_cache(B, T)
        assert_close(jnp.concatenate([layer(x[:, :4], decode=True), layer(x[:, 4:], decode=True)], 1), full)


def test_decode_with_a_cache_of_another_dtype():
    layer, x = make_layer(is_causal=True), normal(0, B, T, F)
    layer.init_cache(B, T, jnp.bfloat16)
    out = layer(x, decode=True)
    assert layer.cached_key.dtype == jnp.bfloat16
    assert_close(out, layer(x), 0.05)


def test_decode_never_reads_the_unused_part_of_the_cache():
    layer, x = make_layer(is_causal=True), normal(0, B, T, F)
    layer.init_cache(B, T + 8)
    layer.cached_key[...] = jnp.full_like(layer.cached_key[...], jnp.nan)
    layer.cached_value[...] = jnp.full_like(layer.cached_value[...], jnp.nan)
    assert_close(layer(x, decode=True), layer(x))


def test_decode_past_the_end_raises_where_the_index_is_known():
    layer, x = make_layer(is_causal=True), normal(0, B, T, F)
    layer.init_cache(B, 8)
    layer(x[:, :7], decode=True)
    with pytest.raises(ValueError, match=r"at most max_length - used = 8 - 7 = 1 new tokens, received 2"):
        layer(x[:, :2], decode=True)
    with pytest.raises(ValueError, match=r"at most max_length - used = 8 - 0 = 8 new tokens, received 13"):
        nnx.jit(lambda layer, x: layer(x, decode=True))(layer, x)


def test_decode_past_the_end_under_jit_gives_nan_and_keeps_the_cache():
    layer, x = make_layer(is_causal=True), normal(0, B, T, F)
    step = nnx.jit(lambda layer, x: layer(x, decode=True))
    layer.init_cache(B, 8)
    step(layer, x[:, :7])
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer, nnx.Cache)))
    assert jnp.isnan(step(layer, x[:, :2])).all()
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(layer, nnx.Cache)), before)
    assert_close(step(layer, x[:, 7:8]), layer(x)[:, 7:8])  # What does fit still works.
    assert jnp.isnan(step(layer, x[:, :1])).all()


def test_cached_attention_is_pure_and_takes_options():
    q, k, v = normal(0, B, 3, N, H), normal(1, B, 3, 2, H), normal(2, B, 3, 2, H)
    cache = jnp.zeros((B, 8, 2, H))
    out, new_key, _, index = cached_attention(q, k, v, cache, cache, jnp.int32(0), scale=0.5)
    assert (cache == 0).all() and index == 3
    np.testing.assert_array_equal(new_key[:, :3], k)
    mask = jnp.tril(jnp.ones((1, 1, 3, 3), bool))
    assert_close(out, jax.nn.dot_product_attention(q, k, v, mask=mask, scale=0.5))


def test_cached_attention_rejects_a_cache_of_another_batch():
    q = normal(0, B, 3, N, H)
    with pytest.raises(
        ValueError, match=r"cache of shape .* expects new keys .* of the same batch and heads, received"
    ):
        cached_attention(q, q, q, jnp.zeros((B + 1, 8, N, H)), jnp.zeros((B + 1, 8, N, H)), jnp.int32(0))


# --- SelfAttention: errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, r"num_heads to be a multiple of num_kv_heads, received num_heads=4, num_kv_heads=3"),
        ({"num_heads": 5}, r"in_features to be a multiple of num_heads, received in_features=64, num_heads=5"),
    ],
)
def test_layer_rejects_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        SelfAttention(**{"num_heads": N, "in_features": F, "rngs": nnx.Rngs(0)} | options)


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({}, {"decode": True}, "decode=True expects is_causal=True, received False"),
        ({"is_causal": True}, {"decode": True}, "expects a cache, and there is none. Call init_cache first"),
        (
            {"is_causal": True},
            {"decode": True, "segment_ids": jnp.zeros((B, T), jnp.int32)},
            "decode=True expects segment_ids=None",
        ),
    ],
)
def test_layer_rejects_calls(options, call, message):
    with pytest.raises(ValueError, match=message):
        make_layer(**options)(normal(0, B, T, F), **call)


def test_layer_rejects_features():
    with pytest.raises(ValueError, match=r"expected x of shape \[..., T, 64\] \(in_features\), received \(2, 13, 65\)"):
        make_layer()(normal(0, B, T, F + 1))
