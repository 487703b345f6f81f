"""Dense attention: ``flash_attention``, and ``dot_product_attention`` with the conventions of ``jax.nn``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_flash import _checks
from jax_flash._autodiff import attend, dropout_stream


def flash_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    causal_alignment: str = "bottom_right",
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    dropout_rate: float = 0.0,
    dropout_key: ArrayLike | None = None,
    broadcast_dropout: bool = False,
    deterministic: bool = False,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    r"""Exact attention in linear memory: softmax(scale * Q K^T) V.

    No [T, S] matrix is stored, forwards or backwards (Dao et al., "FlashAttention", 2022, and "FlashAttention-2",
    2023). Axes: T queries, S keys, N query heads, K key/value heads (query head n uses key head n // (N / K)), H head
    dim of query and key, D of value and output, each from 1 to 256. "..." is any number of batch axes, none included.

    Scores are formed in this order: scale, soft cap, ALiBi, bias, masks, softmax (with sinks in its denominator),
    dropout. Arithmetic is float32 whatever the inputs are. A query that sees no key gives output 0, lse -inf (with
    sinks: the sink) and gradients 0.

    Args:
      query: ``[..., T, N, H]``, bfloat16, float16 or, on the CPU only, float32 (one dtype for query, key and value).
      key: ``[..., S, K, H]``; N must be a multiple of K.
      value: ``[..., S, K, D]``.
      bias: ``[..., N, T, S]``, any axis of which may be 1; added to the scaled and capped scores. Differentiable; its
        gradient is summed over the axes of size 1. Float32, bfloat16 or float16. Values below -2.3e38, such as
        ``finfo.min``, hide a key as -inf does.
      mask: bool, shaped like ``bias``; True = attend.
      scale: factor of the scores; 1/sqrt(H) if None.
      is_causal: hide keys to the right of the diagonal.
      causal_alignment: where the diagonal lies, for ``is_causal`` and for the window alike. "bottom_right"
        (FlashAttention): query i sees key j iff j <= i + S - T, with the sequences' own lengths for S and T where
        those are given; "top_left" (``jax.nn``): j <= i.
      local_window_size: (left, right): of the diagonal's position p, query i sees p - left <= j <= p + right. An int w
        means (w, w); None or -1 leaves a side open; ``is_causal`` sets right to 0.
      logits_soft_cap: the scores become cap * tanh(score / cap) (Gemma 2).
      alibi_slopes: float32 ``[N]`` or ``[..., N]``; subtracts slope * abs(p - j) (Press et al., 2021). Constants: they
        get no gradient.
      sinks: float32 ``[N]``; a logit per head that takes part in the softmax's denominator, and so in lse, but has no
        value (as in gpt-oss). Differentiable.
      query_seq_lengths: int32 ``[...]``, one per batch entry. Rows past the length give output 0, lse -inf, gradient 0.
      key_value_seq_lengths: int32 ``[...]``. Keys past the length are not read into the result, even if NaN. Lengths
        outside 0..T or 0..S are clamped.
      query_segment_ids: int32 ``[..., T]``; a query sees only keys of the same id. Given together with the next.
      key_value_segment_ids: int32 ``[..., S]``.
      dropout_rate: in [0, 1). An element of the attention matrix is kept iff its random byte is below
        t = max(1, round(256 * (1 - rate))), so the rate in effect is 1 - t/256, and what is kept is scaled by 256/t.
      dropout_key: key of ``jax.random.key``, or raw uint32 ``[2]``; may be traced. The mask is a function of key, batch
        index, head and positions alone: it is the same on every device and under jit, vmap, remat and sharding. Inside
        a ``shard_map``, fold in ``axis_index`` to give each shard its own.
      broadcast_dropout: one mask for all batch entries and heads, as Flax does by default.
      deterministic: the gradients must be bitwise equal from run to run. (On the CPU they always are.) On GPUs all
        but the query's always are too; this adds that one, and costs some speed.
      return_lse: also return the logsumexp of the scores.

    Returns:
      ``out [..., T, N, D]`` in the query's dtype; with ``return_lse`` the pair ``(out, lse)`` with ``lse [..., N, T]``
      float32, in natural units and differentiable.

    Raises:
      ValueError: an argument is wrong; the message names it, what was expected and what came.
      NotImplementedError: a head dim above 256, an unsupported dtype, forward-mode or second derivatives.
      jax.errors.JaxRuntimeError: on a GPU, when XLA compiles: float32 inputs, which are to be cast; no NVRTC, or one
        that is too old for the GPU; a GPU older than Ampere.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_flash import flash_attention
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 128, 8, 64))
      >>> jax.jit(lambda q, k, v: flash_attention(q, k, v, is_causal=True))(q, k, v).shape
      (2, 128, 8, 64)
    """
    q, k, v = _checks.qkv(query, key, value)
    batch = _checks.batch_axes(q, k)
    num_heads = q.shape[-2]
    scores_shape = (*batch, num_heads, q.shape[-3], k.shape[-3])
    operands = {"query": q, "key": k, "value": v}
    if bias is not None:
        operands["bias"] = _checks.bias(bias, scores_shape)
    if mask is not None:
        operands["mask"] = _checks.mask(mask, scores_shape)
    if alibi_slopes is not None:
        operands["alibi_slopes"] = _checks.alibi_slopes(alibi_slopes, num_heads, batch)
    if sinks is not None:
        operands["sinks"] = _checks.sinks(sinks, num_heads, len(batch))
    for name, lengths in (
        ("query_seq_lengths", query_seq_lengths),
        ("key_value_seq_lengths", key_value_seq_lengths),
    ):
        if lengths is not None:
            operands[name] = _checks.int32(name, lengths, batch, "[...]")
    operands |= _checks.segment_ids(query_segment_ids, key_value_segment_ids, q, k)
    broadcast_dropout = _checks.flag("broadcast_dropout", broadcast_dropout)
    keep_threshold, words = _checks.dropout(dropout_rate, dropout_key)
    if words is not None:
        operands["dropout_stream"] = dropout_stream(words, batch, num_heads, broadcast=broadcast_dropout)
    attrs = _checks.attrs(
        q.shape[-1],
        scale=scale,
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
        keep_threshold=keep_threshold,
        deterministic=_checks.flag("deterministic", deterministic),
    )
    out, lse = attend(attrs, operands)
    return (out, lse) if _checks.flag("return_lse", return_lse) else out


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """``jax.nn.dot_product_attention`` on ``flash_attention``: replace the import and keep the call.

    Causality and the window are aligned top-left, as in ``jax.nn``. What differs from ``jax.nn``:

    * A query that sees no key (fully masked, or past its length) gives 0, not the mean of the values.
    * ``value`` may have a head dim of its own, and ``[...]`` may be any number of batch axes.
    * The residual is float32 whatever the inputs are, and is differentiable; rows that see no key have -inf.
    * ``implementation`` must be None: there is one.
    * float64 is not supported, nor are forward-mode and second derivatives.

    Args:
      query: ``[B, T, N, H]`` or ``[T, N, H]``.
      key: ``[B, S, K, H]`` or ``[S, K, H]``.
      value: ``[B, S, K, D]`` or ``[S, K, D]``.
      bias: broadcastable to ``[B, N, T, S]``; axes missing in front count as 1.
      mask: bool, likewise; True = attend.
      scale: 1/sqrt(H) if None.
      is_causal: query i sees key j iff j <= i.
      query_seq_lengths: int32 ``[B]``.
      key_value_seq_lengths: int32 ``[B]``.
      local_window_size: (left, right) or one int for both.
      implementation: only None.
      return_residual: also return the logsumexp.

    Returns:
      ``[B, T, N, D]`` or ``[T, N, D]``; with ``return_residual`` also the logsumexp, float32 ``[B, T, N]`` or
      ``[T, N]``.

    Raises:
      ValueError: as ``flash_attention``.
      NotImplementedError: as ``flash_attention``.

    Example:
      >>> import jax
      >>> from jax_flash import dot_product_attention
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 16, 4, 32))
      >>> dot_product_attention(q, k, v, is_causal=True).shape
      (2, 16, 4, 32)
    """
    if implementation is not None:
        raise NotImplementedError(
            f"`implementation` must be None, got {implementation!r}: jax_flash has one implementation per platform. "
            "For others call jax.nn.dot_product_attention."
        )
    query = _checks.array("query", query)
    ndim = query.ndim

    def full_rank(name: str, x: ArrayLike | None) -> jax.Array | None:
        if x is None:
            return None
        x = _checks.array(name, x)
        # jax.nn takes a 4-D bias for 3-D inputs too, as it gives those a batch axis itself.
        if x.ndim == ndim + 1 and x.shape[0] == 1:
            x = x[0]
        return x.reshape((1,) * (ndim - x.ndim) + x.shape)

    def lengths(name: str, x: ArrayLike | None) -> jax.Array | None:
        """For 3-D inputs jax.nn takes lengths of shape [1]."""
        x = None if x is None else _checks.array(name, x)
        return x.reshape(()) if x is not None and ndim == 3 and x.shape == (1,) else x

    out, lse = flash_attention(
        query,
        key,
        value,
        bias=full_rank("bias", bias),
        mask=full_rank("mask", mask),
        scale=scale,
        is_causal=is_causal,
        causal_alignment="top_left",
        local_window_size=local_window_size,
        query_seq_lengths=lengths("query_seq_lengths", query_seq_lengths),
        key_value_seq_lengths=lengths("key_value_seq_lengths", key_value_seq_lengths),
        return_lse=True,
    )
    return (out, jnp.swapaxes(lse, -1, -2)) if _checks.flag("return_residual", return_residual) else out
