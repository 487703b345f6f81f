"""The implementations that are compared. A peer says why it cannot run a workload, or makes its calls."""

import dataclasses
import functools
import importlib.util
import os
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
      arrays: the results as float32 NumPy arrays `[batch, seqlen, num_heads, head_dim]`: the output in a pass that has
        a forward, then the gradients of query, key and value in one that has a backward.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], object]
    arrays: Callable[[Any], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Peer:
    """An implementation: `unavailable(workload)` is a reason or None, `build(workload, inputs, pass_)` makes a Call."""

    name: str
    unavailable: Callable[[Workload], str | None]
    build: Callable[[Workload, dict[str, np.ndarray], str], Call]


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


# Ours


def _ours_unavailable(workload: Workload) -> str | None:
    del workload
    return None if importlib.util.find_spec("jax_flash") else "jax_flash is not installed"


def _ours(workload: Workload, inputs: dict[str, np.ndarray], pass_: str) -> Call:
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
    if workload.softcap is not None or workload.dropout_rate or workload.head_dim != workload.head_dim_v:
        return "jax.nn has no soft cap, no dropout and one head dim"
    if workload.seqlen_q != workload.seqlen_kv and (workload.is_causal or workload.window):
        return "jax.nn aligns masks to the top left"
    return None


def _xla_unavailable(workload: Workload) -> str | None:
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


def _cudnn_unavailable(workload: Workload) -> str | None:
    if not on_gpu():
        return "needs a GPU"
    if workload.dtype == "float32" or workload.sequence_lengths:
        return "takes 16-bit inputs of one length only"
    return _jax_nn_unavailable(workload)


def _jax_nn(workload: Workload, inputs: dict[str, np.ndarray], pass_: str, *, implementation: str) -> Call:
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
    forward: Callable[..., Any], workload: Workload, inputs: dict[str, np.ndarray], extras: dict[str, Any], pass_: str
) -> Call:
    """Jits one pass of `forward(query, key, value, extras)`; the bias of the workload is put into `extras`."""
    data = {name: jnp.asarray(array, workload.dtype) for name, array in inputs.items()}
    query, key, value, cotangent = (data.pop(name) for name in ("query", "key", "value", "cotangent"))
    extras = extras | data

    def vjp(query, key, value, extras):
        return jax.vjp(lambda *qkv: forward(*qkv, extras), query, key, value)

    def forward_backward(query, key, value, extras, cotangent):
        out, backward = vjp(query, key, value, extras)
        return out, *backward(cotangent)

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
        arrays=lambda results: [np.asarray(x, np.float32) for x in jax.tree.leaves(results)],
    )


# torch's scaled_dot_product_attention: FlashAttention-2 on a GPU, a tiled kernel of its own on a CPU


def _torch_unavailable(workload: Workload) -> str | None:
    if not importlib.util.find_spec("torch"):
        return "torch is not installed"
    if on_gpu():
        import torch

        if not torch.cuda.is_available():
            return "this torch has no CUDA"
    if workload.softcap is not None or workload.window or workload.sequence_lengths:
        return "its flash attention has no soft cap, window or packed sequences"
    if workload.head_dim != workload.head_dim_v:
        return "its flash attention has one head dim"
    if workload.dropout_rate and not on_gpu():
        return "its flash attention has no dropout on the CPU"
    if workload.seqlen_q != workload.seqlen_kv and workload.is_causal:
        return "torch aligns masks to the top left"
    return None


def _torch(workload: Workload, inputs: dict[str, np.ndarray], pass_: str) -> Call:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # As many threads as XLA takes; torch by itself counts cores, and not always those that it may use.
    torch.set_num_threads(usable_cores())
    device = "cuda" if on_gpu() else "cpu"
    dtype = getattr(torch, workload.dtype)
    data = {name: torch.from_numpy(array).to(device, dtype) for name, array in inputs.items()}
    # torch has [batch, num_heads, seqlen, head_dim]; a view of our layout is what a projection gives there too.
    query, key, value, cotangent = (data[n].transpose(1, 2) for n in ("query", "key", "value", "cotangent"))
    for x in (query, key, value):
        x.requires_grad_(pass_ != "forward")

    options = {"attn_mask": data.get("bias"), "dropout_p": workload.dropout_rate, "is_causal": workload.is_causal}
    options["enable_gqa"] = workload.num_heads != workload.num_heads_kv

    def forward():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)

    def backward(out, keep=False):
        return torch.autograd.grad(out, (query, key, value), cotangent, retain_graph=keep)

    def forward_backward():
        out = forward()
        return out, *backward(out)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Without a kernel it warns with each reason, then raises.
        out = forward()
    runs: dict[str, Callable[[], Any]] = {"forward": lambda: (forward(),), "forward_backward": forward_backward}
    runs["backward"] = functools.partial(backward, out, keep=True)
    return Call(
        run=runs[pass_],
        wait=lambda _: torch.cuda.synchronize() if on_gpu() else None,
        arrays=lambda results: [x.detach().transpose(1, 2).float().cpu().numpy() for x in results],
    )


PEERS = (
    Peer("jax_flash", _ours_unavailable, _ours),
    Peer("xla", _xla_unavailable, functools.partial(_jax_nn, implementation="xla")),
    Peer("cudnn", _cudnn_unavailable, functools.partial(_jax_nn, implementation="cudnn")),
    Peer("torch", _torch_unavailable, _torch),
)
