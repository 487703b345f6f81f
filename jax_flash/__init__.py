"""FlashAttention for JAX: exact attention in linear memory, as differentiable custom calls.

Flax users import ``jax_flash.nnx`` or ``jax_flash.linen``.
"""

from jax_flash import flash_api
from jax_flash._ffi import DISABLED_CHECKS
from jax_flash.attention import dot_product_attention, flash_attention
from jax_flash.paged import paged_attention
from jax_flash.varlen import flash_attention_varlen

__all__ = [
    "DISABLED_CHECKS",
    "dot_product_attention",
    "flash_api",
    "flash_attention",
    "flash_attention_varlen",
    "paged_attention",
]

__version__ = "0.1.0"
