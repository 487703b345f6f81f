"""Hostile input: NaN in padding, extreme scores, empty axes, values out of range, misuse of the custom calls, load."""

from __future__ import annotations

import concurrent.futures
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CPU_ONLY, assert_close, assert_equal, kernel_dtype, run_on_cpu

from jax_flash import flash_attention, flash_attention_varlen, paged_attention
from jax_flash._attrs import OPERANDS, Attrs, ffi_attributes
from jax_flash._reference import attention

pytestmark = pytest.mark.usefixtures("device")

NAN, INF = float("nan"), float("inf")
INT_MIN, INT_MAX = -(2**31), 2**31 - 1


def ints(*values) -> jax.Array:
    return jnp.array(values, jnp.int32)


def run(call, *arrays, cotangents):
    """Results of ``call(*arrays)``, which are (out, lse), and the gradients of all ``arrays``."""

    @jax.jit
    def run(arrays, cotangents):
        results, vjp = jax.vjp(call, *arrays)
        return results, vjp(jax.tree.map(lambda c, r: c.astype(r.dtype), cotangents, results))

    return run(arrays, cotangents)


def attend(**options):
    """``flash_attention(q, k, v[, bias])`` with its lse; deterministic, so that results can be compared bit by bit."""
    options = {"deterministic": True, "return_lse": True, **options}
    return lambda q, k, v, bias=None: flash_attention(q, k, v, bias=bias, **options)


def run_reference(*arrays, cotangents, **options):
    def call(q, k, v, bias=None):
        return attention(q, k, v, bias=bias, **options)[:2]

    return run_on_cpu(lambda arrays, cotangents: run(call, *arrays, cotangents=cotangents), arrays, cotangents)


def cotangents_of(rng, q, v):
    return rng.normal(*q.shape[:-1], v.shape[-1], dtype=q.dtype), rng.normal(*q.shape[:-3], q.shape[-2], q.shape[-3])


def assert_finite(results) -> None:
    """No NaN and no inf, but for the -inf of an lse; and small, so that memory that was never written is noticed."""
    (out, lse), gradients = results
    assert not np.isnan(lse).any() and (np.asarray(lse) < 1e3).all()
    for x in (out, *gradients):
        assert (np.abs(np.asarray(x, np.float32)) < 1e3).all()


# ---- what lies in padding ----

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "top_left": {"is_causal": True, "causal_alignment": "top_left"},
    "softcap": {"logits_soft_cap": 2.0},
    "window": {"local_window_size": (3, 2)},
    "alibi_and_sinks": {"alibi_slopes": np.array([0.5, 0.25, 1, 2], np.float32), "sinks": np.ones(4, np.float32)},
    "dropout": {"dropout_rate": 0.3, "dropout_key": np.array([1, 2], np.uint32)},
}


def assert_padding_is_not_read(call, arrays, cotangents, used_rows, used_cotangents) -> None:
    """With NaN, inf or zero where ``used`` is False all results are the same, and finite."""

    def filled(x, used, value):
        return jnp.where(used, x, value).astype(x.dtype)

    results = [
        run(
            call,
            *(filled(x, used, value) for x, used in zip(arrays, used_rows, strict=True)),
            cotangents=tuple(filled(x, used, value) for x, used in zip(cotangents, used_cotangents, strict=True)),
        )
        for value in (0, NAN, INF)
    ]
    assert_finite(results[0])
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])
    (out, lse), gradients = results[1]
    for x, used in zip((out, *gradients), (used_cotangents[0], *used_rows), strict=True):
        assert not np.asarray(jnp.where(used, 0, x)).any()  # rows that are not used: output and gradients 0
    assert np.isneginf(np.asarray(lse)[np.broadcast_to(~used_cotangents[1], lse.shape)]).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_unused_rows_past_the_lengths(rng, options, dtype):
    q, k, v = rng.qkv(4, 70, 80, dim=8, dim_v=12, dtype=kernel_dtype(dtype))
    bias = rng.normal(4, 4, 70, 80)
    lengths_q, lengths_kv = ints(70, 0, 5, 66), ints(3, 80, 0, 65)
    call = attend(query_seq_lengths=lengths_q, key_value_seq_lengths=lengths_kv, **options)
    rows = (np.arange(70) < lengths_q[:, None])[:, :, None, None]
    keys = (np.arange(80) < lengths_kv[:, None])[:, :, None, None]
    scores = jnp.swapaxes(rows, 1, 2) & jnp.transpose(keys, (0, 2, 3, 1))
    used_lse = jnp.swapaxes(rows[..., 0], 1, 2)
    if "sinks" not in options:  # where a row is used, a sink is seen even with no key
        used_lse = used_lse & (lengths_kv > 0)[:, None, None]
    used_rows = (rows, keys, keys, scores)
    assert_padding_is_not_read(call, (q, k, v, bias), cotangents_of(rng, q, v), used_rows, (rows, used_lse))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_unused_rows_of_packed_sequences(rng, options):
    """Rows in front of the first sequence, behind the last, and keys behind ``seqused_kv``."""
    q, k, v = (x[0] for x in rng.qkv(1, 100, 110, dim=8, dim_v=12))
    offsets_q, offsets_kv, used_kv = (
        np.array([4, 70, 70, 80, 90]),
        np.array([2, 70, 80, 80, 105]),
        np.array([66, 3, 0, 9]),
    )

    def call(q, k, v):
        return flash_attention_varlen(
            q, k, v, ints(*offsets_q), ints(*offsets_kv), max_seqlen_q=66, max_seqlen_kv=68, seqused_kv=ints(*used_kv),
            deterministic=True, return_lse=True, **options,
        )  # fmt: skip

    rows, keys, sees_a_key = np.zeros(100, bool), np.zeros(110, bool), np.zeros(100, bool)
    for begin_q, end_q, begin_kv, used in zip(offsets_q, offsets_q[1:], offsets_kv, used_kv, strict=False):
        rows[begin_q:end_q] = True
        keys[begin_kv : begin_kv + used] = True
        sees_a_key[begin_q:end_q] = used > 0 or "sinks" in options
    rows, keys = rows[:, None, None], keys[:, None, None]
    assert_padding_is_not_read(call, (q, k, v), cotangents_of(rng, q, v), (rows, keys, keys), (rows, sees_a_key[None]))


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_unused_pages(rng, garbage):
    """Pages of no sequence, the tail of a last page, and invalid indices behind a sequence's length."""
    q, pages = rng.activations(3, 2, 4, 8), rng.activations(2, 9, 4, 2, 8)
    lengths = ints(9, 0, 4)
    table = ints([1, 3, 5, INT_MAX], [INT_MIN, -1, 9, 0], [7, -5, 2**20, 8])
    used = np.zeros((9, 4), bool)
    used[[1, 3, 7]] = True
    used[5, :1] = True
    clean, dirty = (jnp.where(used[..., None, None], pages, x) for x in (0, garbage))
    expected = paged_attention(q, *clean, jnp.clip(table, 0, 8), lengths, return_lse=True)
    actual = paged_attention(q, *dirty, table, lengths, return_lse=True)
    assert_equal(actual, expected)
    assert_finite((actual, ()))
    assert not actual[0][1].any() and np.isneginf(actual[1][1]).all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("operand", [0, 1, 2, 3], ids=["query", "key", "value", "bias"])
def test_nan_stays_in_its_batch_entry_and_head(rng, operand, value):
    arrays = [*rng.qkv(2, 70, 70), rng.normal(2, 4, 70, 70)]
    cotangents = cotangents_of(rng, arrays[0], arrays[2])
    expected = run(attend(), *arrays, cotangents=cotangents)
    at = (1, 2, 9) if operand == 3 else (1, 9, 2 if operand == 0 else 1)  # batch entry 1, query head 2, kv head 1
    arrays[operand] = arrays[operand].at[at].set(value)
    (out, lse), gradients = run(attend(), *arrays, cotangents=cotangents)
    assert (np.asarray(out) != expected[0][0]).any()
    heads = [2] if operand in (0, 3) else [2, 3]

    def without(x, batch_axis, head_axis, heads):
        keep = np.ones(x.shape, bool)
        keep[tuple({batch_axis: 1, head_axis: heads}.get(a, slice(None)) for a in range(x.ndim))] = False
        return np.asarray(x)[keep]

    for x, e in ((out, expected[0][0]), (gradients[0], expected[1][0])):
        assert_equal(without(x, 0, 2, heads), without(e, 0, 2, heads))
    for x, e in ((lse, expected[0][1]), (gradients[3], expected[1][3])):
        assert_equal(without(x, 0, 1, heads), without(e, 0, 1, heads))
    for x, e in zip(gradients[1:3], expected[1][1:3], strict=True):
        assert_equal(without(x, 0, 2, [1]), without(e, 0, 2, [1]))


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("result", ["out", "lse"])
def test_nan_gradient_of_a_row_that_sees_no_key(rng, result, value):
    """Merging partial results by their lse has no derivative at -inf: what arrives there must not spread."""
    q, k, v = rng.qkv(1, 12, 7)  # bottom-right: rows 0..4 see no key
    out, lse = cotangents_of(rng, q, v)
    expected = run(attend(is_causal=True), q, k, v, cotangents=(out, lse))
    poisoned = (out.at[:, :5].set(value), lse) if result == "out" else (out, lse.at[..., :5].set(value))
    actual = run(attend(is_causal=True), q, k, v, cotangents=poisoned)
    assert_finite(actual)
    assert_equal(actual, expected)


# ---- shapes ----


@pytest.mark.parametrize("case", range(12))
def test_head_dims(rng, case):
    """H and D from 1 to 256, odd ones and D != H; the reference's are padded with zeros, so that it compiles once."""
    dims = (1, 2, 3, 5, 15, 17, 31, 63, 65, 96, 100, 127, 129, 192, 200, 255, 256)
    dim, dim_v = dims[case + 5], dims[case % 3 - case]
    q, k, v = rng.qkv(1, 67, 71, dim=dim, dim_v=dim_v)
    cotangents = cotangents_of(rng, q, v)
    actual = run(attend(is_causal=True), q, k, v, cotangents=cotangents)

    def pad(x):
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 256 - x.shape[-1])])

    padded, gradients = run_on_cpu(
        _padded_reference, pad(q), pad(k), pad(v), 1 / dim**0.5, (pad(cotangents[0]), cotangents[1])
    )
    cut = (gradients[0][..., :dim], gradients[1][..., :dim], gradients[2][..., :dim_v])
    assert_close(actual, ((padded[0][..., :dim_v], padded[1]), cut))


@jax.jit
def _padded_reference(q, k, v, scale, cotangents):
    results, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, scale=scale, window=(-1, 0))[:2], q, k, v)
    return results, vjp(jax.tree.map(lambda c, r: c.astype(r.dtype), cotangents, results))


@pytest.mark.parametrize(
    "batch, seqlen_q, seqlen_kv",
    [(2, 1, 1), (2, 1, 97), (2, 97, 1), (1, 131, 127), (1, 64, 65), (2, 5, 0), (2, 0, 5), (0, 5, 5), (2, 0, 0)],
)
@pytest.mark.parametrize("causal", [False, True])
def test_empty_single_and_prime_lengths(rng, batch, seqlen_q, seqlen_kv, causal):
    arrays = (*rng.qkv(batch, seqlen_q, seqlen_kv), rng.normal(1, 4, seqlen_q, seqlen_kv))
    cotangents = cotangents_of(rng, arrays[0], arrays[2])
    actual = run(attend(is_causal=causal), *arrays, cotangents=cotangents)
    expected = run_reference(*arrays, cotangents=cotangents, window=(-1, 0 if causal else -1))
    assert_close(actual, expected)


@pytest.mark.parametrize("total_q, total_kv, num_sequences", [(0, 0, 0), (0, 5, 2), (5, 0, 2), (5, 5, 0), (5, 5, 3)])
def test_empty_packed_sequences(rng, total_q, total_kv, num_sequences):
    q, k, v = (x[0] for x in rng.qkv(1, total_q, total_kv))

    def call(q, k, v):
        offsets = ints(*[0] * (num_sequences + 1))
        return flash_attention_varlen(q, k, v, offsets, offsets, max_seqlen_q=0, max_seqlen_kv=0, return_lse=True)

    (out, lse), gradients = run(call, q, k, v, cotangents=cotangents_of(rng, q, v))
    assert not any(np.asarray(x).any() for x in (out, *gradients))
    assert np.isneginf(lse).all()


@pytest.mark.parametrize(
    "batch, seqlen_q, num_pages, max_pages", [(0, 1, 3, 2), (2, 0, 3, 2), (2, 1, 0, 2), (2, 1, 3, 0), (2, 1, 1, 1)]
)
def test_empty_pages(rng, batch, seqlen_q, num_pages, max_pages):
    q, pages = rng.activations(batch, seqlen_q, 4, 8), rng.activations(2, num_pages, 3, 2, 8)
    results = paged_attention(
        q, *pages, jnp.zeros((batch, max_pages), jnp.int32), jnp.zeros(batch, jnp.int32), return_lse=True
    )
    assert not results[0].any() and np.isneginf(results[1]).all()


SPLIT = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (100, 3)},  # most splits see nothing
    "short": {"key_value_seq_lengths": ints(130)},  # most splits have no keys
}


@pytest.mark.parametrize("bias", [None, (1, 1), (70, 1), (1, 5000)], ids=str)
@pytest.mark.parametrize("options", SPLIT.values(), ids=SPLIT)
def test_split_keys(rng, options, bias):
    """One kv head and many keys: the backward pass splits the keys among the threads."""
    q, k, v = rng.qkv(1, 70, 5000, heads=2, heads_kv=1, dim=8)
    arrays = (q, k, v) if bias is None else (q, k, v, rng.normal(1, 2, *bias))
    cotangents = cotangents_of(rng, q, v)
    left, right = options.get("local_window_size", (-1, 0 if options.get("is_causal") else -1))
    lengths = options.get("key_value_seq_lengths")
    actual = run(attend(**options), *arrays, cotangents=cotangents)
    expected = run_reference(*arrays, cotangents=cotangents, window=(left, right), key_value_seq_lengths=lengths)
    assert_close(actual, expected, 1e-4)


# ---- extreme scores ----


def _biases(shape):
    row = np.zeros(shape, np.float32)
    row[..., 3, :] = -INF
    return {
        "rows_of_minus_inf": row,
        "key_of_minus_inf": np.where(np.arange(shape[-1]) == 5, -INF, 0).astype(np.float32),
        "lowest_float": np.where(np.arange(shape[-1]) % 3 == 0, np.finfo(np.float32).min, 0).astype(np.float32),
        "row_of_inf": np.where(np.isneginf(row), INF, 0).astype(np.float32),
        "one_nan": np.where((np.arange(shape[-1]) == 5) & np.isneginf(row), NAN, 0).astype(np.float32),
        "all_high": np.full(shape, 1e4, np.float32),
        "all_low": np.full(shape, -1e4, np.float32),
        "steps": np.where(np.arange(shape[-1]) % 2, 1e4, -1e4).astype(np.float32),
        "rising": np.linspace(-1e4, 1e4, shape[-1], dtype=np.float32),
        "falling": np.linspace(1e4, -1e4, shape[-1], dtype=np.float32),
    }


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("name", _biases((1, 1, 1, 4, 4)))
def test_extreme_bias(rng, name, softcap):
    q, k, v = rng.qkv(1, 9, 140, dim=8)
    bias = jnp.asarray(np.broadcast_to(_biases((1, 4, 9, 140))[name], (1, 4, 9, 140)))
    cotangents = cotangents_of(rng, q, v)
    actual = run(attend(logits_soft_cap=softcap), q, k, v, bias, cotangents=cotangents)
    expected = run_reference(q, k, v, bias, cotangents=cotangents, logits_soft_cap=softcap)
    for x, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        is_nan = np.isnan(e)
        assert not np.isnan(np.where(is_nan, 0, x)).any()  # no NaN where the reference has none
        assert_close(np.where(is_nan, 0, x), np.where(is_nan, 0, e), 5e-3)  # 1e4 has a rounding error of 1e-3


@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores(rng, sign):
    """Products of +-1e4: one key takes all the weight, and the gradients are those of taking it."""
    q, k, v = rng.qkv(1, 40, 70, heads=2, heads_kv=2, dim=8)
    k = k.at[..., 0].set((sign * jnp.arange(70.0)[None, :, None] * 150).astype(k.dtype))
    q = q.at[..., 0].set(3.0)
    (out, lse), gradients = run(attend(), q, k, v, cotangents=cotangents_of(rng, q, v))
    top = 69 if sign > 0 else 0
    assert_close(out, jnp.broadcast_to(v[:, top, None], out.shape))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) / 8**0.5
    np.testing.assert_allclose(lse, scores.max(-1), rtol=1e-6, atol=1e-3)
    assert all(np.isfinite(g).all() for g in gradients)
    assert not np.delete(np.asarray(gradients[2]), top, axis=1).any()


# ---- values that only the device knows ----

OFFSETS = {
    "decreasing": (0, 60, 20, 40),
    "negative": (-50, -3, 30, 70),
    "too_large": (0, 30, 500, 1000),
    "extremes": (INT_MIN, INT_MAX, INT_MIN, INT_MAX),
    "never_begins": (INT_MAX,) * 4,
    "overlapping": (50, 0, 70, 10),
}


@pytest.mark.parametrize("offsets_kv", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("offsets_q", OFFSETS.values(), ids=OFFSETS)
def test_out_of_range_offsets(rng, offsets_q, offsets_kv):
    """Sequences are clamped to the arrays and to the one before; every row is defined."""
    q, k, v = (x[0] for x in rng.qkv(1, 70, 70))
    clamped = [np.maximum.accumulate(np.clip(x, 0, 70)).tolist() for x in (offsets_q, offsets_kv)]
    cotangents = cotangents_of(rng, q, v)
    results = _run_varlen(q, k, v, ints(*offsets_q), ints(*offsets_kv), ints(INT_MAX, INT_MIN, 5), cotangents)
    assert_finite(results)
    used = ints(70, 0, 5)
    assert_equal(results, _run_varlen(q, k, v, ints(*clamped[0]), ints(*clamped[1]), used, cotangents))
    (out, lse), _ = results
    outside = [*range(clamped[0][0]), *range(clamped[0][-1], 70)]
    assert not np.asarray(out)[outside].any() and np.isneginf(np.asarray(lse)[:, outside]).all()


@jax.jit
def _run_varlen(q, k, v, offsets_q, offsets_kv, used, cotangents):
    def call(q, k, v):
        return flash_attention_varlen(
            q, k, v, offsets_q, offsets_kv, max_seqlen_q=70, max_seqlen_kv=70, seqused_kv=used, is_causal=True,
            deterministic=True, return_lse=True,
        )  # fmt: skip

    results, vjp = jax.vjp(call, q, k, v)
    return results, vjp(cotangents)


def test_out_of_range_lengths(rng):
    q, k, v = rng.qkv(4, 70, 80)
    cotangents = cotangents_of(rng, q, v)
    wild = {"query_seq_lengths": ints(INT_MIN, INT_MAX, 71, 7), "key_value_seq_lengths": ints(8, -1, 81, INT_MAX)}
    tame = {"query_seq_lengths": ints(0, 70, 70, 7), "key_value_seq_lengths": ints(8, 0, 80, 80)}
    results = run(attend(is_causal=True, **wild), q, k, v, cotangents=cotangents)
    assert_finite(results)
    assert_equal(results, run(attend(is_causal=True, **tame), q, k, v, cotangents=cotangents))


def test_out_of_range_pages(rng):
    q, pages = rng.activations(6, 3, 4, 8), rng.activations(2, 5, 16, 2, 8)
    offsets = ints(0, 4, INT_MAX, -7)
    lengths = ints(64, INT_MAX, 17, -1, INT_MIN, 65)
    table = ints(*[[INT_MIN, -1, 5, INT_MAX]] * 6)
    dense = paged_attention(q, *pages, table, lengths, return_lse=True)
    assert_finite((dense, ()))
    assert_equal(dense, paged_attention(q, *pages, jnp.clip(table, 0, 4), jnp.clip(lengths, 0, 64), return_lse=True))
    packed = paged_attention(
        q.reshape(18, 4, 8), *pages, table[:3], lengths[:3], cu_seqlens_q=offsets, max_seqlen_q=14, return_lse=True
    )
    assert_finite((packed, ()))


# ---- the custom calls themselves ----

T, S, N, K, H = 3, 5, 4, 2, 8
F32 = jnp.float32
ACTIVATIONS = ("query", "key", "value", "out", "d_out")
ABSENT = object()


def ones(*shape, dtype=F32):
    return jnp.ones(shape, dtype)


DENSE = (
    "jax_flash_fwd",
    {"query": ones(2, T, N, H), "key": ones(2, S, K, H), "value": ones(2, S, K, H)},
    {"out": ((2, T, N, H), F32), "lse": ((2, N, T), F32), "next_unit": ((2,), jnp.int32)},
)
PACKED = (
    "jax_flash_fwd",
    {"query": ones(T, N, H), "key": ones(S, K, H), "value": ones(S, K, H)},
    {"out": ((T, N, H), F32), "lse": ((N, T), F32), "next_unit": ((), jnp.int32)},
)
BACKWARD = (
    "jax_flash_bwd",
    {**DENSE[1], "out": ones(2, T, N, H), "lse": ones(2, N, T), "d_out": ones(2, T, N, H), "d_lse": ones(2, N, T)},
    {
        "query": ((2, T, N, H), F32),
        "key": ((2, S, K, H), F32),
        "value": ((2, S, K, H), F32),
        "delta": ((2, N, T), F32),
        "dq_accum": ((2, N, T // 16 + 1, 16 * -(-H // 8) * 8), F32),
        "statistics": ((2, N, T // 128 + 1, 256), F32),
        "next_unit": ((2,), jnp.int32),
    },
)
NO_SCRATCH = {"dq_accum": ABSENT, "statistics": ABSENT, "next_unit": ABSENT}
DBIAS = (
    "jax_flash_dbias",
    {**DENSE[1], "bias": ones(1, N, T, S), "lse": ones(2, N, T), "d_out": ones(2, T, N, H), "delta": ones(2, N, T)},
    {"bias": ((1, N, T, S), F32)},
)

# The call, what is wrong with its operands, results and attributes, and what the error must name.
MISUSE = [
    (DENSE, {"query": ABSENT, "key": ABSENT, "value": ABSENT}, {}, {}, "query is missing"),
    (DENSE, {"query": ABSENT}, {}, {}, "query is missing"),
    (DENSE, {"value": ABSENT}, {}, {}, "value is missing"),
    (DENSE, {}, {}, {"operands": np.int32(-1)}, "`operands` attribute"),
    (DENSE, {}, {}, {"operands": np.int32(3)}, "`operands` attribute"),
    (DENSE, {"query": ones()}, {}, {}, "query must have 3 to 11 axes"),
    (DENSE, {"query": ones(*[1] * 12)}, {}, {}, "query must have 3 to 11 axes"),
    (DENSE, {"key": ones()}, {}, {}, "at least 3 axes"),
    (DENSE, {"key": ones(K, H)}, {}, {}, "at least 3 axes"),
    (DENSE, {"key": ones(3, S, K, H)}, {}, {}, "key has size 3 on axis 0, expected 2"),
    (DENSE, {"key": ones(2, S, K, H + 1)}, {}, {}, "key has size 9 on axis 3, expected 8"),
    (DENSE, {"key": ones(2, S, 3, H)}, {}, {}, "multiple of the key's heads"),
    (DENSE, {"key": ones(2, S, 0, H), "value": ones(2, S, 0, H)}, {}, {}, "multiple of the key's heads"),
    (DENSE, {"value": ones(2, S - 1, K, H)}, {}, {}, "value has size 4 on axis 1, expected 5"),
    (DENSE, {"query": ones(2, T, N, 257), "key": ones(2, S, K, 257)}, {}, {}, "at most 256"),
    (DENSE, {"query": ones(2, T, N, H, dtype=jnp.int32)}, {}, {}, "query has an unexpected dtype"),
    (DENSE, {"key": ones(2, S, K, H, dtype=jnp.bfloat16)}, {}, {}, "key has an unexpected dtype"),
    (DENSE, {"mask": ones(2, N, T, S)}, {}, {}, "mask has an unexpected dtype"),
    (DENSE, {"mask": ones(2, N, T, 2, dtype=bool)}, {}, {}, "mask has size 2 on axis 3, expected 5"),
    (DENSE, {"bias": ones(T, S)}, {}, {}, "bias has 2 axes"),
    (DENSE, {"bias": ones(2, 2, T, S)}, {}, {}, "bias has size 2 on axis 1, expected 4"),
    (DENSE, {"alibi_slopes": ones(1, 2)}, {}, {}, "alibi_slopes has size 2"),
    (DENSE, {"sinks": ones(1, N, dtype=jnp.bfloat16)}, {}, {}, "sinks has an unexpected dtype"),
    (DENSE, {"key_value_seq_lengths": ones(2)}, {}, {}, "key_value_seq_lengths has an unexpected dtype"),
    (DENSE, {"query_seq_lengths": ints(1, 2, 3)}, {}, {}, "query_seq_lengths has size 3"),
    (DENSE, {"query_segment_ids": ones(2, T, dtype=jnp.int32)}, {}, {}, "segment ids"),
    (DENSE, {}, {}, {"keep_threshold": np.int32(128)}, "dropout_stream"),
    (DENSE, {}, {}, {"keep_threshold": np.int32(0)}, "keep_threshold"),
    (DENSE, {}, {"lse": ABSENT, "next_unit": ABSENT}, {}, "lse is not among the results"),
    (DENSE, {}, {"out": ((2, T, N, H - 1), F32)}, {}, "out has size 7 on axis 3, expected 8"),
    (DENSE, {}, {"out": ((1, T, N, H), F32)}, {}, "out has size 1 on axis 0, expected 2"),
    (DENSE, {}, {"out": ((2, T, N, H), jnp.bfloat16)}, {}, "out has an unexpected dtype"),
    (DENSE, {}, {"lse": ((2, T, N), F32)}, {}, "lse has size 4 on axis 2, expected 3"),
    (DENSE, {}, {"next_unit": ABSENT}, {"return_softmax": True}, "probs is not among the results"),
    (DENSE, {}, {"next_unit": ABSENT}, {}, "next_unit is not among the results"),
    (DENSE, {}, {}, {"scale": ABSENT}, "attributes"),
    (DENSE, {}, {}, {"scale": "large"}, "decode"),
    (DENSE, {}, {}, {"colour": np.int32(1)}, "attributes"),
    (PACKED, {"cu_seqlens_q": ints(0, 3)[0], "cu_seqlens_kv": ints(0, 5)}, {}, {}, "cu_seqlens_q"),
    (PACKED, {"cu_seqlens_q": ints(), "cu_seqlens_kv": ints()}, {}, {}, "cu_seqlens_q must hold at least one"),
    (PACKED, {"cu_seqlens_q": ones(2), "cu_seqlens_kv": ints(0, 5)}, {}, {}, "cu_seqlens_q has an unexpected dtype"),
    (PACKED, {"cu_seqlens_q": ints(0, 3), "cu_seqlens_kv": ints(0, 1, 5)}, {}, {}, "cu_seqlens_kv has size 3"),
    (PACKED, {"page_table": ints(1)[0]}, {}, {}, "page"),
    (PACKED, {"key": ones(2, 4, K, H), "value": ones(2, 4, K, H), "page_table": ints(1)[0]}, {}, {}, "page_table"),
    (PACKED, {"page_table": ints(1)}, {}, {}, r"key must be \[pages"),
    (PACKED, {"key": ones(2, 0, K, H), "value": ones(2, 0, K, H), "page_table": ints(1)}, {}, {}, "page size"),
    (
        PACKED,
        {"cu_seqlens_q": ints(0, 3), "cu_seqlens_kv": ints(0, 5)},
        {"next_unit": ABSENT, "probs": ((1, N, T, S), F32)},
        {"return_softmax": True, "max_seqlen_q": np.int32(-1), "max_seqlen_kv": np.int32(INT_MAX)},
        "probs has size 5 on axis 3, expected 2147483647",
    ),
    (BACKWARD, {"page_table": ints([0], [0])}, {}, {}, "page_table has no backward pass"),
    (BACKWARD, {"d_out": ABSENT}, {}, {}, "d_out is missing"),
    (BACKWARD, {"lse": ones(2, T, N)}, {}, {}, "lse has size 4"),
    (BACKWARD, {}, {"key": ((2, S, N, H), F32)}, {}, "dk has size 4 on axis 2, expected 2"),
    (BACKWARD, {}, {"delta": ABSENT, **NO_SCRATCH}, {}, "delta is not among the results"),
    (BACKWARD, {}, NO_SCRATCH, {}, "dq_accum is not among the results"),
    (BACKWARD, {}, {"next_unit": ABSENT}, {}, "next_unit is not among the results"),
    (BACKWARD, {}, {"dq_accum": ((2, N, T // 16, 128), F32)}, {}, "dq_accum has size"),
    (BACKWARD, {}, {"statistics": ((2, N, T // 128, 256), F32)}, {}, "statistics has size"),
    (BACKWARD, {}, {}, {"deterministic": True}, "tickets is not among the results"),
    (DBIAS, {"bias": ABSENT}, {}, {}, "bias is missing"),
    (DBIAS, {"delta": ABSENT}, {}, {}, "delta is missing"),
    (DBIAS, {"lse": ones(2, T, N)}, {}, {}, "lse has size 4"),
    (DBIAS, {"page_table": ints([0], [0])}, {}, {}, "page_table has no bias gradient"),
    (DBIAS, {"cu_seqlens_q": ints([0, 3], [0, 3])}, {}, {}, "cu_seqlens_q has no bias gradient"),
    (DBIAS, {}, {"bias": ((N, T, S), F32)}, {}, "dbias is not the result that follows from bias"),
    (DBIAS, {}, {"bias": ((1, N, T, S), jnp.bfloat16)}, {}, "dbias is not the result"),
    (DBIAS, {}, {"bias": ((2, N, T, S), F32)}, {}, "dbias is not the result"),
    (DBIAS, {"bias": ones(1, N, T, S, dtype=jnp.bfloat16)}, {}, {}, "dbias is not the result"),
    (DBIAS, {"bias": ones(1, N, 1, S, dtype=jnp.bfloat16)}, {"bias": ((1, N, 1, S), jnp.bfloat16)}, {}, "dbias is not"),
    (DBIAS, {"bias": ones(1, N, 1, 1)}, {"bias": ((1, N, 1, S), F32)}, {}, "dbias is not the result"),
]


def ffi_call(target, operands, results, attributes):
    """The custom call with whatever it is given, but for the dtype of activations, which the device decides."""
    operands = {n: operands[n] for n in OPERANDS if operands.get(n, ABSENT) is not ABSENT}  # in the order of the call
    operands = {n: x.astype(kernel_dtype(x.dtype)) if n in ACTIVATIONS else x for n, x in operands.items()}
    results = {n: x for n, x in results.items() if x is not ABSENT}
    results = [(x, kernel_dtype(dtype) if n in ACTIVATIONS else dtype) for n, (x, dtype) in results.items()]
    results = [jax.ShapeDtypeStruct(*x) for x in results]
    attributes = {**ffi_attributes(Attrs(scale=1.0), tuple(operands)), **attributes}
    attributes = {n: x for n, x in attributes.items() if x is not ABSENT}
    jax.block_until_ready(jax.ffi.ffi_call(target, results)(*operands.values(), **attributes))


@pytest.mark.parametrize("call", [DENSE, PACKED, BACKWARD, DBIAS], ids=["dense", "packed", "backward", "dbias"])
def test_proper_use_of_the_custom_calls(call):
    ffi_call(*call, {})


@pytest.mark.parametrize("call, operands, results, attributes, message", MISUSE)
def test_misuse_of_the_custom_calls(call, operands, results, attributes, message):
    """Below the Python checks: an error, and no access out of bounds."""
    target, right_operands, right_results = call
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        ffi_call(target, {**right_operands, **operands}, {**right_results, **results}, attributes)


# ---- load and memory ----


def test_results_are_bitwise_the_same_under_load(rng):
    """50 runs in each of five threads at once: GQA, a shared bias, and keys that are split among the threads."""
    q, k, v = rng.qkv(1, 130, 600, heads=4, heads_kv=1, dim=16)
    arrays = (q, k, v, rng.normal(1, 4, 1, 600))
    results = rng.activations(*q.shape), rng.normal(1, 4, 130)
    call = attend(is_causal=True, dropout_rate=0.2, dropout_key=jax.random.key(0), deterministic=True)

    @jax.jit
    def step(arrays, cotangents):
        results, vjp = jax.vjp(call, *arrays)
        return results, vjp(cotangents)

    # The fixture's default device is one of this thread only.
    arrays, results = jax.device_put((arrays, results), jax.config.jax_default_device)
    expected = jax.tree.map(np.asarray, step(arrays, results))

    def repeat(_):
        for _ in range(50):
            assert_equal(step(arrays, results), expected)

    with concurrent.futures.ThreadPoolExecutor(5) as threads:
        list(threads.map(repeat, range(5)))


_LARGE = (2048, 4096, 16384)


def _compiled_gradient(seqlen: int, **options):
    shape = jax.ShapeDtypeStruct((1, seqlen, 2, 64), kernel_dtype(jnp.float32))
    gradient = jax.grad(lambda q, k, v: sum(x.sum() for x in attend(**options)(q, k, v)), argnums=(0, 1, 2))
    return jax.jit(gradient).lower(shape, shape, shape).compile()


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True, "dropout_rate": 0.1, "dropout_key": np.ones(2, np.uint32)}]
)
def test_memory_is_linear_in_the_length(options):
    compiled = {seqlen: _compiled_gradient(seqlen, **options) for seqlen in _LARGE}
    sizes = {
        t: c.memory_analysis().temp_size_in_bytes + c.memory_analysis().output_size_in_bytes
        for t, c in compiled.items()
    }
    shortest = _LARGE[0]
    for seqlen in _LARGE[1:]:
        assert sizes[seqlen] <= 1.05 * sizes[shortest] * seqlen / shortest
    shapes = re.findall(r"\w\d+\[([\d,]+)\]", compiled[shortest].as_text())
    assert any(shape == "1,2048,2,64" for shape in shapes)
    assert max(np.prod([int(size) for size in shape.split(",")]) for shape in shapes) < shortest**2


@CPU_ONLY
def test_resident_memory_is_linear_in_the_length(tmp_path):
    """What the calls allocate for themselves, which XLA does not see: a [T, S] matrix would be 16 GB."""
    program = """if True:
        import resource, jax, jax.numpy as jnp
        from jax_flash import flash_attention
        def peak(seqlen):
            x = jnp.ones((1, seqlen, 1, 16))
            attend = lambda q, k, v: flash_attention(q, k, v, local_window_size=8).sum()
            jax.block_until_ready(jax.jit(jax.grad(attend, argnums=(0, 1, 2)))(x, x, x))
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        small = peak(256)
        print(peak(65536) - small)
    """
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 400  # MiB, of which the arrays themselves are 40


@CPU_ONLY
def test_in_dirty_memory(tmp_path):
    """In a process of its own, whose fresh memory holds large floats: crashes and unwritten results are noticed."""
    dirty = {**os.environ, "MALLOC_PERTURB_": "128", "MALLOC_MMAP_MAX_": "0"}
    chosen = "(out_of_range or unused or empty or misuse) and not cuda"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, __file__]
    done = subprocess.run(command, cwd=tmp_path, env=dirty, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
