"""flash_attention and dot_product_attention against the reference: every option, dtype and instruction set."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CPU_ONLY, CUDA_ONLY, assert_accurate, assert_close, assert_equal, run_on_cpu

from jax_flash import _core, _reference, dot_product_attention, flash_attention

pytestmark = pytest.mark.usefixtures("device")

# Options of flash_attention beside the same for the reference. Functions of the random generator and the shape.
OPTIONS = {
    "plain": lambda r, s: ({}, {}),
    "causal": lambda r, s: ({"is_causal": True}, {"window": (-1, 0)}),
    "causal_top_left": lambda r, s: (
        {"is_causal": True, "causal_alignment": "top_left"},
        {"window": (-1, 0), "bottom_right": False},
    ),
    "window": lambda r, s: ({"local_window_size": (20, 5)}, {"window": (20, 5)}),
    "window_left": lambda r, s: ({"local_window_size": (7, -1)}, {"window": (7, -1)}),
    "window_causal": lambda r, s: ({"local_window_size": 33, "is_causal": True}, {"window": (33, 0)}),
    "window_top_left": lambda r, s: (
        {"local_window_size": 9, "causal_alignment": "top_left"},
        {"window": (9, 9), "bottom_right": False},
    ),
    "scale": lambda r, s: both(scale=0.3),
    "softcap": lambda r, s: both(logits_soft_cap=2.5),
    "alibi": lambda r, s: both(alibi_slopes=r.normal(s.heads)),
    "alibi_per_batch": lambda r, s: both(alibi_slopes=r.normal(s.batch, s.heads)),
    "sinks": lambda r, s: both(sinks=r.normal(s.heads)),
    "bias": lambda r, s: both(bias=r.normal(s.batch, s.heads, s.seqlen_q, s.seqlen_kv)),
    "bias_shared_by_batch": lambda r, s: both(bias=r.normal(1, s.heads, s.seqlen_q, s.seqlen_kv)),
    "bias_shared_by_heads": lambda r, s: both(bias=r.normal(s.batch, 1, s.seqlen_q, s.seqlen_kv)),
    "bias_per_key": lambda r, s: both(bias=r.normal(s.batch, 1, 1, s.seqlen_kv)),
    "bias_per_query": lambda r, s: both(bias=r.normal(1, 1, s.seqlen_q, 1)),
    "mask": lambda r, s: both(mask=r.bernoulli(s.batch, 1, s.seqlen_q, s.seqlen_kv)),
    "mask_blocks": lambda r, s: both(mask=jnp.arange(s.seqlen_kv)[None, None, None] // 64 % 2 == 1),
    "lengths": lambda r, s: both(
        query_seq_lengths=r.integers(0, s.seqlen_q, s.batch), key_value_seq_lengths=r.integers(0, s.seqlen_kv, s.batch)
    ),
    "segments": lambda r, s: both(
        query_segment_ids=jnp.sort(r.integers(0, 3, s.batch, s.seqlen_q)),
        key_value_segment_ids=jnp.sort(r.integers(0, 3, s.batch, s.seqlen_kv)),
    ),
    "everything": lambda r, s: (
        {"is_causal": True, "local_window_size": (60, 0)} | (extra := everything(r, s)),
        {"window": (60, 0)} | extra,
    ),
}


def both(**options):
    return options, options


def everything(r, s):
    return {
        "scale": 0.2,
        "logits_soft_cap": 4.0,
        "alibi_slopes": 0.05 * r.normal(s.heads),
        "sinks": r.normal(s.heads),
        "bias": r.normal(s.batch, 1, s.seqlen_q, s.seqlen_kv),
        "mask": r.bernoulli(1, s.heads, s.seqlen_q, s.seqlen_kv, p=0.8),
        "query_seq_lengths": jnp.full(s.batch, s.seqlen_q - 3, jnp.int32),
        "key_value_seq_lengths": jnp.full(s.batch, s.seqlen_kv - 2, jnp.int32),
        "query_segment_ids": jnp.zeros((s.batch, s.seqlen_q), jnp.int32),
        "key_value_segment_ids": jnp.sort(r.integers(0, 1, s.batch, s.seqlen_kv)),
    }


class Shape:
    def __init__(self, batch, seqlen_q, seqlen_kv, heads, heads_kv, dim, dim_v=None):
        self.batch, self.seqlen_q, self.seqlen_kv = batch, seqlen_q, seqlen_kv
        self.heads, self.heads_kv, self.dim, self.dim_v = heads, heads_kv, dim, dim_v or dim

    def qkv(self, rng, dtype):
        return rng.qkv(
            self.batch, self.seqlen_q, self.seqlen_kv, self.heads, self.heads_kv, self.dim, self.dim_v, dtype=dtype
        )


SHAPES = {
    "odd": Shape(2, 77, 131, 4, 2, 24, 40),
    "blocks": Shape(1, 128, 192, 2, 1, 64),
    "more_queries": Shape(2, 150, 67, 2, 2, 8),
}


def value_and_gradients(attend, arrays, cotangents):
    """(out, lse) and the gradients of all of ``arrays`` (a dict) for random cotangents of out and lse."""
    (out, lse), vjp = jax.vjp(attend, arrays)
    d_out, d_lse = cotangents
    # lse is -inf in rows that see no key: there its cotangent has nothing to act on.
    return out, lse, vjp((d_out.astype(out.dtype), jnp.where(jnp.isinf(lse), 0, d_lse).astype(lse.dtype)))[0]


def check_against_reference(rng, shape, options, dtype):
    ours, reference = options(rng, shape)
    q, k, v = shape.qkv(rng, dtype)
    arrays = {"query": q, "key": k, "value": v} | {n: ours[n] for n in ("bias", "sinks") if n in ours}
    cotangents = (
        rng.normal(*q.shape[:-1], v.shape[-1], dtype=dtype),
        rng.normal(shape.batch, shape.heads, shape.seqlen_q),
    )

    def flash(arrays):
        return flash_attention(**ours | arrays, return_lse=True)

    def plain(arrays, dtype):
        return _reference.attention(**reference | arrays, dtype=dtype)[:2]

    def run(attend):
        return jax.jit(lambda a, c: value_and_gradients(attend, a, c))

    actual = run(flash)(arrays, cotangents)
    high = run_on_cpu(run(lambda a: plain(a, jnp.float32)), arrays, cotangents)
    low = high if dtype == jnp.float32 else run_on_cpu(run(lambda a: plain(a, dtype)), arrays, cotangents)
    return actual, high, low


@CPU_ONLY
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float32(rng, shape, option):
    actual, expected, _ = check_against_reference(rng, SHAPES[shape], OPTIONS[option], jnp.float32)
    assert_close(actual[1], expected[1], 1e-5)
    assert_close(actual, expected, 1e-4)


@CPU_ONLY
@pytest.mark.parametrize("full", list(itertools.product([True, False], repeat=4)), ids=str)
@pytest.mark.parametrize("shape", ["odd", "more_queries"])
def test_every_broadcast_of_a_bias(rng, shape, full):
    """Over batch entries, heads, queries and keys."""

    def options(r, s):
        sizes = (s.batch, s.heads, s.seqlen_q, s.seqlen_kv)
        bias = r.normal(*(size if x else 1 for size, x in zip(sizes, full, strict=True)))
        return {"bias": bias, "is_causal": True}, {"bias": bias, "window": (-1, 0)}

    actual, expected, _ = check_against_reference(rng, SHAPES[shape], options, jnp.float32)
    assert_close(actual, expected, 1e-4)


def check_low_precision(rng, shape, option, dtype):
    (out, lse, grads), high, low = check_against_reference(rng, shape, OPTIONS[option], dtype)
    factor = 3.0 if option in ("softcap", "everything") else 2.0
    assert out.dtype == dtype and lse.dtype == jnp.float32
    assert_accurate(out, high[0], low[0], factor)
    assert_close(lse, high[1], 1e-3, gpu_tolerance=1e-3)
    for name, gradient in grads.items():
        assert gradient.dtype == (dtype if name in ("query", "key", "value") else jnp.float32)
        assert_accurate(gradient, high[2][name], low[2][name], factor)


DTYPES = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])


@CPU_ONLY
@DTYPES
@pytest.mark.parametrize("option", ["plain", "causal", "softcap", "sinks", "bias", "everything"])
def test_low_precision(rng, option, dtype):
    check_low_precision(rng, SHAPES["odd"], option, dtype)


@CUDA_ONLY
@DTYPES
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_low_precision_of_every_option(rng, shape, option, dtype):
    """The whole matrix of ``test_float32``, in what the GPU's kernels take."""
    check_low_precision(rng, SHAPES[shape], option, dtype)


@CPU_ONLY
@pytest.mark.parametrize("instruction_set", _core.instruction_sets())
@pytest.mark.parametrize("option", ["plain", "everything"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["float32", "bfloat16", "float16"])
def test_instruction_sets(rng, instruction_set, option, dtype):
    """Each build that the processor can run gives the reference's result."""
    _core.use_instruction_set(instruction_set)
    try:
        actual, expected, low = check_against_reference(rng, SHAPES["odd"], OPTIONS[option], dtype)
    finally:
        _core.use_instruction_set(_core.instruction_sets()[0])
    if dtype == jnp.float32:
        assert_close(actual, expected, 1e-4)
    else:
        assert_accurate(actual[0], expected[0], low[0], 3.0)


@CPU_ONLY
@pytest.mark.parametrize("seqlen", [16, 300], ids=["one thread", "threads"])
def test_subnormal_float16(rng, seqlen):
    """Gradients of a mean are subnormal float16; XLA's threads flush subnormal float32 to zero, these must not be."""
    q, k, v = rng.qkv(1, seqlen, seqlen, dtype=jnp.float16)
    d_out = (3e-5 * rng.normal(*q.shape)).astype(jnp.float16)
    actual = jax.vjp(flash_attention, q, k, v)[1](d_out)
    wide = [x.astype(jnp.float32) for x in (q, k, v, d_out)]
    expected = jax.vjp(flash_attention, *wide[:3])[1](wide[3])
    assert float(jnp.abs(expected[2]).max()) > 1e-6
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=0.01, atol=1e-7), actual, expected)


@pytest.mark.parametrize("cap", [50.0, 1e3, 1e6])
def test_large_soft_cap(rng, cap):
    """Far from the cap the scores are what they are without one."""
    q, k, v = rng.qkv(seqlen_kv=100)
    capped = flash_attention(q, k, v, logits_soft_cap=cap, return_lse=True)
    expected = run_on_cpu(lambda *qkv: _reference.attention(*qkv, logits_soft_cap=cap)[:2], q, k, v)
    assert_close(capped[1], expected[1], 1e-5)
    assert_close(capped[0], expected[0], 1e-5)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_row_that_sees_no_key_beside_nan(rng, cap):
    """Such a row is 0, and so is its gradient, though other rows of its tile see a key that is NaN."""
    q, k, v = rng.qkv()
    mask = jnp.ones((1, 1, 24, 24), bool).at[:, :, 3].set(False)
    poison = jnp.zeros((2, 24, 2, 1), k.dtype).at[:, 5].set(jnp.nan)

    def attend(q):
        return flash_attention(q, k + poison, v + poison, mask=mask, logits_soft_cap=cap, return_lse=True)

    (out, lse), vjp = jax.vjp(attend, q)
    (dq,) = vjp((jnp.ones_like(out), jnp.zeros_like(lse)))
    np.testing.assert_array_equal(out[:, 3], 0)
    np.testing.assert_array_equal(lse[:, :, 3], -np.inf)
    np.testing.assert_array_equal(dq[:, 3], 0)
    assert bool(jnp.isnan(out[:, 4]).all())


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="no instruction set"):
        _core.use_instruction_set("mmx")


@CPU_ONLY
@pytest.mark.parametrize("dim", [1, 3, 8, 16, 17, 64, 80, 96, 128, 200, 256])
def test_head_dims(rng, dim):
    shape = Shape(1, 70, 66, 2, 1, dim, max(1, 256 - dim))
    actual, expected, _ = check_against_reference(rng, shape, OPTIONS["causal"], jnp.float32)
    assert_close(actual, expected, 1e-4)


HEAD_DIMS = [(n, n) for n in (1, 8, 17, 24, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 255, 256)]
HEAD_DIMS += [(192, 128), (64, 256), (256, 64), (128, 192), (96, 32), (40, 59), (24, 80), (255, 1), (1, 255)]
HEAD_DIMS += [(32, 256), (96, 192)]


@CUDA_ONLY
@DTYPES
@pytest.mark.parametrize("option", ["plain", "causal", "window_causal", "everything"])
@pytest.mark.parametrize("dims", HEAD_DIMS, ids=lambda dims: "{}-{}".format(*dims))
def test_low_precision_head_dims(rng, dims, option, dtype):
    """More than one tile of queries and keys, the last one ragged, at every tile width and between them."""
    check_low_precision(rng, Shape(2, 203, 277, 4, 2, *dims), option, dtype)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 3)])
def test_leading_axes(rng, batch):
    """Any number of batch axes, with arguments per batch shaped likewise."""
    q, k, v = rng.qkv(batch, 20, 30)
    bias = rng.normal(*(1,) * len(batch), 4, 20, 30)
    lengths = rng.integers(1, 30, *batch)
    out, lse = flash_attention(q, k, v, bias=bias, key_value_seq_lengths=lengths, return_lse=True)
    flat = [x.reshape(-1, *x.shape[-3:]) for x in (q, k, v)]
    expected = flash_attention(
        *flat, bias=bias.reshape(1, 4, 20, 30), key_value_seq_lengths=lengths.reshape(-1), return_lse=True
    )
    assert out.shape == (*batch, 20, 4, 16) and lse.shape == (*batch, 4, 20)
    assert_equal((out.reshape(-1, 20, 4, 16), lse.reshape(-1, 4, 20)), expected)


def test_grouped_heads_pair_as_documented(rng):
    """Query head n uses key head n // (N / K)."""
    q, k, v = rng.qkv(heads=6, heads_kv=2)
    repeated = (jnp.repeat(x, 3, axis=-2) for x in (k, v))
    assert_close(flash_attention(q, k, v), flash_attention(q, *repeated))


@CPU_ONLY
def test_float64_reference_agrees(rng):
    """The reference itself, against float64: its float32 error is far below what the tests allow."""
    q, k, v = rng.qkv(seqlen_kv=100)
    with jax.enable_x64(True):
        exact = _reference.attention(q, k, v, dtype=jnp.float64)[0]
    assert_close(flash_attention(q, k, v), exact, 1e-5)


JAX_NN_OPTIONS = {
    "plain": lambda r: {},
    "causal": lambda r: {"is_causal": True},
    "window": lambda r: {"local_window_size": (4, 2)},
    "window_int": lambda r: {"local_window_size": 3},
    "scale": lambda r: {"scale": 0.5},
    "bias": lambda r: {"bias": r.normal(2, 4, 24, 30)},
    "bias_2d": lambda r: {"bias": r.normal(24, 30)},
    "mask": lambda r: {"mask": r.bernoulli(2, 1, 24, 30).at[..., 0].set(True)},
    "lengths": lambda r: {
        "query_seq_lengths": jnp.array([24, 7], jnp.int32),
        "key_value_seq_lengths": jnp.array([5, 30], jnp.int32),
    },
}


@pytest.mark.parametrize("option", JAX_NN_OPTIONS)
def test_dot_product_attention_is_jax_nn(rng, option):
    q, k, v = rng.qkv(seqlen_kv=30)
    options = JAX_NN_OPTIONS[option](rng)

    def gradients(attend):
        out = attend(q, k, v, **options)
        return out, jax.grad(lambda q, k, v: jnp.sin(attend(q, k, v, **options)).sum(), (0, 1, 2))(q, k, v)

    assert_close(gradients(dot_product_attention), gradients(jax.nn.dot_product_attention))


@pytest.mark.parametrize("rank", [3, 4])
def test_dot_product_attention_residual_and_rank(rng, rank):
    q, k, v = rng.qkv(batch=(2,) if rank == 4 else ())
    bias = rng.normal(1, 4, 24, 24)
    actual = dot_product_attention(q, k, v, bias, is_causal=True, return_residual=True)
    expected = jax.nn.dot_product_attention(q, k, v, bias, is_causal=True, return_residual=True)
    assert_close(actual, expected)


def test_dot_product_attention_masked_row_is_zero(rng):
    """The documented difference: jax.nn gives the mean of the values."""
    q, k, v = rng.qkv()
    mask = jnp.ones((1, 1, 24, 24), bool).at[:, :, 3].set(False)
    out = dot_product_attention(q, k, v, mask=mask)
    np.testing.assert_array_equal(out[:, 3], 0)
    assert_close(out.at[:, 3].set(0), jax.nn.dot_product_attention(q, k, v, mask=mask).at[:, 3].set(0))
