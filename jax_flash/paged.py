"""Attention of new queries to a paged key/value cache: decoding and chunked prefill."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike

from jax_flash import _checks
from jax_flash._autodiff import attend


def paged_attention(
    query: ArrayLike,
    key_pages: ArrayLike,
    value_pages: ArrayLike,
    page_table: ArrayLike,
    key_value_seq_lengths: ArrayLike,
    *,
    cu_seqlens_q: ArrayLike | None = None,
    max_seqlen_q: int | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention to keys and values that lie in pages (Kwon et al., "PagedAttention", 2023).

    Key j of sequence b is row ``j % page_size`` of page ``page_table[b, j // page_size]``. The T queries of a sequence
    are its newest tokens: with causality, bottom-right, query i sees key j iff j <= i + length - T. The new tokens'
    keys must be in the pages already. Forward only.

    Entries of the table past a sequence's length are not read, nor is what their pages hold. An index out of range
    within the length is clamped to 0..num_pages - 1: a wrong result, but no access outside of the pages.

    Args:
      query: ``[B, T, N, H]``, or packed ``[total_q, N, H]`` with ``cu_seqlens_q``; of the dtypes of
        ``flash_attention``.
      key_pages: ``[num_pages, page_size, K, H]``, any page_size from 1; N must be a multiple of K.
      value_pages: ``[num_pages, page_size, K, D]``.
      page_table: int32 ``[B, max_pages]``.
      key_value_seq_lengths: int32 ``[B]``, keys of each sequence, at most max_pages * page_size.
      cu_seqlens_q: int32 ``[B + 1]``, offsets of each sequence's first query in a packed ``query``.
      max_seqlen_q: Python int, at least the longest packed sequence; needed with ``cu_seqlens_q``.
      scale: 1/sqrt(H) if None.
      is_causal: see above.
      local_window_size: (left, right) or one int for both, as in ``flash_attention``.
      logits_soft_cap: as in ``flash_attention``.
      alibi_slopes: float32 ``[N]`` or ``[B, N]``.
      sinks: float32 ``[N]``.
      num_splits: into how many parts each sequence's keys are to be split, to be treated in parallel; None leaves the
        choice to the implementation. It has no effect yet: parallelism is over sequences, heads and blocks of queries.
      return_lse: also return the logsumexp.

    Returns:
      ``out`` shaped as the query with D in place of H; with ``return_lse`` also the logsumexp, float32 ``[B, N, T]`` or
      ``[N, total_q]``.

    Raises:
      ValueError: an argument is wrong; the message names it, what was expected and what came.
      NotImplementedError: differentiation, and as ``flash_attention``.
      jax.errors.JaxRuntimeError: as ``flash_attention``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_flash import paged_attention
      >>> q = jax.random.normal(jax.random.key(0), (2, 1, 8, 64))
      >>> k_pages, v_pages = jax.random.normal(jax.random.key(1), (2, 10, 16, 2, 64))
      >>> table, lengths = jnp.array([[3, 1, 0], [7, 2, 5]], jnp.int32), jnp.array([20, 40], jnp.int32)
      >>> paged_attention(q, k_pages, v_pages, table, lengths).shape
      (2, 1, 8, 64)
    """
    q, k, v = _checks.qkv(query, key_pages, value_pages, names=("query", "key_pages", "value_pages"))
    _checks.shape("key_pages", k, (None, None, None, None), "[num_pages, page_size, K, H]")
    _checks.page_size("key_pages", k)
    operands = {"query": q, "key": k, "value": v}
    if cu_seqlens_q is None:
        _checks.shape("query", q, (None, None, None, None), "[B, T, N, H] (without cu_seqlens_q)")
        num_sequences = q.shape[0]
        if max_seqlen_q is not None:
            raise ValueError("`max_seqlen_q` goes with `cu_seqlens_q`, which is None.")
        max_seqlen_q = 0
    else:
        _checks.shape("query", q, (None, None, None), "[total_q, N, H] (with cu_seqlens_q)")
        operands["cu_seqlens_q"] = _checks.cu_seqlens("cu_seqlens_q", cu_seqlens_q)
        num_sequences = operands["cu_seqlens_q"].shape[0] - 1
        max_seqlen_q = _checks.integer("max_seqlen_q", max_seqlen_q, 0)
    operands["page_table"] = _checks.int32("page_table", page_table, (num_sequences, None), "[B, max_pages]")
    lengths = _checks.int32("key_value_seq_lengths", key_value_seq_lengths, (num_sequences,), "[B]")
    operands["key_value_seq_lengths"] = lengths
    if alibi_slopes is not None:
        operands["alibi_slopes"] = _checks.alibi_slopes(alibi_slopes, q.shape[-2], (num_sequences,))
    if sinks is not None:
        operands["sinks"] = _checks.sinks(sinks, q.shape[-2], q.ndim - 3)
    attrs = _checks.attrs(
        q.shape[-1],
        scale=scale,
        is_causal=is_causal,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
        max_seqlen_q=max_seqlen_q,
        num_splits=0 if num_splits is None else _checks.integer("num_splits", num_splits, 1),
    )
    out, lse = attend(attrs, operands)
    return (out, lse) if _checks.flag("return_lse", return_lse) else out
