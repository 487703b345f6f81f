"""FlashAttention for Flax NNX: an ``attention_fn`` for Flax's own layer, and a ``SelfAttention`` layer.

Nothing in ``jax_flash`` imports this module, so Flax stays an optional dependency. ``attention_fn`` and
``cached_attention`` are functions of arrays alone; ``jax_flash.linen`` uses the same two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_kernel_init
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import Array, lax
from jax.core import Tracer

import jax_flash

__all__ = ["SelfAttention", "attention_fn", "cached_attention"]

# Nothing here asks for the log-sum-exp, so what comes back is one array.
flash_attention = cast(Callable[..., Array], jax_flash.flash_attention)


def attention_fn(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Dtype | None = None,
    precision: PrecisionLike = None,
    module: Any = None,
    *,
    is_causal: bool = False,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Array] | None = None,
    qk_attn_weights_einsum: Callable[..., Array] | None = None,
    attn_weights_value_einsum: Callable[..., Array] | None = None,
    promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
) -> Array:
    """FlashAttention with the signature of Flax's ``dot_product_attention``, of NNX and of Linen.

    Pass it as ``attention_fn=`` to ``flax.nnx.MultiHeadAttention`` or ``flax.linen.MultiHeadDotProductAttention``.
    Every keyword that either of them passes is named here, because Linen silently drops those that a signature lacks.
    What cannot be honoured raises. Three things differ from Flax's own function: a query that may see no key gives 0
    (Flax: the mean of all values), the dropout bits are those of jax_flash, and the softmax is in float32 always.

    Args:
      query: ``[..., T, N, H]``.
      key: ``[..., S, K, H]`` with ``N % K == 0``.
      value: ``[..., S, K, D]``.
      bias: broadcasts to ``[..., N, T, S]``; added to the scaled scores.
      mask: broadcasts to ``[..., N, T, S]``; nonzero = attend, whatever its dtype.
      broadcast_dropout: share one ``[T, S]`` dropout mask among all batch entries and heads, as Flax does.
      dropout_rng: JAX key, typed or raw; needed when ``dropout_rate > 0`` and not ``deterministic``.
      dropout_rate: probability, in [0, 1), that an attention weight is dropped.
      deterministic: True switches dropout off. (This is Flax's word; it is not about bitwise reproducibility.)
      dtype: cast ``query``, ``key`` and ``value`` to this first; None means their common dtype.
      precision: None or a ``jax.lax.Precision``. All of them hold: float32 inputs are computed in float32, and 16-bit
        inputs are multiplied exactly and accumulated in float32. Dot algorithms are refused.
      module: must be None; Flax passes a module when asked to sow the attention weights.
      is_causal: query ``i`` sees key ``j`` only where ``j <= i`` (top-left, as in ``jax.nn.dot_product_attention``).
      force_fp32_for_softmax: accepted; the softmax is in float32 in any case.
      einsum_dot_general: must be None; no einsum takes place.
      qk_attn_weights_einsum: must be None; no einsum takes place.
      attn_weights_value_einsum: must be None; no einsum takes place.
      promote_dtype: called as ``promote_dtype((query, key, value), dtype=dtype)``, which is the convention of NNX.

    Returns:
      ``[..., T, N, D]`` in the dtype that ``promote_dtype`` arrives at.

    Raises:
      NotImplementedError: for a ``module``, an einsum override or a dot algorithm.
      ValueError: if dropout has no key, or if the shapes do not fit (see ``jax_flash.flash_attention``).

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jax_flash.nnx import attention_fn
      >>> layer = nnx.MultiHeadAttention(2, 16, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 8, 16)), mask=nnx.make_causal_mask(jnp.ones((1, 8)))).shape
      (1, 8, 16)
    """
    del force_fp32_for_softmax  # There is no other kind of softmax here.
    if module is not None:
        raise NotImplementedError(
            f"attention_fn: expected module=None, received {type(module).__name__}: the attention weights are never "
            "formed. Drop sow_weights=True, or look at them with Flax's own dot_product_attention."
        )
    overrides = {
        "einsum_dot_general": einsum_dot_general,
        "qk_attn_weights_einsum": qk_attn_weights_einsum,
        "attn_weights_value_einsum": attn_weights_value_einsum,
    }
    for name, override in overrides.items():
        if override is not None:
            raise NotImplementedError(
                f"attention_fn: expected {name}=None, received {override!r}: attention is one fused kernel, without an "
                "einsum to override. Use Flax's own dot_product_attention for a custom einsum."
            )
    if not _is_plain_precision(precision):
        raise NotImplementedError(
            f"attention_fn: expected precision to be None or a jax.lax.Precision, received {precision!r}: float32 "
            "inputs are computed in float32, 16-bit inputs accumulate in float32. Drop precision, or choose by dtype."
        )
    dropout_active = dropout_rate > 0.0 and not deterministic
    if dropout_active and dropout_rng is None:
        raise ValueError(
            f"attention_fn: dropout_rate={dropout_rate} with deterministic=False expects dropout_rng to be a JAX key, "
            "received None. Pass a key, or deterministic=True to switch dropout off."
        )

    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    if mask is not None:
        mask = _pad_rank(jnp.asarray(mask).astype(bool), query.ndim)
    if bias is not None:
        bias = _pad_rank(jnp.asarray(bias), query.ndim)
    return flash_attention(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        is_causal=is_causal,
        causal_alignment="top_left",
        dropout_rate=dropout_rate if dropout_active else 0.0,
        dropout_key=dropout_rng if dropout_active else None,
        broadcast_dropout=broadcast_dropout and dropout_active,
    )


def cached_attention(
    query: Array,
    key: Array,
    value: Array,
    cached_key: Array,
    cached_value: Array,
    cache_index: Array,
    **options: Any,
) -> tuple[Array, Array, Array, Array]:
    """Appends new tokens to a key/value cache and attends, causally, to all tokens in it.

    It changes nothing in place: the cache after the call is returned, and XLA updates the buffers in place where the
    caller donates them.

    A call that does not fit raises where that can be known: always for ``T > max_length``, and for a full cache
    whenever ``cache_index`` is a concrete array. Under ``jit`` only the device knows the index; the output is then all
    NaN and the cache comes back unchanged, so that an overrun is seen and no token is overwritten.

    Args:
      query: ``[..., T, N, H]``, of the T >= 1 new tokens.
      key: ``[..., T, K, H]``, of the same tokens.
      value: ``[..., T, K, D]``, of the same tokens.
      cached_key: ``[..., max_length, K, H]``; may be of another dtype than ``key``, which is cast to it.
      cached_value: ``[..., max_length, K, D]``.
      cache_index: int32 scalar, the number of tokens that are in the cache.
      **options: further keywords of ``jax_flash.flash_attention``, such as ``local_window_size``.

    Returns:
      ``(out, cached_key, cached_value, cache_index)`` with ``out`` ``[..., T, N, D]`` in the dtype of ``query``.

    Raises:
      ValueError: if the shapes do not fit or the cache is too short.
    """
    *batch, num_tokens, num_heads_kv, head_dim = key.shape
    max_length = cached_key.shape[-3]
    if cached_key.shape != (*batch, max_length, num_heads_kv, head_dim):
        raise ValueError(
            f"decode: a cache of shape [..., max_length, K, H] = {cached_key.shape} expects new keys [..., T, K, H] of "
            f"the same batch and heads, received {key.shape}. Initialize the cache for this batch size."
        )
    used = 0 if isinstance(cache_index, Tracer) else int(cache_index)  # A tracer's value is left to ``fits`` below.
    if used + num_tokens > max_length:
        raise ValueError(
            f"decode: expected at most max_length - used = {max_length} - {used} = {max_length - used} new tokens, "
            f"received {num_tokens}. Initialize a longer cache, or an empty one for a new text."
        )

    fits = cache_index + num_tokens <= max_length

    def append(cache: Array, new: Array) -> Array:
        # dynamic_update_slice moves a slice that overruns back into range, so what lies there is written once more.
        old = lax.dynamic_slice_in_dim(cache, cache_index, num_tokens, axis=-3)
        new = jnp.where(fits, new.astype(cache.dtype), old)
        return lax.dynamic_update_slice_in_dim(cache, new, cache_index, axis=-3)

    cached_key, cached_value = append(cached_key, key), append(cached_value, value)
    cache_index = jnp.where(fits, cache_index + num_tokens, cache_index)
    out = flash_attention(
        query,
        cached_key.astype(query.dtype),
        cached_value.astype(query.dtype),
        # The last of the T queries aligns with the last token in the cache, not with the last slot of it.
        key_value_seq_lengths=jnp.broadcast_to(cache_index, batch).astype(jnp.int32),
        is_causal=True,
        causal_alignment="bottom_right",
        **options,
    )
    return jnp.where(fits, out, jnp.nan), cached_key, cached_value, cache_index


class SelfAttention(nnx.Module):
    """Multi-head self-attention with causal mask, sliding window, grouped-query heads and a decode cache.

    Its parameters have the names and shapes of those of ``flax.nnx.MultiHeadAttention``: checkpoints can be exchanged.

    To generate text, call ``init_cache`` and then ``layer(x, decode=True)`` with T >= 1 new tokens at a time: first a
    whole prompt, then single tokens. The outputs equal those of one causal call on the whole text. What happens at the
    end of the cache is told in ``cached_attention``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jax_flash.nnx import SelfAttention
      >>> layer = SelfAttention(4, 32, num_kv_heads=2, is_causal=True, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 16, 32))).shape
      (2, 16, 32)
      >>> layer.init_cache(batch_size=2, max_length=64)
      >>> layer(jnp.ones((2, 16, 32)), decode=True).shape, layer(jnp.ones((2, 1, 32)), decode=True).shape
      ((2, 16, 32), (2, 1, 32))
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        is_causal: bool = False,
        local_window_size: int | tuple[int, int] | None = None,
        logits_soft_cap: float | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        rngs: nnx.Rngs,
    ):
        """Creates the parameters; the cache comes into being with ``init_cache``.

        Args:
          num_heads: query heads, N.
          in_features: features of the input and of the output, F.
          num_kv_heads: key and value heads, K, with ``N % K == 0``; None means N.
          head_dim: features of a head, H; None means F / N.
          is_causal: a token sees itself and earlier tokens only. Decoding needs it.
          local_window_size: ``w`` or ``(left, right)``, as in ``jax_flash.flash_attention``.
          logits_soft_cap: as in ``jax_flash.flash_attention``.
          dropout_rate: dropout on the attention weights, in [0, 1).
          deterministic: True switches dropout off; ``Module.eval()`` and ``Module.train()`` set it.
          use_bias: whether the four projections have a bias.
          dtype: dtype of the computation; None means the common dtype of input and parameters.
          param_dtype: dtype of the parameters.
          kernel_init: initializer of the projections' kernels.
          rngs: streams for the parameters and, with ``dropout_rate > 0``, for "dropout".

        Raises:
          ValueError: if the numbers of heads and features do not divide.
        """
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(
                f"SelfAttention: expected num_heads to be a multiple of num_kv_heads, received num_heads={num_heads}, "
                f"num_kv_heads={num_kv_heads}. Choose numbers that divide."
            )
        if head_dim is None and in_features % num_heads:
            raise ValueError(
                "SelfAttention: expected in_features to be a multiple of num_heads, received "
                f"in_features={in_features}, num_heads={num_heads}. Give head_dim to choose a head's size yourself."
            )
        head_dim = in_features // num_heads if head_dim is None else head_dim

        def linear(in_features: Any, out_features: Any, axis: Any = -1) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                in_features,
                out_features,
                axis=axis,
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init,
                rngs=rngs,
            )

        self.query = linear(in_features, (num_heads, head_dim))
        self.key = linear(in_features, (num_kv_heads, head_dim))
        self.value = linear(in_features, (num_kv_heads, head_dim))
        self.out = linear((num_heads, head_dim), in_features, axis=(-2, -1))

        self.in_features, self.num_kv_heads, self.head_dim = in_features, num_kv_heads, head_dim
        self.is_causal = is_causal
        self.local_window_size = local_window_size
        self.logits_soft_cap = logits_soft_cap
        self.dropout_rate = dropout_rate
        self.deterministic = deterministic
        self.cache_dtype = param_dtype if dtype is None else dtype
        self.rngs: nnx.RngStream | None = rngs.dropout.fork() if dropout_rate > 0.0 else nnx.data(None)
        self.cached_key: nnx.Cache[Array] | None = nnx.data(None)
        self.cached_value: nnx.Cache[Array] | None = nnx.data(None)
        self.cache_index: nnx.Cache[Array] | None = nnx.data(None)

    def init_cache(self, batch_size: int | tuple[int, ...], max_length: int, dtype: Dtype | None = None) -> None:
        """Gives the layer an empty decode cache, in place of one that it may have.

        Args:
          batch_size: the leading axes of the inputs to come.
          max_length: the most tokens that the cache can hold.
          dtype: dtype of the cached keys and values; None means ``dtype`` of the layer, or else its ``param_dtype``.
        """
        batch = (batch_size,) if isinstance(batch_size, int) else tuple(batch_size)
        shape = (*batch, max_length, self.num_kv_heads, self.head_dim)
        self.cached_key = nnx.Cache(jnp.zeros(shape, dtype or self.cache_dtype))
        self.cached_value = nnx.Cache(jnp.zeros(shape, dtype or self.cache_dtype))
        self.cache_index = nnx.Cache(jnp.zeros((), jnp.int32))

    def __call__(
        self,
        x: Array,
        *,
        segment_ids: Array | None = None,
        deterministic: bool | None = None,
        decode: bool = False,
    ) -> Array:
        """Applies the layer.

        Args:
          x: ``[..., T, F]``.
          segment_ids: int32 ``[..., T]``; a token sees only tokens of the same id: packed sequences, or padding (an id
            of its own).
          deterministic: overrides the layer's own; True switches dropout off.
          decode: append the T tokens to the cache and attend to all of it.

        Returns:
          ``[..., T, F]``.

        Raises:
          ValueError: if ``x`` does not have F features, or ``decode`` lacks what it needs.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"SelfAttention: expected x of shape [..., T, {self.in_features}] (in_features), received {x.shape}."
            )
        query, key, value = self.query(x), self.key(x), self.value(x)
        options: dict[str, Any] = {
            "local_window_size": self.local_window_size,
            "logits_soft_cap": self.logits_soft_cap,
        }
        if self.rngs is not None and not (self.deterministic if deterministic is None else deterministic):
            options.update(dropout_rate=self.dropout_rate, dropout_key=self.rngs())
        if not decode:
            out = flash_attention(
                query,
                key,
                value,
                is_causal=self.is_causal,
                query_segment_ids=segment_ids,
                key_value_segment_ids=segment_ids,
                **options,
            )
            return self.out(out)

        if not self.is_causal:
            raise ValueError(
                "SelfAttention: decode=True expects is_causal=True, received False: later tokens are unknown."
            )
        if segment_ids is not None:
            raise ValueError(
                "SelfAttention: decode=True expects segment_ids=None, received an array: the cache keeps no segments. "
                "Decode one text per batch entry."
            )
        if self.cached_key is None or self.cached_value is None or self.cache_index is None:
            raise ValueError("SelfAttention: decode=True expects a cache, and there is none. Call init_cache first.")
        out, self.cached_key[...], self.cached_value[...], self.cache_index[...] = cached_attention(
            query, key, value, self.cached_key[...], self.cached_value[...], self.cache_index[...], **options
        )
        return self.out(out)


def _is_plain_precision(precision: Any) -> bool:
    """Whether ``precision`` is None or names a ``jax.lax.Precision``, alone or as a pair, and not a dot algorithm."""
    for one in precision if isinstance(precision, tuple) else (precision,):
        try:
            lax.Precision(one)
        except ValueError:
            return False
    return True


def _pad_rank(x: Array, rank: int) -> Array:
    """Puts axes of size 1 before ``x``: Flax's masks may lack axes, those of ``flash_attention`` may not."""
    return x.reshape((1,) * (rank - x.ndim) + x.shape)
