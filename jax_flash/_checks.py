"""Errors about arguments, raised while tracing. Each check returns its argument in the form the call needs.

``ValueError``: the argument is wrong; the message says what was expected and what came. ``NotImplementedError``: it is
right but unsupported; the message says what is supported.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_flash._attrs import MAX_BATCH_AXES, MAX_HEAD_DIM, NO_DROPOUT, Attrs

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def array(name: str, x: Any) -> jax.Array:
    """``x`` as a jax array; NumPy arrays are welcome everywhere."""
    if x is None or isinstance(x, (str, bool)):
        raise ValueError(f"`{name}` must be an array, got {x!r}.")
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must be an array, got {type(x).__name__}: {error}") from error


def shape(name: str, x: jax.Array, expected: tuple[int | None, ...], axes: str) -> jax.Array:
    """Requires ``expected``, in which None stands for any size; ``axes`` names them, as in "[B, T, N, H]"."""
    if len(x.shape) != len(expected) or any(e is not None and e != s for e, s in zip(expected, x.shape, strict=True)):
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"`{name}` must have shape {axes} = [{wanted}], got {list(x.shape)}.")
    return x


def dtype(name: str, x: jax.Array, expected: Any) -> jax.Array:
    if x.dtype != expected:
        raise ValueError(f"`{name}` must be {jnp.dtype(expected).name}, got {x.dtype.name}.")
    return x


def qkv(
    query: Any, key: Any, value: Any, names: tuple[str, str, str] = ("query", "key", "value")
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Dtypes, head counts and head dims; what stands in front of [rows, heads, dim] is the caller's to check."""
    q, k, v = (array(name, x) for name, x in zip(names, (query, key, value), strict=True))
    for name, x in zip(names, (q, k, v), strict=True):
        if x.ndim < 3:
            raise ValueError(f"`{name}` must have at least 3 axes [..., length, heads, head_dim], got {list(x.shape)}.")
        if x.dtype not in _DTYPES:
            raise NotImplementedError(
                f"`{name}` has dtype {x.dtype.name}; supported are float32, bfloat16 and float16. Cast it first."
            )
        if x.dtype != q.dtype:
            dtypes = ", ".join(y.dtype.name for y in (q, k, v))
            raise ValueError(f"{names[0]}, {names[1]} and {names[2]} must have one dtype, got {dtypes}.")
        if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            raise NotImplementedError(
                f"`{name}` has head dim {x.shape[-1]}; supported are 1 to {MAX_HEAD_DIM} (shape {list(x.shape)})."
            )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same head dim, got {q.shape[-1]} and {k.shape[-1]} "
            f"(shapes {list(q.shape)} and {list(k.shape)})."
        )
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"{names[1]} and {names[2]} must agree in all axes but the last, got {list(k.shape)} and {list(v.shape)}."
        )
    heads, heads_kv = q.shape[-2], k.shape[-2]
    if heads == 0 or heads_kv == 0 or heads % heads_kv:
        raise ValueError(
            "the number of query heads must be a multiple of the number of key/value heads, got "
            f"{heads} and {heads_kv}."
        )
    return q, k, v


def batch_axes(query: jax.Array, key: jax.Array) -> tuple[int, ...]:
    """The leading axes of dense arguments, which must agree."""
    if query.shape[:-3] != key.shape[:-3]:
        raise ValueError(
            "query and key/value must agree in their leading (batch) axes, got "
            f"{list(query.shape)} and {list(key.shape)}."
        )
    if query.ndim - 3 > MAX_BATCH_AXES:
        raise NotImplementedError(
            f"at most {MAX_BATCH_AXES} leading (batch) axes are supported, got {query.ndim - 3}; reshape them into one."
        )
    return query.shape[:-3]


def _received(x: Any) -> str:
    """What came in place of a static value, and what to do where that is an array."""
    if isinstance(x, Tracer):
        return "a traced array (under jit: mark the argument static, as with static_argnames)"
    if isinstance(x, (jax.Array, np.ndarray)):
        return "an array (pass x.item())"
    return f"{type(x).__name__}: {x!r}"


def number(name: str, x: Any) -> float:
    """A static Python number: it is compiled into the call."""
    if isinstance(x, (bool, np.bool_)) or not isinstance(x, (numbers.Real, np.floating, np.integer)):
        raise ValueError(f"`{name}` must be a Python number known when tracing, got {_received(x)}.")
    try:
        return float(x)
    except OverflowError:
        return math.inf


def integer(name: str, x: Any, minimum: int) -> int:
    wanted = f"`{name}` must be a Python int from {minimum} to 2**31 - 1, known when tracing"
    if isinstance(x, bool) or not isinstance(x, (int, np.integer)):
        raise ValueError(f"{wanted}, got {_received(x)}.")
    if not minimum <= x < 2**31:
        raise ValueError(f"{wanted}, got {x}.")
    return int(x)


def flag(name: str, x: Any) -> bool:
    if not isinstance(x, (bool, np.bool_)):
        raise ValueError(f"`{name}` must be True or False, known when tracing, got {_received(x)}.")
    return bool(x)


def _fits_float32(x: float) -> bool:
    """Also as a multiple of log2(e), in which the kernels reckon."""
    return abs(x) <= float(np.finfo(np.float32).max) / 1.5


def _scale(name: str, x: float | None, head_dim: int) -> float:
    if x is None:
        return 1 / math.sqrt(head_dim)
    value = number(name, x)
    if not _fits_float32(value):
        raise ValueError(f"`{name}` must be finite in float32, got {x}.")
    return value


def _soft_cap(name: str, x: float | None) -> float:
    if x is None:
        return 0.0
    value = number(name, x)
    if not (value >= float(np.finfo(np.float32).tiny) and _fits_float32(value)):
        raise ValueError(f"`{name}` must be positive and finite in float32, or None for no cap, got {x}.")
    return value


def window(local_window_size: Any, is_causal: bool) -> tuple[int, int]:
    """(left, right) with -1 for unbounded; causal forces right to 0."""
    sides = local_window_size
    if sides is None:
        sides = (-1, -1)
    elif isinstance(sides, (int, np.integer)) and not isinstance(sides, bool):
        sides = (sides, sides)
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        raise ValueError(
            "`local_window_size` must be None, an int, or a pair (left, right) of ints, "
            f"got {_received(local_window_size)}."
        )
    left, right = (-1 if side is None else integer("local_window_size", side, -1) for side in sides)
    return left, 0 if is_causal else right


def _is_bottom_right(causal_alignment: str) -> bool:
    """True for bottom-right."""
    if not isinstance(causal_alignment, str) or causal_alignment not in ("bottom_right", "top_left"):
        raise ValueError(f'`causal_alignment` must be "bottom_right" or "top_left", got {causal_alignment!r}.')
    return causal_alignment == "bottom_right"


def attrs(
    head_dim: int,
    *,
    scale: float | None,
    is_causal: bool,
    local_window_size: Any,
    logits_soft_cap: float | None,
    causal_alignment: str = "bottom_right",
    names: tuple[str, str] = ("scale", "logits_soft_cap"),
    **fields: Any,
) -> Attrs:
    """``Attrs`` from the arguments that all entry points share.

    Args:
      head_dim: of query and key, for the default scale.
      scale: see ``flash_attention``, and so are those up to ``causal_alignment``.
      is_causal: see there.
      local_window_size: see there.
      logits_soft_cap: see there.
      causal_alignment: see there.
      names: what the entry point calls scale and logits_soft_cap.
      **fields: passed on as they are.
    """
    left, right = window(local_window_size, flag("is_causal", is_causal))
    return Attrs(
        scale=_scale(names[0], scale, head_dim),
        logits_soft_cap=_soft_cap(names[1], logits_soft_cap),
        window_left=left,
        window_right=right,
        bottom_right=_is_bottom_right(causal_alignment),
        **fields,
    )


def scores_like(name: str, x: Any, expected: tuple[int, ...]) -> jax.Array:
    """bias or mask: ``expected`` = [..., N, T, S], each axis full or 1."""
    x = array(name, x)
    if x.ndim != len(expected) or any(s not in (1, e) for s, e in zip(x.shape, expected, strict=True)):
        raise ValueError(
            f"`{name}` must have shape [..., N, T, S] = {list(expected)}, any axis of which may be 1, "
            f"got {list(x.shape)}."
        )
    return x


def bias(x: Any, expected: tuple[int, ...]) -> jax.Array:
    x = scores_like("bias", x, expected)
    if x.dtype not in _DTYPES:
        raise ValueError(f"`bias` must be float32, bfloat16 or float16, got {x.dtype.name}.")
    return x


def mask(x: Any, expected: tuple[int, ...]) -> jax.Array:
    x = scores_like("mask", x, expected)
    if x.dtype != jnp.bool_:
        raise ValueError(
            f"`mask` must be bool (True = attend), got {x.dtype.name}. An additive mask is a `bias`; 0/1 integers "
            "become a mask by `mask != 0`."
        )
    return x


def alibi_slopes(x: Any, heads: int, batch: tuple[int, ...]) -> jax.Array:
    """float32 [N] or [*batch, N]; returned with all batch axes, of size 1 where shared."""
    x = dtype("alibi_slopes", array("alibi_slopes", x), jnp.float32)
    if x.shape == (heads,):
        return x.reshape((1,) * len(batch) + (heads,))
    return shape("alibi_slopes", x, (*batch, heads), "[N] or [batch, N]")


def sinks(x: Any, heads: int, num_batch_axes: int) -> jax.Array:
    """float32 [N]; returned with all batch axes, of size 1."""
    x = typed("sinks", x, jnp.float32, (heads,), "[N]")
    return x.reshape((1,) * num_batch_axes + (heads,))


def typed(name: str, x: Any, wanted: Any, expected: tuple[int | None, ...], axes: str) -> jax.Array:
    """``x`` as an array of dtype ``wanted`` and of the shape that ``shape`` describes."""
    return shape(name, dtype(name, array(name, x), wanted), expected, axes)


def int32(name: str, x: Any, expected: tuple[int | None, ...], axes: str) -> jax.Array:
    return typed(name, x, jnp.int32, expected, axes)


def segment_ids(query_ids: Any, key_ids: Any, query: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
    if query_ids is None and key_ids is None:
        return {}
    if query_ids is None or key_ids is None:
        raise ValueError("`query_segment_ids` and `key_value_segment_ids` must be given together.")
    return {
        "query_segment_ids": int32("query_segment_ids", query_ids, query.shape[:-2], "[..., T]"),
        "key_value_segment_ids": int32("key_value_segment_ids", key_ids, key.shape[:-2], "[..., S]"),
    }


def page_size(name: str, pages: jax.Array) -> None:
    if pages.shape[1] == 0:
        raise ValueError(f"`{name}` must have a page size of at least 1, got shape {list(pages.shape)}.")


def cu_seqlens(name: str, x: Any, size: int | None = None) -> jax.Array:
    x = int32(name, x, (size,), "[B + 1]")
    if x.shape[0] == 0:
        raise ValueError(f"`{name}` must hold at least one offset ([0] for an empty batch), got shape [0].")
    return x


def dropout(
    rate: Any,
    key: Any,
    rate_name: str = "dropout_rate",
    needed: str = "`dropout_key` is needed with {}: pass jax.random.key(seed).",
) -> tuple[int, jax.Array | None]:
    """The keep threshold of 256 and the key as two uint32 words, or (256, None) where nothing is dropped.

    ``needed`` is the message for a missing key, with a place for the rate.
    """
    rate = number(rate_name, rate)
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"`{rate_name}` must be in [0, 1), got {rate}.")
    if rate == 0.0:
        return NO_DROPOUT, None
    if key is None:
        raise ValueError(needed.format(f"{rate_name} = {rate}"))
    threshold = max(1, round(NO_DROPOUT * (1.0 - rate)))
    words = _key_words(key)
    return (threshold, words) if threshold < NO_DROPOUT else (NO_DROPOUT, None)


def _key_words(key: Any) -> jax.Array:
    key = array("dropout_key", key)
    words = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    if words.dtype != jnp.uint32 or words.ndim != 1 or words.shape[0] < 2:
        raise ValueError(
            "`dropout_key` must be one key of jax.random.key, or a raw uint32 key of shape [2], got "
            f"{key.dtype} of shape {list(key.shape)}."
        )
    # Longer keys ("rbg" has four words) are folded to two; keys of two words are taken as they are.
    folded = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
    for word in words[2:]:
        folded = jax.random.fold_in(folded, word)
    return jax.random.key_data(folded)
