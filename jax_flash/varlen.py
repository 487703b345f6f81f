"""Attention over packed sequences of different lengths."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike

from jax_flash import _checks
from jax_flash._autodiff import attend, dropout_stream


def flash_attention_varlen(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_kv: ArrayLike,
    *,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    seqused_kv: ArrayLike | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    causal_alignment: str = "bottom_right",
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    dropout_rate: float = 0.0,
    dropout_key: ArrayLike | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention within each of B sequences that lie one behind the other, without padding.

    Sequence b has the queries ``cu_seqlens_q[b] .. cu_seqlens_q[b + 1]`` and the keys ``cu_seqlens_kv[b] ..
    cu_seqlens_kv[b + 1]``; either may be empty. Alignment, window and ALiBi go by each sequence's own lengths. Rows
    outside of all sequences give output 0, lse -inf and gradients 0. Offsets are clamped to the arrays, and one
    that is below an earlier one counts as equal to the greatest so far.

    Args:
      query: ``[total_q, N, H]``, of the dtypes of ``flash_attention``.
      key: ``[total_kv, K, H]``; N must be a multiple of K.
      value: ``[total_kv, K, D]``.
      cu_seqlens_q: int32 ``[B + 1]``, offsets of the sequences' first queries; may be traced.
      cu_seqlens_kv: int32 ``[B + 1]``, likewise for keys.
      max_seqlen_q: Python int, at least the longest query sequence. Sets the launch size on GPUs, where a sequence
        that is longer than stated comes out right, but slowly.
      max_seqlen_kv: likewise for keys.
      seqused_kv: int32 ``[B]``; only so many keys of each sequence are used. The rest may hold anything, even NaN, and
        gets gradient 0.
      scale: as in ``flash_attention``, and so are all that follow.
      is_causal: see there.
      causal_alignment: see there.
      local_window_size: see there.
      logits_soft_cap: see there.
      alibi_slopes: float32 ``[N]`` or ``[B, N]``.
      sinks: float32 ``[N]``.
      dropout_rate: see there.
      dropout_key: see there; the mask of a sequence is that of batch entry b in a padded batch.
      deterministic: see there.
      return_lse: see there.

    Returns:
      ``out [total_q, N, D]``, or ``(out, lse)`` with ``lse [N, total_q]`` float32.

    Raises:
      ValueError: an argument is wrong; the message names it, what was expected and what came.
      NotImplementedError: as ``flash_attention``.
      jax.errors.JaxRuntimeError: likewise.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_flash import flash_attention_varlen
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 100, 4, 64))
      >>> offsets = jnp.array([0, 30, 100], jnp.int32)
      >>> flash_attention_varlen(q, k, v, offsets, offsets, max_seqlen_q=70, max_seqlen_kv=70, is_causal=True).shape
      (100, 4, 64)
    """
    q, k, v = _checks.qkv(query, key, value)
    for name, x in (("query", q), ("key", k), ("value", v)):
        _checks.shape(name, x, (None, None, None), "[total, heads, head_dim]")
    offsets_q = _checks.cu_seqlens("cu_seqlens_q", cu_seqlens_q)
    num_sequences = offsets_q.shape[0] - 1
    operands = {
        "query": q,
        "key": k,
        "value": v,
        "cu_seqlens_q": offsets_q,
        "cu_seqlens_kv": _checks.cu_seqlens("cu_seqlens_kv", cu_seqlens_kv, num_sequences + 1),
    }
    if seqused_kv is not None:
        operands["key_value_seq_lengths"] = _checks.int32("seqused_kv", seqused_kv, (num_sequences,), "[B]")
    num_heads = q.shape[-2]
    if alibi_slopes is not None:
        operands["alibi_slopes"] = _checks.alibi_slopes(alibi_slopes, num_heads, (num_sequences,))
    if sinks is not None:
        operands["sinks"] = _checks.sinks(sinks, num_heads, 0)
    keep_threshold, words = _checks.dropout(dropout_rate, dropout_key)
    if words is not None:
        operands["dropout_stream"] = dropout_stream(words, (), num_heads)
    attrs = _checks.attrs(
        q.shape[-1],
        scale=scale,
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
        keep_threshold=keep_threshold,
        deterministic=_checks.flag("deterministic", deterministic),
        max_seqlen_q=_checks.integer("max_seqlen_q", max_seqlen_q, 0),
        max_seqlen_kv=_checks.integer("max_seqlen_kv", max_seqlen_kv, 0),
    )
    out, lse = attend(attrs, operands)
    return (out, lse) if _checks.flag("return_lse", return_lse) else out
