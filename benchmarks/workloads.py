"""Named workloads: what is computed, on which data, and how many floating-point operations it counts for."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

PASSES = ("forward", "backward", "forward_backward")

# A backward is five matrix products to the forward's two (FlashAttention's convention).
_FLOPS_OF_PASS = {"forward": 1.0, "backward": 2.5, "forward_backward": 3.5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One attention problem. Shapes are `[batch, seqlen, num_heads, head_dim]`, alignment is bottom-right.

    Attributes:
      window: how many keys a query sees to its left and right; -1 is unbounded.
      sequence_lengths: when given, the sequences packed along the sequence axis (varlen); then `batch` is 1 and
        `seqlen_q` and `seqlen_kv` are their sum.
      bias: whether a `[1, num_heads, seqlen_q, seqlen_kv]` bias is added.
      learned_bias: whether the backward is asked for its gradient too.
      mask: whether a random boolean mask `[batch, 1, seqlen_q, seqlen_kv]` is given; pairs that it hides count all the
        same.
      alibi: whether ALiBi's slopes are given.
    """

    name: str
    batch: int
    seqlen_q: int
    seqlen_kv: int
    num_heads: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    dtype: str
    is_causal: bool = False
    window: tuple[int, int] | None = None
    softcap: float | None = None
    sequence_lengths: tuple[int, ...] = ()
    bias: bool = False
    learned_bias: bool = False
    mask: bool = False
    alibi: bool = False
    dropout_rate: float = 0.0
    deterministic: bool = False

    @property
    def visible_pairs(self) -> int:
        """How many (query, key) pairs of one head, over all sequences, the causal rule and the window let through."""
        if self.sequence_lengths:
            return sum(self._visible_pairs(length, length) for length in self.sequence_lengths)
        return self.batch * self._visible_pairs(self.seqlen_q, self.seqlen_kv)

    def _visible_pairs(self, seqlen_q: int, seqlen_kv: int) -> int:
        left, right = self.window or (-1, -1)
        right = 0 if self.is_causal else right
        diagonal = np.arange(seqlen_q) + seqlen_kv - seqlen_q
        first = np.zeros_like(diagonal) if left < 0 else np.maximum(diagonal - left, 0)
        last = np.full_like(diagonal, seqlen_kv - 1) if right < 0 else np.minimum(diagonal + right, seqlen_kv - 1)
        return int(np.maximum(last - first + 1, 0).sum())

    def flops(self, pass_: str) -> float:
        """Floating-point operations of a pass: a multiply-add is two, and only visible pairs count.

        FlashAttention's own tables take exactly one half for causal, less than this by one part in `seqlen`.
        """
        return _FLOPS_OF_PASS[pass_] * 2 * (self.head_dim + self.head_dim_v) * self.num_heads * self.visible_pairs

    def inputs(self) -> dict[str, jax.Array]:
        """Standard-normal arrays on the device: a GPU draws less power, and so runs faster, on zeros."""
        shapes = {
            "query": (self.batch, self.seqlen_q, self.num_heads, self.head_dim),
            "key": (self.batch, self.seqlen_kv, self.num_heads_kv, self.head_dim),
            "value": (self.batch, self.seqlen_kv, self.num_heads_kv, self.head_dim_v),
            "cotangent": (self.batch, self.seqlen_q, self.num_heads, self.head_dim_v),
        }
        if self.bias:
            shapes["bias"] = (1, self.num_heads, self.seqlen_q, self.seqlen_kv)
        if self.mask:
            shapes["mask"] = (self.batch, 1, self.seqlen_q, self.seqlen_kv)
        keys = jax.random.split(jax.random.key(0), len(shapes))
        arrays = {
            name: jax.random.normal(key, shape, self.dtype)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        return arrays | ({"mask": arrays["mask"] > -1} if self.mask else {})


def _self_attention(name: str, seqlen: int, num_heads: int, head_dim: int, **options: Any) -> Workload:
    """A workload with one length, head count and head dim, but for what `options` say otherwise."""
    defaults = {
        "batch": 1,
        "seqlen_q": seqlen,
        "seqlen_kv": seqlen,
        "num_heads": num_heads,
        "num_heads_kv": num_heads,
        "head_dim": head_dim,
        "head_dim_v": head_dim,
        "dtype": "bfloat16",
    }
    return Workload(name=name, **(defaults | options))


def _cpu() -> list[Workload]:
    float32 = functools.partial(_self_attention, num_heads=8, head_dim=64, dtype="float32")
    return [
        float32("f32_4k_full", 4096),
        float32("f32_4k_causal", 4096, is_causal=True),
        float32("bf16_4k_causal", 4096, is_causal=True, dtype="bfloat16"),
        float32("f32_4k_causal_gqa", 4096, is_causal=True, num_heads_kv=2),
        float32("f32_4k_causal_window256", 4096, is_causal=True, window=(256, 0)),
        float32("f32_16k_causal", 16384, is_causal=True, num_heads=1),
    ]


def _cpu_smoke() -> list[Workload]:
    tiny = functools.partial(_self_attention, num_heads=4, head_dim=16, dtype="float32")
    return [
        tiny("tiny_full", 64, batch=2),
        tiny("tiny_cross", 64, seqlen_kv=96),
        tiny("tiny_causal_bf16", 64, is_causal=True, dtype="bfloat16"),
        tiny("tiny_gqa_window", 64, num_heads_kv=2, is_causal=True, window=(16, 0)),
        tiny("tiny_head_dim_v", 64, head_dim_v=8),
        tiny("tiny_bias", 64, bias=True),
        tiny("tiny_learned_bias", 64, bias=True, learned_bias=True),
        tiny("tiny_mask", 64, mask=True),
        tiny("tiny_alibi", 64, alibi=True, is_causal=True),
        tiny("tiny_softcap", 64, softcap=20.0),
        tiny("tiny_dropout", 64, dropout_rate=0.1),
        tiny("tiny_varlen", 100, is_causal=True, sequence_lengths=(5, 64, 1, 30)),
    ]


def _hopper(*seqlens: int) -> list[Workload]:
    """The grid of the FlashAttention papers: 16384 tokens, num_heads * head_dim = 2048."""
    return [
        _self_attention(
            f"h{head_dim}_{seqlen}_{'causal' if is_causal else 'full'}",
            seqlen,
            num_heads=2048 // head_dim,
            head_dim=head_dim,
            batch=16384 // seqlen,
            is_causal=is_causal,
        )
        for head_dim in (64, 128, 256)
        for seqlen in seqlens
        for is_causal in (False, True)
    ]


def _hopper_features() -> list[Workload]:
    """One feature each on top of causal attention over 16384 tokens, and that without a feature to compare with."""
    causal = functools.partial(_self_attention, num_heads=16, head_dim=128, is_causal=True)
    mixed = (4040, 128, 2048, 777, 1024, 64, 3000, 511, 1500, 2200, 900, 192)
    return [
        causal("causal_4k", 4096, batch=4),
        causal("causal_16k", 16384),
        causal("gqa_4k", 4096, batch=4, num_heads=32, num_heads_kv=8),
        causal("gqa_16k", 16384, num_heads=32, num_heads_kv=8),
        causal("window1024_4k", 4096, batch=4, window=(1024, 0)),
        causal("window1024_16k", 16384, window=(1024, 0)),
        causal("softcap_4k", 4096, batch=4, softcap=50.0),
        causal("softcap_16k", 16384, softcap=50.0),
        causal("deterministic_16k", 16384, deterministic=True),
        causal("alibi_4k", 4096, batch=4, alibi=True),
        causal("bias_4k", 4096, batch=4, bias=True),
        causal("learned_bias_4k", 4096, batch=4, bias=True, learned_bias=True),
        causal("mask_4k", 4096, batch=4, mask=True),
        causal("dropout_4k", 4096, batch=4, dropout_rate=0.1),
        causal("varlen_4x4k", 16384, sequence_lengths=(4096,) * 4),
        causal("varlen_mixed", sum(mixed), sequence_lengths=mixed),
        causal("float16_4k", 4096, batch=4, dtype="float16"),
        causal("h192_128_4k", 4096, batch=4, head_dim=192, head_dim_v=128),
        causal("h192_128_16k", 16384, head_dim=192, head_dim_v=128),
        causal("h96_16k", 16384, head_dim=96),
        causal("h192_16k", 16384, num_heads=8, head_dim=192),
    ]


GROUPS: dict[str, Callable[[], list[Workload]]] = {
    "cpu": _cpu,
    "cpu_smoke": _cpu_smoke,
    "hopper": functools.partial(_hopper, 1024, 4096, 16384),
    "hopper_between": functools.partial(_hopper, 512, 2048, 8192),
    "hopper_features": _hopper_features,
}
