"""FlashAttention for Flax Linen: an ``attention_fn`` for Flax's own layer, and a ``SelfAttention`` layer.

Nothing in ``jax_flash`` imports this module, so Flax stays an optional dependency. Flax ships Linen and NNX together;
the functions of arrays that serve both live in ``jax_flash.nnx``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jax import Array

import jax_flash
from jax_flash.nnx import attention_fn, cached_attention

__all__ = ["SelfAttention", "attention_fn", "cached_attention"]

# Nothing here asks for the log-sum-exp, so what comes back is one array.
flash_attention = cast(Callable[..., Array], jax_flash.flash_attention)


class SelfAttention(nn.Module):
    """Multi-head self-attention with causal mask, sliding window, grouped-query heads and a decode cache.

    Its parameters have the names and shapes of those of ``flax.linen.MultiHeadDotProductAttention``: checkpoints can be
    exchanged.

    To generate text, make the layer with ``decode=True``. As in Flax, ``init`` with an input of the maximal length
    creates an empty "cache" collection of that length; each ``apply(..., mutable=["cache"])`` then appends its T >= 1
    tokens: first a whole prompt, then single tokens. The outputs equal those of one causal call on the whole text. What
    happens at the end of the cache is told in ``cached_attention``.

    Attributes:
      num_heads: query heads, N.
      num_kv_heads: key and value heads, K, with ``N % K == 0``; None means N.
      head_dim: features of a head, H; None means F / N, with F the features of the input and of the output.
      is_causal: a token sees itself and earlier tokens only. Decoding needs it.
      local_window_size: ``w`` or ``(left, right)``, as in ``jax_flash.flash_attention``.
      logits_soft_cap: as in ``jax_flash.flash_attention``.
      dropout_rate: dropout on the attention weights, in [0, 1); its key is of the collection "dropout".
      deterministic: True switches dropout off; with ``dropout_rate > 0`` it is given here or in the call.
      use_bias: whether the four projections have a bias.
      dtype: dtype of the computation and of the cache; None means the common dtype of input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initializer of the projections' kernels.
      decode: append the tokens of each call to the cache and attend to all of it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_flash.linen import SelfAttention
      >>> layer = SelfAttention(num_heads=4, num_kv_heads=2, is_causal=True, decode=True)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 64, 32)))  # max_length = 64
      >>> out, cache = layer.apply(variables, jnp.ones((2, 16, 32)), mutable=["cache"])
      >>> out, cache = layer.apply({**variables, **cache}, jnp.ones((2, 1, 32)), mutable=["cache"])
      >>> out.shape, cache["cache"]["cache_index"].item()
      ((2, 1, 32), 17)
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    is_causal: bool = False
    local_window_size: int | tuple[int, int] | None = None
    logits_soft_cap: float | None = None
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    decode: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        segment_ids: Array | None = None,
        deterministic: bool | None = None,
        dropout_rng: Array | None = None,
    ) -> Array:
        """Applies the layer.

        Args:
          x: ``[..., T, F]``.
          segment_ids: int32 ``[..., T]``; a token sees only tokens of the same id: packed sequences, or padding (an id
            of its own).
          deterministic: True switches dropout off; give it here or as an attribute, not both.
          dropout_rng: JAX key for dropout; None takes one from the collection "dropout".

        Returns:
          ``[..., T, F]``.

        Raises:
          ValueError: if heads and features do not divide, or ``decode`` lacks what it needs.
        """
        features = x.shape[-1]
        num_kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        if self.num_heads % num_kv_heads:
            raise ValueError(
                "SelfAttention: expected num_heads to be a multiple of num_kv_heads, received "
                f"num_heads={self.num_heads}, num_kv_heads={num_kv_heads}. Choose numbers that divide."
            )
        if self.head_dim is None and features % self.num_heads:
            raise ValueError(
                "SelfAttention: expected the features of x to be a multiple of num_heads, received x of shape "
                f"{x.shape}, num_heads={self.num_heads}. Give head_dim to choose the size of a head yourself."
            )
        head_dim = features // self.num_heads if self.head_dim is None else self.head_dim

        def linear(name: str, features: int | tuple[int, int], axis: int | tuple[int, int] = -1) -> nn.DenseGeneral:
            return nn.DenseGeneral(
                features,
                axis=axis,
                use_bias=self.use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                name=name,
            )

        query = linear("query", (self.num_heads, head_dim))(x)
        key = linear("key", (num_kv_heads, head_dim))(x)
        value = linear("value", (num_kv_heads, head_dim))(x)
        project_out = linear("out", features, axis=(-2, -1))

        options: dict[str, Any] = {
            "local_window_size": self.local_window_size,
            "logits_soft_cap": self.logits_soft_cap,
        }
        if self.dropout_rate > 0.0 and not nn.merge_param("deterministic", self.deterministic, deterministic):
            dropout_key = self.make_rng("dropout") if dropout_rng is None else dropout_rng
            options.update(dropout_rate=self.dropout_rate, dropout_key=dropout_key)

        if self.decode:
            if not self.is_causal:
                raise ValueError(
                    "SelfAttention: decode=True expects is_causal=True, received False: later tokens are unknown."
                )
            if segment_ids is not None:
                raise ValueError(
                    "SelfAttention: decode=True expects segment_ids=None, received an array: the cache keeps no "
                    "segments. Decode one text per batch entry."
                )
            # Outside ``init``, a missing cache must not be made up here: it would be as short as this very input.
            if not self.is_initializing() and not self.has_variable("cache", "cached_key"):
                raise ValueError(
                    'SelfAttention: decode=True expects a "cache" collection among the variables, and there is none. '
                    "Create it with init on an input of shape [..., max_length, F]."
                )
            cached_key = self.variable("cache", "cached_key", jnp.zeros, key.shape, key.dtype)
            cached_value = self.variable("cache", "cached_value", jnp.zeros, value.shape, value.dtype)
            cache_index = self.variable("cache", "cache_index", jnp.zeros, (), jnp.int32)
            if not self.is_initializing():  # ``init`` leaves the cache empty.
                out, cached_key.value, cached_value.value, cache_index.value = cached_attention(
                    query, key, value, cached_key.value, cached_value.value, cache_index.value, **options
                )
                return project_out(out)

        out = flash_attention(
            query,
            key,
            value,
            is_causal=self.is_causal,
            query_segment_ids=segment_ids,
            key_value_segment_ids=segment_ids,
            **options,
        )
        return project_out(out)
