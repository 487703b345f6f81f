"""paged_attention against the reference on gathered pages."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, assert_equal, run_on_cpu

from jax_flash import _reference, flash_attention, paged_attention

pytestmark = pytest.mark.usefixtures("device")

LENGTHS = (37, 0, 80, 5)
SLOPES = jnp.float32([0.1, 0.2, 0.3, 0.4])
SINKS = jnp.float32([0.1, -1.0, 2.0, 0.0])
CAUSAL = {"window": (-1, 0)}
OPTIONS = {
    "causal": ({}, CAUSAL),
    "full": ({"is_causal": False}, {}),
    "window": ({"local_window_size": (9, 0)}, {"window": (9, 0)}),
    "softcap": ({"logits_soft_cap": 3.0}, {"logits_soft_cap": 3.0} | CAUSAL),
    "alibi": ({"alibi_slopes": SLOPES}, {"alibi_slopes": SLOPES} | CAUSAL),
    "sinks": ({"sinks": SINKS}, {"sinks": SINKS} | CAUSAL),
    "splits": ({"num_splits": 3}, CAUSAL),
}


def make_cache(rng, page_size, dim=16, dim_v=16):
    """Contiguous key and value [B, S, K, .], and the same in shuffled pages, of which unused ones are NaN."""
    max_pages = -(-max(LENGTHS) // page_size)
    num_pages = len(LENGTHS) * max_pages + 3
    table = rng.generator.permutation(num_pages)[: len(LENGTHS) * max_pages].reshape(len(LENGTHS), max_pages)
    cache = []
    for d in (dim, dim_v):
        rows = np.asarray(rng.normal(len(LENGTHS), max_pages * page_size, 2, d))
        pages = np.full((num_pages, page_size, 2, d), np.nan, np.float32)
        for b, length in enumerate(LENGTHS):
            for j in range(length):
                pages[table[b, j // page_size], j % page_size] = rows[b, j]
        cache.append((jnp.asarray(rows, rng.dtype), jnp.asarray(pages, rng.dtype)))
    for b, length in enumerate(LENGTHS):  # entries past the length may be anything
        table[b, -(-length // page_size) :] = 10**6 * (-1) ** b
    return *zip(*cache, strict=True), jnp.asarray(table, jnp.int32), jnp.asarray(LENGTHS, jnp.int32)


def reference(q, rows, lengths, **options):
    """(out, lse) over contiguous keys and values."""
    return run_on_cpu(
        lambda q, k, v, lengths: _reference.attention(q, k, v, key_value_seq_lengths=lengths, **options)[:2],
        *(q, *rows, lengths),
    )


@pytest.mark.parametrize("page_size", [1, 7, 16, 100])
@pytest.mark.parametrize("seqlen_q", [1, 6])
def test_page_sizes(rng, page_size, seqlen_q):
    rows, pages, table, lengths = make_cache(rng, page_size, 24, 40)
    q = rng.activations(len(LENGTHS), seqlen_q, 4, 24)
    actual = paged_attention(q, *pages, table, lengths, return_lse=True)
    assert_close(actual, reference(q, rows, lengths, **CAUSAL))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_options(rng, option, packed):
    ours, theirs = OPTIONS[option]
    rows, pages, table, lengths = make_cache(rng, 16)
    q = rng.activations(len(LENGTHS), 5, 4, 16)
    expected = reference(q, rows, lengths, **theirs)
    if not packed:
        assert_close(paged_attention(q, *pages, table, lengths, **ours, return_lse=True), expected)
        return
    at = jnp.arange(len(LENGTHS) + 1, dtype=jnp.int32) * 5
    out, lse = paged_attention(
        q.reshape(-1, 4, 16), *pages, table, lengths, cu_seqlens_q=at, max_seqlen_q=5, **ours, return_lse=True
    )
    assert_close((out.reshape(q.shape), lse.reshape(4, -1, 5).swapaxes(0, 1)), expected)


def test_packed_queries_of_different_lengths(rng):
    """Chunked prefill beside decoding: each sequence brings its own number of new tokens."""
    rows, pages, table, lengths = make_cache(rng, 8)
    counts = [10, 0, 1, 5]
    at = np.concatenate([[0], np.cumsum(counts)])
    q = rng.activations(sum(counts) + 2, 4, 16)
    out = paged_attention(q, *pages, table, lengths, cu_seqlens_q=jnp.asarray(at, jnp.int32), max_seqlen_q=10)
    for b, count in enumerate(counts):
        one = slice(b, b + 1)
        expected = reference(q[at[b] : at[b + 1]][None], [x[one] for x in rows], lengths[one], **CAUSAL)[0][0]
        assert_close(out[at[b] : at[b] + count], expected)
    np.testing.assert_array_equal(out[sum(counts) :], 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.usefixtures("portable_kernels")  # pages are nothing for Hopper's
def test_low_precision_is_flash_attention(rng, dtype):
    """The same bits as the dense call over the contiguous cache."""
    rows, pages, table, lengths = make_cache(rng, 16)
    q = rng.normal(len(LENGTHS), 3, 4, 16).astype(dtype)
    rows, pages = ([x.astype(dtype) for x in y] for y in (rows, pages))
    dense = flash_attention(q, *rows, key_value_seq_lengths=lengths, is_causal=True)
    assert_equal(paged_attention(q, *pages, table, lengths), dense)
