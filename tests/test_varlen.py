"""flash_attention_varlen against the reference, sequence by sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_accurate, assert_close, assert_equal, kernel_dtype, run_on_cpu

from jax_flash import _reference, flash_attention, flash_attention_varlen

pytestmark = pytest.mark.usefixtures("device")

LENGTHS = {
    "mixed": ([5, 0, 70, 1, 33], [9, 4, 131, 0, 20]),
    "equal": ([64, 64], [64, 64]),
    "one": ([90], [70]),
    "none": ([], []),
}


def offsets(lengths):
    return jnp.asarray(np.concatenate([[0], np.cumsum(lengths)]), jnp.int32)


def starts_to_rows(lengths, total):
    """Row of each [sequence, position] in the packed array, and which of them exist."""
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1].astype(int)
    position = np.arange(max(lengths))
    return np.minimum(starts[:, None] + position, total - 1), position < np.asarray(lengths)[:, None]


def reference_attention(q, k, v, lengths_q, lengths_kv, used=None, dtype=jnp.float32, **options):
    """(out, lse) from the reference on a padded batch; rows behind the last sequence are 0 and -inf."""
    out = jnp.zeros((*q.shape[:2], v.shape[-1]), dtype)
    lse = jnp.full(q.shape[:2], -jnp.inf, dtype)
    if lengths_q:
        rows_q, exists = starts_to_rows(lengths_q, q.shape[0])
        rows_kv, _ = starts_to_rows(lengths_kv, k.shape[0])
        options["query_seq_lengths"] = jnp.asarray(lengths_q)
        options["key_value_seq_lengths"] = jnp.asarray(lengths_kv if used is None else used)
        padded_out, padded_lse, _ = _reference.attention(q[rows_q], k[rows_kv], v[rows_kv], dtype=dtype, **options)
        out = out.at[rows_q[exists]].set(padded_out[exists])
        lse = lse.at[rows_q[exists]].set(padded_lse.swapaxes(1, 2)[exists])
    return out, lse.T


OPTIONS = {
    "plain": ({}, {}),
    "causal": ({"is_causal": True}, {"window": (-1, 0)}),
    "causal_top_left": (
        {"is_causal": True, "causal_alignment": "top_left"},
        {"window": (-1, 0), "bottom_right": False},
    ),
    "window": ({"local_window_size": (12, 3)}, {"window": (12, 3)}),
    "softcap": ({"logits_soft_cap": 3.0},) * 2,
    "alibi": ({"alibi_slopes": jnp.float32([0.1, 0.2, 0.3, 0.4])},) * 2,
    "sinks": ({"sinks": jnp.float32([0.1, -1.0, 2.0, 0.0])},) * 2,
}


def value_and_gradients(attend, arrays, d_out, d_lse):
    (out, lse), vjp = jax.vjp(attend, *arrays)
    return out, lse, vjp((d_out.astype(out.dtype), jnp.where(jnp.isinf(lse), 0, d_lse).astype(lse.dtype)))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    ("lengths", "dtype"), [*((lengths, jnp.float32) for lengths in LENGTHS), ("mixed", jnp.bfloat16)]
)
def test_against_reference(rng, option, lengths, dtype):
    lengths_q, lengths_kv = LENGTHS[lengths]
    ours, reference = OPTIONS[option]
    rest, dtype = 6, kernel_dtype(dtype)
    q, k, v = rng.qkv((), sum(lengths_q) + rest, sum(lengths_kv) + rest, dim=24, dim_v=16, dtype=dtype)
    d_out, d_lse = rng.normal(q.shape[0], 4, 16), rng.normal(4, q.shape[0])
    longest = {"max_seqlen_q": max(lengths_q, default=0), "max_seqlen_kv": max(lengths_kv, default=0)}

    @jax.jit
    def flash(q, k, v, offsets_q, offsets_kv):
        def attend(q, k, v):
            return flash_attention_varlen(q, k, v, offsets_q, offsets_kv, **longest, **ours, return_lse=True)

        return value_and_gradients(attend, (q, k, v), d_out, d_lse)

    def plain(dtype):
        def attend(q, k, v):
            return reference_attention(q, k, v, lengths_q, lengths_kv, dtype=dtype, **reference)

        return run_on_cpu(jax.jit(lambda *arrays: value_and_gradients(attend, *arrays)), (q, k, v), d_out, d_lse)

    actual, high = flash(q, k, v, offsets(lengths_q), offsets(lengths_kv)), plain(jnp.float32)
    if dtype == jnp.float32:
        assert_close(actual, high, 1e-4)
        return
    low = plain(dtype)
    factor = 3.0 if option == "softcap" else 2.0
    assert_accurate(actual[0], high[0], low[0], factor)
    assert_close(actual[1], high[1], 1e-3, gpu_tolerance=1e-3)
    jax.tree.map(lambda a, h, lo: assert_accurate(a, h, lo, factor), actual[2], high[2], low[2])


def test_alibi_slopes_per_sequence(rng):
    lengths_q, lengths_kv = LENGTHS["mixed"]
    q, k, v = rng.qkv((), sum(lengths_q), sum(lengths_kv))
    slopes = rng.normal(5, 4)
    actual = flash_attention_varlen(
        q,
        k,
        v,
        offsets(lengths_q),
        offsets(lengths_kv),
        max_seqlen_q=70,
        max_seqlen_kv=131,
        alibi_slopes=slopes,
        return_lse=True,
    )
    expected = run_on_cpu(
        lambda q, k, v, slopes: reference_attention(q, k, v, lengths_q, lengths_kv, alibi_slopes=slopes),
        *(q, k, v, slopes),
    )
    assert_close(actual, expected)


def test_seqused_kv(rng):
    """Only the first keys of each sequence count, for alignment too; the rest may be NaN and gets gradient 0."""
    lengths_q, lengths_kv, used = [20, 10, 5], [30, 40, 8], [25, 0, 8]
    q, k, v = rng.qkv((), 35, 78)
    unused = jnp.concatenate([jnp.arange(n) >= u for n, u in zip(lengths_kv, used, strict=True)])[:, None, None]
    k, v = (jnp.where(unused, jnp.nan, x) for x in (k, v))
    d_out, d_lse = rng.normal(35, 4, 16), rng.normal(4, 35)

    def flash(q, k, v):
        return flash_attention_varlen(
            q, k, v, offsets(lengths_q), offsets(lengths_kv), max_seqlen_q=20, max_seqlen_kv=40,
            seqused_kv=jnp.array(used, jnp.int32), is_causal=True, return_lse=True,
        )  # fmt: skip

    def plain(q, k, v):
        return reference_attention(q, k, v, lengths_q, lengths_kv, used, window=(-1, 0))

    actual, expected = (
        jax.jit(lambda *arrays, attend=attend: value_and_gradients(attend, arrays, d_out, d_lse))(q, k, v)
        for attend in (flash, plain)
    )
    assert_close(actual, expected, 1e-4)
    np.testing.assert_array_equal(jnp.where(unused, actual[2][1], 0), 0)


def test_equal_lengths_are_dense(rng):
    """The same bits as the dense call: one kernel serves both."""
    q, k, v = rng.qkv(batch=3, seqlen_q=64, seqlen_kv=64)
    flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    at = jnp.arange(4, dtype=jnp.int32) * 64
    packed = flash_attention_varlen(*flat, at, at, max_seqlen_q=64, max_seqlen_kv=64, is_causal=True)
    assert_equal(packed.reshape(q.shape), flash_attention(q, k, v, is_causal=True))
