"""The four functions of FlashAttention's own C++ interface, made functional: views on the same two custom calls.

Argument names and their meaning are those of FlashAttention's ``mha_fwd``, ``mha_varlen_fwd``, ``mha_bwd`` and
``mha_varlen_bwd``. Outputs are returned instead of written to buffers, and a dropout generator becomes either a JAX key
or the Philox state that an earlier forward returned. Causality and windows are aligned bottom-right. Dtypes and the
errors of GPUs are those of ``flash_attention``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_flash import _checks
from jax_flash._attrs import NO_DROPOUT, Attrs
from jax_flash._autodiff import attend, backward, dropout_stream, probabilities

Arrays = dict[str, jax.Array]


class Forward(NamedTuple):
    """What the forwards return.

    Attributes:
      out: as q, with the head dim of v.
      softmax_lse: float32 ``[B, N, T]``, or ``[N, total_q]`` if packed.
      philox_seed: uint32 ``[2]``, zeros without dropout.
      philox_offset: uint32 ``[]``.
      S_dmask: float32 ``[B, N, T, S]``, or ``[B, N, max_seqlen_q, max_seqlen_k]`` if packed: the probabilities,
        negative where dropped and not rescaled. Empty ``[0]`` unless ``return_softmax``.
    """

    out: jax.Array
    softmax_lse: jax.Array
    philox_seed: jax.Array
    philox_offset: jax.Array
    S_dmask: jax.Array


class Backward(NamedTuple):
    """What the backwards return: gradients, and ``softmax_d`` = rowsum(dout * out), float32, shaped as the LSE."""

    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
    softmax_d: jax.Array


def mha_fwd(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    alibi_slopes: ArrayLike | None = None,
    p_dropout: float = 0.0,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    return_softmax: bool = False,
    *,
    dropout_key: ArrayLike | None = None,
    philox_seed: ArrayLike | None = None,
    philox_offset: ArrayLike | None = None,
) -> Forward:
    """Dense forward. ``out`` and ``softmax_lse`` are differentiable, as in ``flash_attention``.

    Args:
      q: ``[B, T, N, H]``.
      k: ``[B, S, K, H]``.
      v: ``[B, S, K, D]``.
      alibi_slopes: float32 ``[N]`` or ``[B, N]``.
      p_dropout: in [0, 1).
      softmax_scale: 1/sqrt(H) if None.
      is_causal: bottom-right.
      window_size_left: -1 for unbounded.
      window_size_right: -1 for unbounded.
      softcap: 0 for none.
      return_softmax: also return the probabilities (for tests: they take [B, N, T, S] of memory).
      dropout_key: a JAX key; this or the Philox state is needed with p_dropout > 0.
      philox_seed: uint32 ``[2]``, as an earlier forward returned it: the same mask again.
      philox_offset: uint32 ``[]``, likewise.

    Returns:
      A ``Forward``.

    Raises:
      ValueError: an argument is wrong; the message names it.
      NotImplementedError: as ``flash_attention``.
    """
    dropout = _dropout_state(p_dropout, dropout_key, philox_seed, philox_offset, _FORWARD_NEEDS)
    attrs, operands = _dense(
        q, k, v, alibi_slopes, softmax_scale, is_causal, (window_size_left, window_size_right), softcap, dropout,
    )  # fmt: skip
    return _forward(attrs, operands, return_softmax, dropout)


def mha_varlen_fwd(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike | None = None,
    seqused_k: ArrayLike | None = None,
    block_table: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    p_dropout: float = 0.0,
    softmax_scale: float | None = None,
    zero_tensors: bool = False,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    return_softmax: bool = False,
    *,
    dropout_key: ArrayLike | None = None,
    philox_seed: ArrayLike | None = None,
    philox_offset: ArrayLike | None = None,
) -> Forward:
    """Forward over packed sequences, or packed queries over pages.

    Args:
      q: ``[total_q, N, H]``.
      k: ``[total_k, K, H]``, or pages ``[num_blocks, block_size, K, H]`` with ``block_table``.
      v: likewise, with D.
      cu_seqlens_q: int32 ``[B + 1]``.
      cu_seqlens_k: int32 ``[B + 1]``; with ``block_table`` only its differences count, and only if ``seqused_k`` is
        None.
      seqused_k: int32 ``[B]``, keys used of each sequence.
      block_table: int32 ``[B, max_blocks]``.
      alibi_slopes: float32 ``[N]`` or ``[B, N]``.
      max_seqlen_q: Python int, needed: at least the longest sequence, whose results are else unspecified.
      max_seqlen_k: likewise.
      p_dropout: in [0, 1).
      softmax_scale: 1/sqrt(H) if None.
      zero_tensors: accepted, without effect: every element of the result is defined.
      is_causal: bottom-right, by each sequence's lengths.
      window_size_left: -1 for unbounded.
      window_size_right: -1 for unbounded.
      softcap: 0 for none.
      return_softmax: as in ``mha_fwd``.
      dropout_key: as in ``mha_fwd``.
      philox_seed: as in ``mha_fwd``.
      philox_offset: as in ``mha_fwd``.

    Returns:
      A ``Forward``.

    Raises:
      ValueError: an argument is wrong; the message names it.
      NotImplementedError: as ``flash_attention``; differentiation with ``block_table``.
    """
    del zero_tensors
    dropout = _dropout_state(p_dropout, dropout_key, philox_seed, philox_offset, _FORWARD_NEEDS)
    attrs, operands = _packed(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, alibi_slopes, max_seqlen_q, max_seqlen_k,
        softmax_scale, is_causal, (window_size_left, window_size_right), softcap, dropout,
    )  # fmt: skip
    return _forward(attrs, operands, return_softmax, dropout)


def mha_bwd(
    dout: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    out: ArrayLike,
    softmax_lse: ArrayLike,
    alibi_slopes: ArrayLike | None = None,
    p_dropout: float = 0.0,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    *,
    philox_seed: ArrayLike | None = None,
    philox_offset: ArrayLike | None = None,
) -> Backward:
    """Dense backward.

    Args:
      dout: cotangent of ``out``, ``[B, T, N, D]``.
      q: as in ``mha_fwd``, and so are the arguments not named here.
      k: see there.
      v: see there.
      out: result of ``mha_fwd``.
      softmax_lse: result of ``mha_fwd``.
      alibi_slopes: see there.
      p_dropout: see there.
      softmax_scale: see there.
      is_causal: see there.
      window_size_left: see there.
      window_size_right: see there.
      softcap: see there.
      deterministic: the result must be bitwise equal from run to run.
      philox_seed: result of ``mha_fwd``; needed with p_dropout > 0.
      philox_offset: likewise.

    Returns:
      A ``Backward``.

    Raises:
      ValueError: an argument is wrong; the message names it.
      NotImplementedError: differentiation of the result.
    """
    dropout = _dropout_state(p_dropout, None, philox_seed, philox_offset, _BACKWARD_NEEDS)
    attrs, operands = _dense(
        q, k, v, alibi_slopes, softmax_scale, is_causal, (window_size_left, window_size_right), softcap, dropout,
        deterministic=_checks.flag("deterministic", deterministic),
    )  # fmt: skip
    return _backward(attrs, operands, dout, out, softmax_lse)


def mha_varlen_bwd(
    dout: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    out: ArrayLike,
    softmax_lse: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    alibi_slopes: ArrayLike | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    p_dropout: float = 0.0,
    softmax_scale: float | None = None,
    zero_tensors: bool = False,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    *,
    seqused_k: ArrayLike | None = None,
    philox_seed: ArrayLike | None = None,
    philox_offset: ArrayLike | None = None,
) -> Backward:
    """Backward over packed sequences.

    Args:
      dout: cotangent of ``out``, ``[total_q, N, D]``.
      q: as in ``mha_varlen_fwd``, and so are the arguments not named here.
      k: see there.
      v: see there.
      out: result of ``mha_varlen_fwd``.
      softmax_lse: result of ``mha_varlen_fwd``.
      cu_seqlens_q: see there.
      cu_seqlens_k: see there.
      alibi_slopes: see there.
      max_seqlen_q: see there.
      max_seqlen_k: see there.
      p_dropout: see there.
      softmax_scale: see there.
      zero_tensors: accepted, without effect.
      is_causal: see there.
      window_size_left: see there.
      window_size_right: see there.
      softcap: see there.
      deterministic: the result must be bitwise equal from run to run.
      seqused_k: what ``mha_varlen_fwd`` was given.
      philox_seed: result of ``mha_varlen_fwd``; needed with p_dropout > 0.
      philox_offset: likewise.

    Returns:
      A ``Backward``.

    Raises:
      ValueError: an argument is wrong; the message names it.
      NotImplementedError: differentiation of the result.
    """
    del zero_tensors
    dropout = _dropout_state(p_dropout, None, philox_seed, philox_offset, _BACKWARD_NEEDS)
    attrs, operands = _packed(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, None, alibi_slopes, max_seqlen_q, max_seqlen_k,
        softmax_scale, is_causal, (window_size_left, window_size_right), softcap, dropout,
        deterministic=_checks.flag("deterministic", deterministic),
    )  # fmt: skip
    return _backward(attrs, operands, dout, out, softmax_lse)


_FORWARD_NEEDS = "`dropout_key` is needed with {}: pass jax.random.key(seed), or the state of an earlier forward."
_BACKWARD_NEEDS = "`philox_seed` and `philox_offset` are needed with {}: pass what the forward returned."


class _Dropout(NamedTuple):
    """Threshold of ``Attrs.keep_threshold``, seed uint32 [2] and offset uint32 []; zeros where nothing is dropped."""

    keep_threshold: int
    seed: jax.Array
    offset: jax.Array


def _dropout_state(p_dropout: Any, dropout_key: Any, philox_seed: Any, philox_offset: Any, needed: str) -> _Dropout:
    """From a JAX key or the Philox state; ``needed`` is the message where both are missing."""
    if (philox_seed is None) != (philox_offset is None):
        raise ValueError("`philox_seed` and `philox_offset` must be given together.")
    if dropout_key is not None and philox_seed is not None:
        raise ValueError("give either `dropout_key` or `philox_seed` and `philox_offset`, not both.")
    offset = jnp.uint32(0)
    if philox_seed is not None:
        dropout_key = _checks.typed("philox_seed", philox_seed, jnp.uint32, (2,), "[2]")
        offset = _checks.typed("philox_offset", philox_offset, jnp.uint32, (), "[]")
    keep_threshold, words = _checks.dropout(p_dropout, dropout_key, "p_dropout", needed)
    return _Dropout(keep_threshold, jnp.zeros(2, jnp.uint32) if words is None else words, offset)


def _common(operands: Arrays, softmax_scale, is_causal, window, softcap, dropout: _Dropout, batch, **fields):
    """Attributes, and the dropout operand added to ``operands``."""
    query = operands["query"]
    sides = zip(("window_size_left", "window_size_right"), window, strict=True)
    window = tuple(_checks.integer(name, side, -1) for name, side in sides)
    if dropout.keep_threshold < NO_DROPOUT:
        operands["dropout_stream"] = dropout_stream(dropout.seed, batch, query.shape[-2], offset=dropout.offset)
    attrs = _checks.attrs(
        query.shape[-1],
        scale=softmax_scale,
        is_causal=is_causal,
        local_window_size=window,
        logits_soft_cap=None if _checks.number("softcap", softcap) == 0 else softcap,
        names=("softmax_scale", "softcap"),
        keep_threshold=dropout.keep_threshold,
        **fields,
    )
    return attrs, operands


def _dense(
    q, k, v, alibi_slopes, softmax_scale, is_causal, window, softcap, dropout: _Dropout, **fields
) -> tuple[Attrs, Arrays]:  # fmt: skip
    q, k, v = _checks.qkv(q, k, v, names=("q", "k", "v"))
    _checks.shape("q", q, (None,) * 4, "[B, T, N, H]")
    batch = _checks.batch_axes(q, k)
    operands = {"query": q, "key": k, "value": v}
    if alibi_slopes is not None:
        operands["alibi_slopes"] = _checks.alibi_slopes(alibi_slopes, q.shape[-2], batch)
    return _common(operands, softmax_scale, is_causal, window, softcap, dropout, batch, **fields)


def _packed(
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, alibi_slopes, max_seqlen_q, max_seqlen_k,
    softmax_scale, is_causal, window, softcap, dropout: _Dropout, **fields,
) -> tuple[Attrs, Arrays]:  # fmt: skip
    q, k, v = _checks.qkv(q, k, v, names=("q", "k", "v"))
    _checks.shape("q", q, (None,) * 3, "[total_q, N, H]")
    operands = {"query": q, "key": k, "value": v, "cu_seqlens_q": _checks.cu_seqlens("cu_seqlens_q", cu_seqlens_q)}
    num_sequences = operands["cu_seqlens_q"].shape[0] - 1
    if cu_seqlens_k is not None:
        cu_seqlens_k = _checks.cu_seqlens("cu_seqlens_k", cu_seqlens_k, num_sequences + 1)
    if seqused_k is not None:
        operands["key_value_seq_lengths"] = _checks.int32("seqused_k", seqused_k, (num_sequences,), "[B]")
    if block_table is None:
        _checks.shape("k", k, (None,) * 3, "[total_k, K, H] (without block_table)")
        if cu_seqlens_k is None:
            raise ValueError("`cu_seqlens_k` is needed without `block_table`.")
        operands["cu_seqlens_kv"] = cu_seqlens_k
    else:
        _checks.shape("k", k, (None,) * 4, "[num_blocks, block_size, K, H] (with block_table)")
        _checks.page_size("k", k)
        operands["page_table"] = _checks.int32("block_table", block_table, (num_sequences, None), "[B, max_blocks]")
        if seqused_k is None:
            if cu_seqlens_k is None:
                raise ValueError("with `block_table` one of `seqused_k` and `cu_seqlens_k` is needed for the lengths.")
            operands["key_value_seq_lengths"] = jnp.diff(cu_seqlens_k)
    if alibi_slopes is not None:
        operands["alibi_slopes"] = _checks.alibi_slopes(alibi_slopes, q.shape[-2], (num_sequences,))
    return _common(
        operands, softmax_scale, is_causal, window, softcap, dropout, (),
        max_seqlen_q=_checks.integer("max_seqlen_q", max_seqlen_q, 0),
        max_seqlen_kv=_checks.integer("max_seqlen_k", max_seqlen_k, 0),
        **fields,
    )  # fmt: skip


def _forward(attrs: Attrs, operands: Arrays, return_softmax: bool, dropout: _Dropout) -> Forward:
    out, lse = attend(attrs, operands)
    return_softmax = _checks.flag("return_softmax", return_softmax)
    softmax = probabilities(attrs, operands) if return_softmax else jnp.zeros(0, jnp.float32)
    return Forward(out, lse, dropout.seed, dropout.offset, softmax)


def _backward(attrs: Attrs, operands: Arrays, dout: Any, out: Any, softmax_lse: Any) -> Backward:
    q, v = operands["query"], operands["value"]
    out_shape, lse_shape = (*q.shape[:-1], v.shape[-1]), (*q.shape[:-3], q.shape[-2], q.shape[-3])
    operands["d_out"] = _checks.typed("dout", dout, q.dtype, out_shape, "[..., N, D]")
    operands["out"] = _checks.typed("out", out, q.dtype, out_shape, "[..., N, D]")
    operands["lse"] = _checks.typed("softmax_lse", softmax_lse, jnp.float32, lse_shape, "[..., N, T]")
    operands["d_lse"] = jnp.zeros_like(operands["lse"])
    results = backward(attrs, operands)
    return Backward(results["query"], results["key"], results["value"], results["delta"])
