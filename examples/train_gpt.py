"""Trains a small GPT, in Flax NNX and optax, on the source files of the Python standard library.

It reads bytes and predicts the next one. Everything that a real training run needs is here, in little: a jit-compiled
step, data parallelism over all devices that JAX finds, a validation loss, mixed precision on GPUs, and text generated
with a key/value cache. At the end the same step is timed with our attention and with another one (XLA's, or cuDNN's on
GPUs), from the same weights and on the same batches, and the script fails if their losses differ.

    python examples/train_gpt.py            # on two CPU cores: one to three minutes
    python examples/train_gpt.py --help     # larger ones
"""

from __future__ import annotations

import argparse
import math
import pathlib
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure

from jax_flash.nnx import SelfAttention

VOCABULARY = 256  # bytes
LOCAL_WINDOW = 8  # bytes back that every other block sees: a short way learns spelling much sooner than a long one
PROMPT = "def "
DEFAULTS = {  # (on the CPU, on GPUs)
    "steps": (1300, 800),
    "seq_len": (512, 2048),
    "batch": (2, 16),
    "width": (96, 768),
    "layers": (3, 8),
    "heads": (3, 12),
    "dtype": ("float32", "bfloat16"),
    "lr": (6e-3, 1e-3),
    "peer": ("xla", "cudnn"),
}


# --- the model ------------------------------------------------------------------------------------------------------


def make_attention(kind: str, width: int, heads: int, window: int | None, **options) -> Any:
    """Causal self-attention by "jax_flash", or to compare by "xla" or "cudnn"; the parameters are the same."""
    if kind == "jax_flash":
        return SelfAttention(heads, width, is_causal=True, local_window_size=window, **options)

    def attention(query: jax.Array, key: jax.Array, value: jax.Array, **_) -> jax.Array:
        mask = {"is_causal": True, "local_window_size": None if window is None else (window, 0)}
        return jax.nn.dot_product_attention(query, key, value, implementation=kind, **mask)

    return nnx.MultiHeadAttention(heads, width, attention_fn=attention, decode=False, **options)


class Block(nnx.Module):
    """Attention and a two-layer perceptron, each added to the residual stream ``[B, T, width]``."""

    def __init__(self, attention: str, width: int, heads: int, window: int | None, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm1 = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.attention = make_attention(attention, width, heads, window, dtype=dtype, rngs=rngs)
        self.norm2 = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, **attention_options) -> jax.Array:
        x = x + self.attention(self.norm1(x), **attention_options)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


def sinusoids(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """Positions ``[T, width]`` as waves of many lengths: from them, heads learn far sooner to look a few bytes back."""
    del key  # Nothing is random here; initializers are given one.
    angles = jnp.arange(shape[0])[:, None] * jnp.geomspace(1.0, 1.0 / shape[0], shape[1] // 2)
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.resize(waves, shape).astype(dtype)


class GPT(nnx.Module):
    """A decoder-only transformer with learned positions."""

    def __init__(self, args: argparse.Namespace, *, attention: str, rngs: nnx.Rngs):
        dtype = jnp.dtype(args.dtype)
        init = nnx.initializers.normal(1.0)
        self.token = nnx.Embed(VOCABULARY, args.width, dtype=dtype, embedding_init=init, rngs=rngs)
        self.position = nnx.Embed(args.seq_len, args.width, dtype=dtype, embedding_init=sinusoids, rngs=rngs)
        windows = [None if layer % 2 else LOCAL_WINDOW for layer in range(args.layers)]
        self.blocks = nnx.List([Block(attention, args.width, args.heads, window, dtype, rngs) for window in windows])
        self.norm = nnx.RMSNorm(args.width, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(
            args.width, VOCABULARY, use_bias=False, dtype=dtype, kernel_init=nnx.initializers.normal(0.02), rngs=rngs
        )

    def __call__(self, tokens: jax.Array, *, start: jax.Array | int = 0, **attention_options) -> jax.Array:
        """Float32 logits ``[B, T, 256]`` for what follows each of ``tokens [B, T]``; the first is at ``start``."""
        x = self.token(tokens) + self.position(start + jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x, **attention_options)
        return self.head(self.norm(x)).astype(jnp.float32)


# --- data -----------------------------------------------------------------------------------------------------------


def load_corpus() -> tuple[np.ndarray, np.ndarray]:
    """The standard library as bytes, ``(train, validation)``; whole files are held out for validation."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    paths = sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))
    np.random.default_rng(0).shuffle(paths)
    texts = [p.read_bytes() for p in paths]
    if sum(map(len, texts)) < 1_000_000:
        sys.exit(f"train_gpt: expected at least 1 MB of Python source files in {root}, found {len(texts)} files.")
    held_out = max(1, len(texts) // 20)
    train, validation = (np.frombuffer(b"\n".join(part), np.uint8) for part in (texts[held_out:], texts[:held_out]))
    return train, validation


def batches(data: np.ndarray, args: argparse.Namespace, sharding: NamedSharding, seed: int) -> Iterator[jax.Array]:
    """Endless random windows of ``data``: ``[batch, seq_len + 1]``, with the batch axis sharded over the devices."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(data) - args.seq_len, args.batch)
        windows = data[starts[:, None] + np.arange(args.seq_len + 1)]
        yield jax.device_put(windows.astype(np.int32), sharding)


# --- training -------------------------------------------------------------------------------------------------------


def loss_fn(model: GPT, batch: jax.Array) -> jax.Array:
    """Mean cross-entropy, in nats per byte, of ``batch [B, seq_len + 1]``."""
    logits = model(batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


@nnx.jit
def train_step(model: GPT, optimizer: nnx.Optimizer, batch: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads)
    return loss


eval_step = nnx.jit(loss_fn)


def replicate(module: nnx.Module | nnx.Optimizer, mesh: jax.sharding.Mesh) -> None:
    """Puts a copy of each array of ``module`` on every device."""
    nnx.update(module, jax.device_put(nnx.state(module), NamedSharding(mesh, PartitionSpec())))


def make_optimizer(model: GPT, learning_rate: float | optax.Schedule, mesh: jax.sharding.Mesh) -> nnx.Optimizer:
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, b2=0.95, weight_decay=0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    replicate(optimizer, mesh)
    return optimizer


def show_progress(step: int, steps: int, text: str) -> None:
    """Redraws a one-line progress bar on stderr; where that is no terminal, prints a line at every tenth."""
    done = 30 * step // steps
    line = f"[{'#' * done}{'.' * (30 - done)}] {step}/{steps}  {text}"
    if sys.stderr.isatty():
        print(f"\r{line}\033[K", end="" if step < steps else "\n", file=sys.stderr, flush=True)
    elif step * 10 // steps != (step - 1) * 10 // steps:
        print(line, file=sys.stderr, flush=True)


def train(model: GPT, args, mesh, train_data, val_data) -> dict[str, list[tuple[int, float]]]:
    """Trains ``model`` in place and returns the curves ``(step, loss)`` of "train" and "validation"."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.lr, min(50, args.steps // 5), args.steps)
    optimizer = make_optimizer(model, schedule, mesh)
    validation = [batch for batch, _ in zip(batches(val_data, args, sharding, seed=1), range(8), strict=False)]
    curves: dict[str, list[tuple[int, float]]] = {"train": [], "validation": []}
    train_on = nnx.cached_partial(train_step, model, optimizer)  # spares nnx.jit a look at all parameters in every step
    began = time.perf_counter()
    for step, batch in enumerate(batches(train_data, args, sharding, seed=0)):
        if step % max(1, args.steps // 10) == 0 or step == args.steps:
            curves["validation"].append((step, statistics.fmean(float(eval_step(model, b)) for b in validation)))
        if step == args.steps:
            return curves
        loss = train_on(batch)
        if step % max(1, args.steps // 100) == 0 or step == args.steps - 1:  # Reading the loss waits for the device.
            curves["train"].append((step, float(loss)))
        left = (time.perf_counter() - began) / (step + 1) * (args.steps - step - 1)
        losses = f"train {curves['train'][-1][1]:.3f}  validation {curves['validation'][-1][1]:.3f}"
        show_progress(step + 1, args.steps, f"{losses}  {left:.0f} s left")
    raise AssertionError("batches() never ends")


# --- what comes of it -----------------------------------------------------------------------------------------------


@nnx.jit
def sample_next(model: GPT, tokens: jax.Array, start: jax.Array, key: jax.Array) -> jax.Array:
    """Appends ``tokens [1, T]`` to the caches and draws the token ``[1, 1]`` that follows, at temperature 0.7."""
    logits = model(tokens, start=start, decode=True)[:, -1]
    return jax.random.categorical(key, logits / 0.7)[:, None]


def generate(model: GPT, prompt: str, length: int) -> str:
    """Continues ``prompt`` up to ``length`` bytes, reading the prompt at once and then byte by byte."""
    for block in model.blocks:
        block.attention.init_cache(batch_size=1, max_length=length)
    text = list(prompt.encode())
    tokens, start = jnp.array([text]), 0
    for key in jax.random.split(jax.random.key(0), length - len(text)):
        tokens, start = sample_next(model, tokens, jnp.int32(start), key), len(text)
        text.append(int(tokens[0, 0]))
    return bytes(text).decode(errors="replace")


def compare_with_peer(model: GPT, args, mesh, train_data, steps: int = 6) -> None:
    """Trains on from ``model``'s weights with our attention and a peer's, in turns; times both, compares the losses."""
    params = nnx.state(model, nnx.Param)
    runs = {}
    for name in ("jax_flash", args.peer):
        contender = GPT(args, attention=name, rngs=nnx.Rngs(0))
        nnx.update(contender, jax.tree.map(jnp.copy, params))
        optimizer = make_optimizer(contender, 0.1 * args.lr, mesh)
        runs[name] = (nnx.cached_partial(train_step, contender, optimizer), [], [])
    data = batches(train_data, args, NamedSharding(mesh, PartitionSpec("data")), seed=2)
    for batch, _ in zip(data, range(1 + steps), strict=False):
        for train_on, losses, times in runs.values():
            began = time.perf_counter()
            losses.append(float(train_on(batch)))
            times.append(time.perf_counter() - began)

    print(f"\nThe same training step with either attention ({args.dtype}, median of {steps}):")
    medians = {name: statistics.median(times[1:]) for name, (_, _, times) in runs.items()}  # The first one compiles.
    for name, (_, losses, _) in runs.items():
        print(f"  {name:10} {1e3 * medians[name]:8.1f} ms   loss {losses[0]:.6f} ... {losses[-1]:.6f}")
    print(f"  {'speed-up':10} {medians[args.peer] / medians['jax_flash']:8.2f} x")
    # Later losses depend on the gradients of earlier steps, so that this checks both directions of the attention.
    tolerance = 1e-4 if args.dtype == "float32" else 5e-3
    ours, theirs = (losses for _, losses, _ in runs.values())
    difference = np.abs(np.subtract(ours, theirs)).max()
    if not difference <= tolerance:
        sys.exit(f"train_gpt: FAILED: expected losses equal to within {tolerance}, received {ours} and {theirs}.")
    print(f"  equal losses: the largest difference is {difference:.1e} (allowed {tolerance})")


def plot(curves: dict[str, list[tuple[int, float]]], path: pathlib.Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), label=name, marker="o" if name == "validation" else None, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="A small GPT on the Python standard library")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def parse_args() -> argparse.Namespace:
    on_gpu = jax.default_backend() != "cpu"
    parser = argparse.ArgumentParser(
        description="Trains a small GPT on the source files of the Python standard library.",
        epilog="The defaults depend on whether JAX finds a GPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--seq-len", type=int, help="bytes of text that the model sees at once")
    parser.add_argument("--width", type=int, help="features of the residual stream")
    parser.add_argument("--layers", type=int, help="transformer blocks")
    parser.add_argument("--heads", type=int, help="attention heads; they divide the width")
    parser.add_argument("--batch", type=int, help="windows per step, over all devices together")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of activations; weights are float32")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--peer", choices=["xla", "cudnn"], help="the attention that ours is compared with")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder for the loss curve")
    defaults = {name: values[on_gpu] for name, values in DEFAULTS.items()}
    parser.set_defaults(**defaults | {"batch": math.lcm(defaults["batch"], jax.device_count())})
    args = parser.parse_args()
    for name in ("steps", "seq_len", "width", "layers", "heads", "batch"):
        least = 2 * len(PROMPT) if name == "seq_len" else 1
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, received {getattr(args, name)}")
    if args.width % args.heads:
        parser.error(f"--heads: expected a divisor of --width {args.width}, received {args.heads}")
    if args.batch % jax.device_count():
        parser.error(f"--batch: expected a multiple of the {jax.device_count()} devices, received {args.batch}")
    return args


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    # With Auto axes the compiler places all arrays; the batch, sharded over "data", is the only one that we place.
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    train_data, val_data = load_corpus()
    model = GPT(args, attention="jax_flash", rngs=nnx.Rngs(0))
    replicate(model, mesh)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(
        f"{parameters / 1e6:.1f} M parameters, {len(train_data) / 1e6:.1f} MB of text, "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, {args.batch} x {args.seq_len} bytes per step",
        flush=True,
    )

    curves = train(model, args, mesh, train_data, val_data)
    (first, *_), (*_, last) = curves["validation"][:1], curves["validation"][-1:]
    print(f"validation loss {first[1]:.3f} -> {last[1]:.3f} nats per byte")
    plot(curves, args.out / "loss.png")
    print(f"loss curve: {args.out / 'loss.png'}")
    print(
        "\nA sample:\n"
        + "\n".join(f"  | {line}" for line in generate(model, PROMPT, min(400, args.seq_len)).split("\n"))
    )
    compare_with_peer(model, args, mesh, train_data)


if __name__ == "__main__":
    main()
