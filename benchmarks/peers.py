"""The implementations that are compared. A peer says why it cannot run a workload, or makes its calls."""

import dataclasses
import functools
import importlib.util
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .machine import usable_cores
from .workloads import Workload


@dataclasses.dataclass(frozen=True)
class Call:
    """One pass of one implementation, bound to data of its own.

    Attributes:
      run: starts the work and returns its results.
      wait: returns once the work behind these results is done.
      arrays: the results as JAX arrays `[batch, seqlen, num_heads, head_dim]`: the output in a pass that has a forward,
        then the gradients of query, key and value in one that has a backward, and of a learned bias, with its keys on
        the last axis.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], object]
    arrays: Callable[[Any], list[jax.Array]]


@dataclasses.dataclass(frozen=True)
class Peer:
    """An implementation.

    Attributes:
      unavailable: the reason why it cannot run this pass of this workload, or None.
      build: makes the call, for inputs on the device and in the workload's dtype.
    """

    name: str
    unavailable: Callable[[Workload, str], str | None]
    build: Callable[[Workload, dict[str, jax.Array], str], Call]


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


# Ours


def _ours_unavailable(workload: Workload, pass_: str) -> str | None:
    del pass_
    if on_gpu() and workload.dtype == "float32":
        return "takes 16-bit inputs only on a GPU"
    return None if importlib.util.find_spec("jax_flash") else "jax_flash is not installed"


def _ours(workload: Workload, inputs: dict[str, jax.Array], pass_: str) -> Call:
    import jax_flash

    options: dict[str, Any] = {
        "is_causal": workload.is_causal,
        "local_window_size": workload.window,
        "logits_soft_cap": workload.softcap,
        "deterministic": workload.deterministic,
        "dropout_rate": workload.dropout_rate,
    }
    extras: dict[str, Any] = {}
    if workload.dropout_rate:
        extras["dropout_key"] = jax.random.key(0)
    if workload.alibi:
        extras["alibi_slopes"] = 2.0 ** (-8 / workload.num_heads * jnp.arange(1, workload.num_heads + 1))
    if workload.sequence_lengths:
        longest = max(workload.sequence_lengths)
        options |= {"max_seqlen_q": longest, "max_seqlen_kv": longest}
        offsets = jnp.asarray(np.cumsum((0, *workload.sequence_lengths)), jnp.int32)
        extras |= {"cu_seqlens_q": offsets, "cu_seqlens_kv": offsets}

    def forward(query, key, value, extras):
        if workload.sequence_lengths:
            out: Any = jax_flash.flash_attention_varlen(query[0], key[0], value[0], **extras, **options)
            return out[None]
        return jax_flash.flash_attention(query, key, value, **extras, **options)

    return _jax_call(forward, workload, inputs, extras, pass_)


# jax.nn.dot_product_attention


def _jax_nn_unavailable(workload: Workload) -> str | None:
    if workload.softcap is not None or workload.alibi or workload.dropout_rate:
        return "jax.nn has no soft cap, ALiBi or dropout"
    if workload.head_dim != workload.head_dim_v:
        return "jax.nn has one head dim"
    if workload.deterministic:
        return "jax.nn cannot ask for a deterministic backward"
    if workload.seqlen_q != workload.seqlen_kv and (workload.is_causal or workload.window):
        return "jax.nn aligns masks to the top left"
    return None


def _xla_unavailable(workload: Workload, pass_: str) -> str | None:
    del pass_
    if on_gpu() and workload.seqlen_q > 4096:
        return "forms the scores, which takes too long beyond 4096 tokens"
    # It forms the scores: in float32, about five copies of them with the backward.
    needed = 5 * 4 * workload.batch * workload.num_heads * workload.seqlen_q * workload.seqlen_kv
    if on_gpu():
        stats = jax.devices()[0].memory_stats() or {}
        available = stats.get("bytes_limit", needed)
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        return f"its scores need {needed / 2**30:.0f} GiB of {available / 2**30:.0f}"
    return _jax_nn_unavailable(workload)


def _cudnn_unavailable(workload: Workload, pass_: str) -> str | None:
    del pass_
    if not on_gpu():
        return "needs a GPU"
    if workload.dtype == "float32" or workload.sequence_lengths:
        return "takes 16-bit inputs of one length only"
    return _jax_nn_unavailable(workload)


def _jax_nn(workload: Workload, inputs: dict[str, jax.Array], pass_: str, *, implementation: str) -> Call:
    extras = {}
    if workload.sequence_lengths:
        # Packed sequences are what a user of jax.nn would write a mask for.
        segments = np.repeat(np.arange(len(workload.sequence_lengths)), workload.sequence_lengths)
        extras["mask"] = jnp.asarray(segments[:, None] == segments[None, :])[None, None]

    def forward(query, key, value, extras):
        options: Any = {"local_window_size": workload.window, "implementation": implementation}
        return jax.nn.dot_product_attention(query, key, value, is_causal=workload.is_causal, **options, **extras)

    return _jax_call(forward, workload, inputs, extras, pass_)


def _jax_call(
    forward: Callable[..., Any], workload: Workload, inputs: dict[str, jax.Array], extras: dict[str, Any], pass_: str
) -> Call:
    """Jits one pass of `forward(query, key, value, extras)`; the workload's bias and mask go into `extras`."""
    query, key, value, cotangent = (inputs[name] for name in ("query", "key", "value", "cotangent"))
    extras = extras | {name: inputs[name] for name in ("bias", "mask") if name in inputs}

    def vjp(query, key, value, extras):
        learned = {"bias": extras["bias"]} if workload.learned_bias else {}
        return jax.vjp(lambda q, k, v, learned: forward(q, k, v, extras | learned), query, key, value, learned)

    def forward_backward(query, key, value, extras, cotangent):
        out, backward = vjp(query, key, value, extras)
        return out, *backward(cotangent)

    def arrays(results) -> list[jax.Array]:
        *others, last = jax.tree.leaves(results)
        return [*others, last.swapaxes(1, 2) if workload.learned_bias and pass_ != "forward" else last]

    arguments: tuple[Any, ...]
    if pass_ == "forward":
        function, arguments = forward, (query, key, value, extras)
    elif pass_ == "forward_backward":
        function, arguments = forward_backward, (query, key, value, extras, cotangent)
    else:
        _, residuals = jax.jit(vjp)(query, key, value, extras)
        function, arguments = (lambda backward, cotangent: backward(cotangent)), (residuals, cotangent)
    return Call(
        run=functools.partial(jax.jit(function), *arguments),
        wait=jax.block_until_ready,
        arrays=arrays,
    )


# FlashAttention-3 as written in Pallas Mosaic GPU, which is part of JAX

# (block_q, block_kv, stages): what its own tuning tries, and what was fast elsewhere.
_TILINGS = ((64, 256, 2), (64, 128, 2), (128, 128, 2), (64, 64, 2), (64, 64, 4))
_best_tilings: dict[tuple, tuple[int, int, int]] = {}  # by head dim, mask and dtype: the length matters little


def _mosaic_unavailable(workload: Workload, pass_: str) -> str | None:
    if not on_gpu() or jax.devices()[0].compute_capability != "9.0":
        return "needs a Hopper GPU"
    if not importlib.util.find_spec("jax.experimental.pallas.ops.gpu.attention_mgpu"):
        return "this jax does not have it"
    if pass_ != "forward":
        return "its backward has no causal mask and needs float16"
    extras = workload.window or workload.softcap or workload.sequence_lengths or workload.dropout_rate
    if extras or workload.bias or workload.mask or workload.alibi or workload.dtype != "float16":
        return "takes full and causal attention in float16 only"
    if workload.head_dim % 64 or workload.head_dim != workload.head_dim_v:
        return "takes head dims 64, 128, 192 and 256"
    if workload.seqlen_q % 256 or workload.seqlen_q != workload.seqlen_kv:
        return "takes whole tiles and equal lengths"
    return None


def _mosaic(workload: Workload, inputs: dict[str, jax.Array], pass_: str) -> Call:
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    # It does not scale the scores, so its query comes scaled.
    inputs = inputs | {"query": (inputs["query"] * workload.head_dim**-0.5).astype(workload.dtype)}

    def build(tiling: tuple[int, int, int]) -> Call:
        config = attention_mgpu.TuningConfig(*tiling, causal=workload.is_causal)
        return _jax_call(lambda q, k, v, _: attention_mgpu.attention(q, k, v, config), workload, inputs, {}, pass_)

    kind = workload.head_dim, workload.is_causal, workload.dtype
    if kind not in _best_tilings:
        _best_tilings[kind] = _fastest(build, workload.head_dim)
    return build(_best_tilings[kind])


def _fastest(build: Callable[[tuple[int, int, int]], Call], head_dim: int) -> tuple[int, int, int]:
    times = {}
    for block_q, block_kv, stages in _TILINGS:
        if 4 * head_dim * (block_q + stages * block_kv) > 227 * 1024:  # two query tiles, and stages of key and value
            continue
        try:
            call = build((block_q, block_kv, stages))
            call.wait(call.run())
            start = time.perf_counter()
            for _ in range(10):
                result = call.run()
            call.wait(result)
            times[block_q, block_kv, stages] = time.perf_counter() - start
        except Exception as error:  # too many registers, say: what counts is whether another one works
            refusal = error
    if not times:
        raise refusal
    return min(times, key=lambda tiling: times[tiling])


# torch's scaled_dot_product_attention: FlashAttention-2 on a GPU, a tiled kernel of its own on a CPU


def _torch_unavailable(workload: Workload, pass_: str) -> str | None:
    del pass_
    if not importlib.util.find_spec("torch"):
        return "torch is not installed"
    if on_gpu():
        import torch

        if not torch.cuda.is_available():
            return "this torch has no CUDA"
    if workload.softcap is not None or workload.window or workload.sequence_lengths or workload.alibi:
        return "its flash attention has no soft cap, window, packed sequences or ALiBi"
    if workload.learned_bias:
        return "its flash attention has no gradient of a bias"
    if on_gpu() and (workload.bias or workload.mask):
        return "its flash attention has no bias or mask on GPUs"
    if workload.deterministic:
        return "its flash attention is deterministic only for all of the process"
    if workload.head_dim != workload.head_dim_v:
        return "its flash attention has one head dim"
    if workload.dropout_rate and not on_gpu():
        return "its flash attention has no dropout on the CPU"
    if workload.seqlen_q != workload.seqlen_kv and workload.is_causal:
        return "torch aligns masks to the top left"
    return None


def _torch(workload: Workload, inputs: dict[str, jax.Array], pass_: str) -> Call:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # As many threads as XLA takes; torch by itself counts cores, and not always those that it may use.
    torch.set_num_threads(usable_cores())
    options = {
        "dropout_p": workload.dropout_rate,
        "is_causal": workload.is_causal,
        "enable_gqa": workload.num_heads != workload.num_heads_kv,
    }

    def forward(query, key, value, data):
        mask = data.get("bias", data.get("mask"))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)

    # torch has [batch, num_heads, seqlen, head_dim]; a view of our layout is what a projection gives there too.
    return _torch_call(forward, inputs, pass_, lambda x: x.transpose(1, 2))


# FlashAttention-4, whose path for Hopper is the strongest peer, as its package flash-attn-4 has it for torch


def _fa4_unavailable(workload: Workload, pass_: str) -> str | None:
    del pass_
    if not on_gpu() or jax.devices()[0].compute_capability != "9.0":
        return "needs a Hopper GPU"
    if not importlib.util.find_spec("flash_attn") or not importlib.util.find_spec("flash_attn.cute"):
        return "flash-attn-4 is not installed"
    if workload.dtype == "float32":
        return "takes 16-bit inputs only"
    if workload.bias or workload.mask or workload.alibi or workload.dropout_rate:
        return "has no bias, mask, ALiBi or dropout"
    return None


def _fa4(workload: Workload, inputs: dict[str, jax.Array], pass_: str) -> Call:
    import torch
    from flash_attn.cute.interface import (  # pyright: ignore[reportMissingImports]
        flash_attn_func,
        flash_attn_varlen_func,
    )

    options: dict[str, Any] = {
        "causal": workload.is_causal,
        "softcap": workload.softcap or 0.0,
        "deterministic": workload.deterministic,
    }
    if workload.window:
        options["window_size"] = tuple(None if size < 0 else size for size in workload.window)
    if workload.sequence_lengths:
        offsets = torch.tensor(np.cumsum((0, *workload.sequence_lengths)), dtype=torch.int32, device="cuda")
        longest = max(workload.sequence_lengths)
        options |= {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": longest, "max_seqlen_k": longest}

    def forward(query, key, value, data):
        del data
        if not workload.sequence_lengths:
            out = flash_attn_func(query, key, value, **options)
            return out[0] if isinstance(out, tuple) else out
        out = flash_attn_varlen_func(query.squeeze(0), key.squeeze(0), value.squeeze(0), **options)  # views
        return (out[0] if isinstance(out, tuple) else out).unsqueeze(0)

    return _torch_call(forward, inputs, pass_, lambda x: x)


def _torch_call(
    forward: Callable[..., Any], inputs: dict[str, jax.Array], pass_: str, view: Callable[[Any], Any]
) -> Call:
    """One pass of `forward(query, key, value, data)`, which has all inputs in `data`.

    `view` brings query, key, value and cotangent into the layout that it wants, and results back.
    """
    import torch

    # Copies, as torch may write to what it differentiates; JAX's arrays must be there before another stream reads them.
    data = {name: torch.from_dlpack(jax.block_until_ready(array)).clone() for name, array in inputs.items()}
    *operands, cotangent = (view(data[name]) for name in ("query", "key", "value", "cotangent"))
    for x in operands:
        x.requires_grad_(pass_ != "forward")

    def run_forward():
        return forward(*operands, data)

    def backward(out, keep=False):
        return torch.autograd.grad(out, operands, cotangent, retain_graph=keep)

    def forward_backward():
        out = run_forward()
        return out, *backward(out)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Without a kernel it warns with each reason, then raises.
        out = run_forward()
    runs: dict[str, Callable[[], Any]] = {"forward": lambda: (run_forward(),), "forward_backward": forward_backward}
    runs["backward"] = functools.partial(backward, out, keep=True)
    return Call(
        run=runs[pass_],
        wait=lambda _: torch.cuda.synchronize() if on_gpu() else None,
        arrays=lambda results: [_from_torch(view(x)) for x in results],
    )


def _from_torch(x: Any) -> jax.Array:
    import torch

    x = x.detach().contiguous()
    if x.is_cuda:
        torch.cuda.synchronize()
    return jnp.from_dlpack(x)


PEERS = (
    Peer("jax_flash", _ours_unavailable, _ours),
    Peer("xla", _xla_unavailable, functools.partial(_jax_nn, implementation="xla")),
    Peer("cudnn", _cudnn_unavailable, functools.partial(_jax_nn, implementation="cudnn")),
    Peer("mosaic", _mosaic_unavailable, _mosaic),
    Peer("torch", _torch_unavailable, _torch),
    Peer("fa4", _fa4_unavailable, _fa4),
)
