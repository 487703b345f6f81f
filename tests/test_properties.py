"""Random shapes and options against the reference: out, lse and the gradients of random cotangents of both.

The functions under test get the shapes that were drawn. The reference gets them padded to one size, as compiling it
takes much longer than running it; lengths and masks hide the padding.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import kernel_dtype, run_on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_flash import flash_attention, flash_attention_varlen, paged_attention
from jax_flash._reference import attention, visible

pytestmark = pytest.mark.usefixtures("device")

BATCH, HEADS, LENGTH, DIM = 4, 4, 152, 256  # the reference's sizes

lengths = st.one_of(st.integers(1, 40), st.integers(0, 70), st.sampled_from([1, 63, 64, 65, 97, 127, 128, 131, 149]))
short_lengths = st.one_of(st.integers(1, 40), st.sampled_from([0, 1, 64, 65, 70]))
batch_axes = st.sampled_from([(), (1,), (2,), (3,), (2, 2), (3, 1), (2, 2), (1, 3), (2,), (3,), (0,), (1, 0)])
dims = st.one_of(st.integers(1, 32), st.sampled_from([33, 48, 63, 64, 80, 96, 127, 128, 160, 192, 255, 256]))
all_heads = st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 1), (4, 2), (4, 4)])  # query, key/value
dtypes = st.sampled_from([jnp.float32, jnp.float32, jnp.bfloat16, jnp.float16])
sides = st.sampled_from([None, -1, 0, 1, 5, 64, 1000])
few = functools.partial(settings, deadline=None, derandomize=True, database=None)


@dataclasses.dataclass
class Case:
    """What was drawn: arguments of the call, and the generator of its arrays."""

    rng: np.random.Generator
    dtype: Any
    heads: int
    heads_kv: int
    dim: int
    dim_v: int
    options: dict[str, Any]

    def normal(self, *shape: int, dtype=None) -> np.ndarray:
        return np.asarray(jnp.asarray(self.rng.standard_normal(shape), dtype or self.dtype))

    def integers(self, low, high, shape) -> np.ndarray:
        return self.rng.integers(low, high, shape, np.int32, endpoint=True)


@st.composite
def cases(draw) -> Case:
    """What dense, packed and paged calls share."""
    heads, heads_kv = draw(all_heads)
    dim = draw(dims)
    dim_v = draw(st.one_of(st.just(dim), dims))
    options: dict[str, Any] = {"is_causal": draw(st.booleans())}
    options["local_window_size"] = draw(st.one_of(st.none(), st.integers(0, 70), st.tuples(sides, sides)))
    options["scale"] = draw(st.sampled_from([None, None, 0.3, -0.1, 0.0, 1e-39]))
    options["logits_soft_cap"] = draw(st.sampled_from([None, None, 0.5, 10.0]))
    rng, dtype = np.random.default_rng(draw(st.integers(0, 99))), kernel_dtype(draw(dtypes))
    case = Case(rng, dtype, heads, heads_kv, dim, dim_v, options)
    if draw(st.booleans()):
        options["sinks"] = case.normal(heads, dtype=jnp.float32)
    return case


# ---- the reference ----


def pad(x, *sizes) -> np.ndarray:
    return np.pad(x, [(0, size - n) for size, n in zip(sizes, x.shape, strict=True)])


@functools.partial(
    jax.jit,
    static_argnames=("capped", "bottom_right", "dtype"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def _padded_reference(arrays, cotangents, cap, constants, *, capped, bottom_right, dtype):
    def call(query, key, value, bias, sinks):
        cap_or_none = cap if capped else None
        options = {"logits_soft_cap": cap_or_none, "bottom_right": bottom_right, "dtype": dtype, **constants}
        return attention(query, key, value, bias=bias, sinks=sinks, **options)[:2]

    results, vjp = jax.vjp(call, *arrays)
    return results, vjp(tuple(c.astype(r.dtype) for c, r in zip(cotangents, results, strict=True)))


def reference(case: Case, q, k, v, cotangents, *, dtype, lengths_q, lengths_kv, bias=None, mask=None, slopes=None,
              segments=None, bottom_right=True):  # fmt: skip
    """Results and gradients for q [B, T, N, H], k [B, S, K, H], v [B, S, K, D]; bias and mask are full [B, N, T, S]."""
    batch, seqlen_q, heads = q.shape[:3]
    seqlen_kv, group = k.shape[1], heads // k.shape[2]
    scale = case.options["scale"]
    left, right = _window(case.options["local_window_size"])
    window = (left, 0 if case.options["is_causal"] else right)
    lengths_q, lengths_kv = (pad(np.asarray(x, np.int32), BATCH) for x in (lengths_q, lengths_kv))
    seen = jax.vmap(lambda a, b: visible(LENGTH, LENGTH, a, b, window, bottom_right))(lengths_q, lengths_kv)[:, None]
    if mask is not None:
        seen = seen & pad(mask, BATCH, HEADS, LENGTH, LENGTH)
    constants = {
        "scale": 1 / math.sqrt(case.dim) if scale is None else scale,
        "mask": jnp.broadcast_to(seen, (BATCH, HEADS, LENGTH, LENGTH)),
        "alibi_slopes": pad(np.zeros((batch, heads), np.float32) if slopes is None else slopes, BATCH, HEADS),
        "query_seq_lengths": lengths_q,
        "key_value_seq_lengths": lengths_kv,
        "query_segment_ids": pad(
            np.zeros((batch, seqlen_q), np.int32) if segments is None else segments[0], BATCH, LENGTH
        ),
        "key_value_segment_ids": pad(
            np.zeros((batch, seqlen_kv), np.int32) if segments is None else segments[1], BATCH, LENGTH
        ),
    }
    arrays = (
        pad(q, BATCH, LENGTH, HEADS, DIM),
        pad(np.repeat(k, group, 2), BATCH, LENGTH, HEADS, DIM),
        pad(np.repeat(v, group, 2), BATCH, LENGTH, HEADS, DIM),
        pad(
            np.zeros((batch, heads, seqlen_q, seqlen_kv), np.float32) if bias is None else bias,
            BATCH,
            HEADS,
            LENGTH,
            LENGTH,
        ),
        pad(case.options.get("sinks", np.full(heads, -np.inf, np.float32)), HEADS),
    )
    cotangents = (pad(cotangents[0], BATCH, LENGTH, HEADS, DIM), pad(cotangents[1], BATCH, HEADS, LENGTH))
    cap = case.options["logits_soft_cap"]
    (out, lse), gradients = jax.tree.map(
        lambda x: np.asarray(x, np.float64),
        _padded_reference(
            arrays, cotangents, cap or 1.0, constants, capped=cap is not None, bottom_right=bottom_right, dtype=dtype
        ),
    )
    dq, dk, dv, dbias, dsinks = gradients
    dk, dv = (
        x[:batch, :seqlen_kv, :heads].reshape(batch, seqlen_kv, heads // group, group, DIM).sum(3) for x in (dk, dv)
    )
    return {
        "out": out[:batch, :seqlen_q, :heads, : case.dim_v],
        "lse": lse[:batch, :heads, :seqlen_q],
        "query": dq[:batch, :seqlen_q, :heads, : case.dim],
        "key": dk[..., : case.dim],
        "value": dv[..., : case.dim_v],
        "bias": dbias[:batch, :heads, :seqlen_q, :seqlen_kv],
        "sinks": dsinks[:heads],
    }


def _window(size) -> tuple[int, int]:
    pair = (size, size) if size is None or isinstance(size, int) else size
    return tuple(-1 if side is None else side for side in pair)


def run(call, operands: dict, cotangents) -> dict:
    """out, lse and the gradients of ``call(**operands)`` by name."""

    @jax.jit
    def run(operands, cotangents):
        (out, lse), vjp = jax.vjp(lambda operands: call(**operands), operands)
        return {"out": out, "lse": lse, **vjp(cotangents)[0]}

    return run(operands, cotangents)


def check(case: Case, actual: dict, expected: dict, low: dict) -> None:
    """Errors of at most those of plain arithmetic in the input dtype (``low``), and some units in the last place more:
    the few numbers of a small case may be exact there by luck."""
    factor = 3 if case.options["logits_soft_cap"] else 2
    for name, x in actual.items():
        e = expected[name]
        assert x.shape == e.shape, name
        if name == "lse":
            tolerance = 1e-5 if case.dtype == jnp.float32 else 1e-3
            np.testing.assert_allclose(x, e, rtol=tolerance / 10, atol=tolerance, err_msg=name)
        else:
            units = 300 if case.dtype == jnp.float32 else 4
            bound = factor * np.abs(low[name] - e).max(initial=0)
            bound += units * float(jnp.finfo(case.dtype).eps) * np.abs(e).max(initial=1)
            np.testing.assert_allclose(np.asarray(x, np.float64), e, rtol=0, atol=bound, err_msg=name)


def compare(case: Case, actual: dict, expected_of) -> None:
    """``expected_of(dtype)`` is the reference in that arithmetic."""
    expected = run_on_cpu(lambda: expected_of(jnp.float32))
    low = expected if case.dtype == jnp.float32 else run_on_cpu(lambda: expected_of(case.dtype))
    check(case, actual, expected, low)


# ---- dense ----


@st.composite
def dense_cases(draw):
    case = draw(cases())
    axes = draw(batch_axes)
    seqlen_q, seqlen_kv = draw(lengths), draw(lengths)
    scores = (*axes, case.heads, seqlen_q, seqlen_kv)
    operands = {
        "query": case.normal(*axes, seqlen_q, case.heads, case.dim),
        "key": case.normal(*axes, seqlen_kv, case.heads_kv, case.dim),
        "value": case.normal(*axes, seqlen_kv, case.heads_kv, case.dim_v),
    }

    def broadcast_shape():
        return tuple(n if draw(st.booleans()) else 1 for n in scores)

    if draw(st.booleans()):
        operands["bias"] = case.normal(*broadcast_shape(), dtype=draw(st.sampled_from([jnp.float32, case.dtype])))
    if draw(st.booleans()):
        case.options["mask"] = case.rng.random(broadcast_shape()) < draw(st.sampled_from([0.1, 0.5, 0.95]))
    if draw(st.booleans()):
        case.options["alibi_slopes"] = case.normal(*draw(st.sampled_from([(), axes])), case.heads, dtype=jnp.float32)
    if draw(st.booleans()):
        case.options["query_seq_lengths"] = case.integers(0, seqlen_q, axes)
    if draw(st.booleans()):
        case.options["key_value_seq_lengths"] = case.integers(0, seqlen_kv, axes)
    if draw(st.booleans()):
        case.options["query_segment_ids"] = case.integers(0, 2, (*axes, seqlen_q))
        case.options["key_value_segment_ids"] = np.sort(case.integers(0, 2, (*axes, seqlen_kv)))
    case.options["causal_alignment"] = draw(st.sampled_from(["bottom_right", "top_left"]))
    return case, operands


@few(max_examples=80)
@given(dense_cases())
def test_dense(drawn):
    case, operands = drawn
    q, k, v = (operands[n] for n in ("query", "key", "value"))
    axes, batch, options = q.shape[:-3], math.prod(q.shape[:-3]), case.options
    if "sinks" in options:
        operands = {**operands, "sinks": options["sinks"]}
    rest = {n: x for n, x in options.items() if n != "sinks"}
    cotangents = (
        case.normal(*q.shape[:-1], case.dim_v),
        case.normal(*axes, case.heads, q.shape[-3], dtype=jnp.float32),
    )
    actual = run(lambda **operands: flash_attention(**operands, **rest, return_lse=True), operands, cotangents)

    def flat(x, *shape):
        """[*axes, ...] broadcast to [batch, *shape]."""
        return None if x is None else np.broadcast_to(x, (*axes, *shape)).reshape(batch, *shape)

    scores = (case.heads, q.shape[-3], k.shape[-3])

    def expected(dtype):
        segments = (options.get("query_segment_ids"), options.get("key_value_segment_ids"))
        results = reference(
            case, *(flat(x, *x.shape[-3:]) for x in (q, k, v)), [flat(x, *x.shape[len(axes) :]) for x in cotangents],
            dtype=dtype, lengths_q=flat(options.get("query_seq_lengths", scores[1])),
            lengths_kv=flat(options.get("key_value_seq_lengths", scores[2])), bias=flat(operands.get("bias"), *scores),
            mask=flat(options.get("mask"), *scores), slopes=flat(options.get("alibi_slopes"), case.heads),
            segments=None if segments[0] is None else [flat(x, x.shape[-1]) for x in segments],
            bottom_right=options["causal_alignment"] == "bottom_right",
        )  # fmt: skip
        results = {n: x if n == "sinks" else x.reshape(*axes, *x.shape[1:]) for n, x in results.items()}
        if "bias" in operands:
            shared = tuple(a for a, n in enumerate(operands["bias"].shape) if n == 1)
            results["bias"] = results["bias"].sum(shared, keepdims=True)
        return results

    compare(case, actual, expected)


# ---- packed ----


@st.composite
def packed_cases(draw):
    case = draw(cases())
    sizes = draw(st.lists(st.tuples(short_lengths, short_lengths), max_size=BATCH))
    before, behind = draw(st.integers(0, 5)), draw(st.integers(0, 5))  # rows of no sequence
    offsets_q, offsets_kv = (np.cumsum([before, *(size[side] for size in sizes)], dtype=np.int32) for side in (0, 1))
    operands = {
        "query": case.normal(offsets_q[-1] + behind, case.heads, case.dim),
        "key": case.normal(offsets_kv[-1] + behind, case.heads_kv, case.dim),
        "value": case.normal(offsets_kv[-1] + behind, case.heads_kv, case.dim_v),
    }
    if draw(st.booleans()):
        case.options["alibi_slopes"] = case.normal(
            *draw(st.sampled_from([(), (len(sizes),)])), case.heads, dtype=jnp.float32
        )
    if draw(st.booleans()):
        case.options["seqused_kv"] = case.integers(0, np.diff(offsets_kv), len(sizes))
    case.options["causal_alignment"] = draw(st.sampled_from(["bottom_right", "top_left"]))
    return case, operands, offsets_q, offsets_kv


def unpack(x, offsets, size) -> np.ndarray:
    """Packed rows [total, ...] -> sequences [B, size, ...]."""
    shape = (size, *x.shape[1:])
    pieces = [pad(x[begin:end], *shape) for begin, end in itertools.pairwise(offsets)]
    return np.array(pieces, x.dtype).reshape(len(pieces), *shape)


def repack(sequences, offsets, total, fill=0.0) -> np.ndarray:
    x = np.full((total, *sequences.shape[2:]), fill)
    for sequence, (begin, end) in zip(sequences, itertools.pairwise(offsets), strict=True):
        x[begin:end] = sequence[: end - begin]
    return x


@few(max_examples=40)
@given(packed_cases())
def test_packed(drawn):
    case, operands, offsets_q, offsets_kv = drawn
    options, sizes_q, sizes_kv = case.options, np.diff(offsets_q), np.diff(offsets_kv)
    max_q, max_kv = int(sizes_q.max(initial=0)), int(sizes_kv.max(initial=0))
    q, k, v = operands.values()
    cotangents = (case.normal(*q.shape[:-1], case.dim_v), case.normal(case.heads, len(q), dtype=jnp.float32))
    if "sinks" in options:
        operands = {**operands, "sinks": options["sinks"]}
    rest = {n: x for n, x in options.items() if n != "sinks"}

    def call(**operands):
        return flash_attention_varlen(
            **operands, cu_seqlens_q=offsets_q, cu_seqlens_kv=offsets_kv, max_seqlen_q=max_q, max_seqlen_kv=max_kv,
            return_lse=True, **rest,
        )  # fmt: skip

    actual = run(call, operands, cotangents)

    def expected(dtype):
        d_out, d_lse = unpack(cotangents[0], offsets_q, max_q), unpack(cotangents[1].T, offsets_q, max_q)
        slopes = options.get("alibi_slopes")
        results = reference(
            case, unpack(q, offsets_q, max_q), unpack(k, offsets_kv, max_kv), unpack(v, offsets_kv, max_kv),
            (d_out, d_lse.swapaxes(1, 2)), dtype=dtype, lengths_q=sizes_q,
            lengths_kv=options.get("seqused_kv", sizes_kv),
            slopes=None if slopes is None else np.broadcast_to(slopes, (len(sizes_q), case.heads)),
            bottom_right=options["causal_alignment"] == "bottom_right",
        )  # fmt: skip
        results["lse"] = repack(results["lse"].swapaxes(1, 2), offsets_q, len(q), -np.inf).T
        for name, offsets, total in (("out", offsets_q, len(q)), ("query", offsets_q, len(q))):
            results[name] = repack(results[name], offsets, total)
        for name in ("key", "value"):
            results[name] = repack(results[name], offsets_kv, len(k))
        return results

    compare(case, actual, expected)


# ---- paged ----


@st.composite
def paged_cases(draw):
    case = draw(cases())
    batch, page_size = draw(st.integers(0, BATCH)), draw(st.sampled_from([1, 2, 3, 7, 16, 64, 65]))
    max_pages = draw(st.integers(0, 130 // page_size))
    num_pages = draw(st.integers(1, 8))
    lengths_kv = case.integers(0, max_pages * page_size, batch)
    pages = (
        case.normal(num_pages, page_size, case.heads_kv, case.dim),
        case.normal(num_pages, page_size, case.heads_kv, case.dim_v),
    )
    table = case.integers(0, num_pages - 1, (batch, max_pages))
    if draw(st.booleans()):
        case.options["alibi_slopes"] = case.normal(
            *draw(st.sampled_from([(), (batch,)])), case.heads, dtype=jnp.float32
        )
    sizes = draw(st.one_of(short_lengths, st.lists(short_lengths, min_size=batch, max_size=batch)))  # dense or packed
    return case, pages, table, lengths_kv, sizes


@few(max_examples=30)
@given(paged_cases())
def test_paged(drawn):
    case, pages, table, lengths_kv, sizes = drawn
    batch, packed, options = len(table), isinstance(sizes, list), case.options
    offsets = np.cumsum([0, *(sizes if packed else [sizes] * batch)], dtype=np.int32)
    max_q = int(np.diff(offsets).max(initial=0)) if packed else sizes
    q = case.normal(offsets[-1], case.heads, case.dim)
    if packed:
        out, lse = jax.jit(
            lambda q: paged_attention(
                q, *pages, table, lengths_kv, cu_seqlens_q=offsets, max_seqlen_q=max_q, return_lse=True, **options
            )
        )(q)
    else:
        queries = q.reshape(batch, sizes, case.heads, case.dim)
        out, lse = jax.jit(lambda q: paged_attention(q, *pages, table, lengths_kv, return_lse=True, **options))(queries)
        out, lse = out.reshape(-1, case.heads, case.dim_v), lse.swapaxes(0, 1).reshape(case.heads, -1)

    def expected(dtype):
        k, v = (x[table].reshape(batch, table.shape[1] * x.shape[1], *x.shape[2:]) for x in pages)
        slopes = options.get("alibi_slopes")
        results = reference(
            case, unpack(q, offsets, max_q), k, v,
            (np.zeros((batch, max_q, case.heads, case.dim_v)), np.zeros((batch, case.heads, max_q))),
            dtype=dtype, lengths_q=np.diff(offsets), lengths_kv=lengths_kv,
            slopes=None if slopes is None else np.broadcast_to(slopes, (batch, case.heads)),
        )  # fmt: skip
        lse = repack(results["lse"].swapaxes(1, 2), offsets, len(q)).T
        return {"out": repack(results["out"], offsets, len(q)), "lse": lse}

    compare(case, {"out": out, "lse": lse}, expected)
