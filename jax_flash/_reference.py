"""Attention in plain jnp, T x S matrix and all: the definition of what the kernels compute, and the tests' oracle."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def visible(
    seqlen_q: int,
    seqlen_kv: int,
    query_length: jax.Array | int,
    key_length: jax.Array | int,
    window: tuple[int, int],
    bottom_right: bool,
) -> jax.Array:
    """Boolean ``[seqlen_q, seqlen_kv]``: the positional mask of one sequence of the given lengths."""
    i, j = jnp.arange(seqlen_q)[:, None], jnp.arange(seqlen_kv)[None, :]
    diagonal = i + (key_length - query_length if bottom_right else 0)
    left, right = window
    seen = (i < query_length) & (j < key_length)
    if left >= 0:
        seen &= j >= diagonal - left
    if right >= 0:
        seen &= j <= diagonal + right
    return seen


def attention(
    query,
    key,
    value,
    *,
    bias=None,
    mask=None,
    scale=None,
    window=(-1, -1),
    bottom_right=True,
    logits_soft_cap=None,
    alibi_slopes=None,
    sinks=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    query_segment_ids=None,
    key_value_segment_ids=None,
    keep=None,
    keep_probability=1.0,
    dtype=jnp.float32,
):
    """Returns ``out [B, T, N, D]``, ``lse [B, N, T]`` and the probabilities ``[B, N, T, S]`` before dropout.

    Arguments are those of ``flash_attention`` with one batch axis, but ``window`` is (left, right) with -1 for
    unbounded, ``alibi_slopes`` may be [N] or [B, N], and ``keep`` is the dropout mask itself, bool [B, N, T, S].
    ``dtype`` is that of all arithmetic: float32 or float64 for a reference, the inputs' own dtype for the error that
    arithmetic in this precision would make.
    """
    batch, seqlen_q, num_heads, head_dim = query.shape
    seqlen_kv, num_heads_kv = key.shape[1:3]
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    query_lengths = jnp.full(batch, seqlen_q) if query_seq_lengths is None else query_seq_lengths
    key_lengths = jnp.full(batch, seqlen_kv) if key_value_seq_lengths is None else key_value_seq_lengths

    # Keys past their length must not reach the result even if NaN, and a product with 0 would let them.
    exists = (jnp.arange(seqlen_kv) < key_lengths[:, None])[:, :, None, None]
    key, value = jnp.where(exists, key, 0), jnp.where(exists, value, 0)
    key = jnp.repeat(key, num_heads // num_heads_kv, axis=2)
    value = jnp.repeat(value, num_heads // num_heads_kv, axis=2)

    scores = jnp.einsum("btnh,bsnh->bnts", query, key) * scale
    if logits_soft_cap is not None:
        scores = logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
    if alibi_slopes is not None:
        i, j = jnp.arange(seqlen_q)[:, None], jnp.arange(seqlen_kv)[None, :]
        offset = (key_lengths - query_lengths if bottom_right else jnp.zeros_like(key_lengths))[:, None, None, None]
        slopes = jnp.broadcast_to(alibi_slopes, (batch, num_heads))[:, :, None, None]
        scores -= (slopes * jnp.abs(i + offset - j)).astype(dtype)
    if bias is not None:
        scores += bias.astype(dtype)

    seen = jax.vmap(lambda q, k: visible(seqlen_q, seqlen_kv, q, k, window, bottom_right))(query_lengths, key_lengths)
    seen = jnp.broadcast_to(seen[:, None], scores.shape)
    if mask is not None:
        seen &= mask
    if query_segment_ids is not None and key_value_segment_ids is not None:
        seen &= query_segment_ids[:, None, :, None] == key_value_segment_ids[:, None, None, :]

    scores = jnp.where(seen, scores, -jnp.inf)
    maximum = jnp.max(scores, axis=-1, initial=-jnp.inf)
    row_exists = (jnp.arange(seqlen_q) < query_lengths[:, None])[:, None]  # [B, 1, T]
    if sinks is not None:
        sinks = jnp.where(row_exists, sinks[:, None].astype(dtype), -jnp.inf)
        maximum = jnp.maximum(maximum, sinks)
    origin = jax.lax.stop_gradient(jnp.where(jnp.isneginf(maximum), 0, maximum))
    weights = jnp.where(seen, jnp.exp(scores - origin[..., None]), 0)
    total = weights.sum(-1)
    if sinks is not None:
        total += jnp.exp(sinks - origin)
    sees_none = total == 0
    safe_total = jnp.where(sees_none, 1, total)
    probabilities = weights / safe_total[..., None]
    lse = jnp.where(sees_none, -jnp.inf, origin + jnp.log(safe_total))
    dropped = probabilities if keep is None else jnp.where(keep, probabilities, 0) / keep_probability
    return jnp.einsum("bnts,bsnd->btnd", dropped, value), lse, probabilities
