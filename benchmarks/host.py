"""What a call costs the host: one jitted attention beside an elementwise operation, and chains of 32 of each.

    python -m benchmarks.host --out benchmarks/results/host.json

Inputs are tiny, so that the device is never what is waited for. `host` is the time until the call returns, `latency`
until its result is there. On a GPU everything is measured with CUDA graphs, as XLA makes them of five and more calls in
a row, and without.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from . import machine, peers

_CHAIN = 32
_IN_FLIGHT = 10  # calls; the runtime would hold back the host if there were many more
_GRAPHS: dict[str, dict[str, Any]] = {"graphs": {}, "no graphs": {"xla_gpu_enable_command_buffer": ""}}


def _functions() -> dict[str, Callable[..., jax.Array]]:
    """Functions of query, key and value, all of one shape, by name."""
    import jax_flash

    def elementwise(query, key, value):
        return query + key * value

    functions = {"elementwise": elementwise, "attention": jax_flash.flash_attention}
    if peers.on_gpu():
        functions["cudnn"] = lambda *qkv: jax.nn.dot_product_attention(*qkv, implementation="cudnn")
    return functions


def _chained(function: Callable[..., jax.Array], length: int) -> Callable[..., jax.Array]:
    def chain(query, key, value):
        for _ in range(length):
            # The barrier keeps XLA from fusing elementwise operations into one.
            query = jax.lax.optimization_barrier(function(query, key, value))
        return query

    return chain


class _Timed:
    """Calls of one function, in batches that are never so many that one has to wait.

    Each call of a chain takes the place of its donated query, as a training step takes that of its state: where buffers
    moved, XLA would have to update its graphs in every call. One call alone is no graph and donates nothing: attention
    cannot write over its own query, so that XLA would copy the result there.
    """

    def __init__(self, function: Callable[..., jax.Array], qkv: jax.Array, length: int, options: dict[str, Any]):
        self.donates = length > 1
        donated = (0,) if self.donates else ()
        self.step = jax.jit(_chained(function, length), donate_argnums=donated, compiler_options=options)
        self.query, *self.kv = (jnp.copy(x) for x in qkv)
        self.host: list[float] = []
        self.latency: list[float] = []
        for _ in range(2 * _IN_FLIGHT):  # XLA captures a graph in the second call
            jax.block_until_ready(self._call())

    def _call(self) -> jax.Array:
        result = self.step(self.query, *self.kv)
        if self.donates:
            self.query = result
        return result

    def batch(self) -> None:
        start = time.perf_counter()
        results = [self._call() for _ in range(_IN_FLIGHT)]
        self.host.append((time.perf_counter() - start) / _IN_FLIGHT)
        jax.block_until_ready(results[-1])
        start = time.perf_counter()
        jax.block_until_ready(self._call())
        self.latency.append(time.perf_counter() - start)

    def microseconds(self) -> dict[str, float]:
        medians = {"host_us": statistics.median(self.host), "latency_us": statistics.median(self.latency)}
        return {name: 1e6 * seconds for name, seconds in medians.items()}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=200, help=f"batches of {_IN_FLIGHT} calls")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args(arguments)

    report: dict[str, Any] = {"command": shlex.join(["python", "-m", "benchmarks.host", *arguments])}
    report |= machine.describe() | {"results": []}
    qkv = jax.random.normal(jax.random.key(0), (3, 1, 64, 4, 64), jnp.bfloat16)
    modes = _GRAPHS if peers.on_gpu() else {"graphs": {}}
    host: dict[tuple[str, str, int], float] = {}
    print(f"{'function':12} {'calls':>5} {'mode':10} {'host':>9} {'latency':>9}  us")
    for mode, options in modes.items():
        for length in (1, _CHAIN):
            timed = {name: _Timed(function, qkv, length, options) for name, function in _functions().items()}
            for _ in range(args.repeats):  # in turns, so that a noisy neighbour disturbs all alike
                for calls in timed.values():
                    calls.batch()
            for name, calls in timed.items():
                times = calls.microseconds()
                report["results"].append({"function": name, "calls": length, "mode": mode, **times})
                host[name, mode, length] = times["host_us"]
                print(f"{name:12} {length:5} {mode:10} {times['host_us']:9.1f} {times['latency_us']:9.1f}", flush=True)
    for mode in modes:
        one, chain = (host["attention", mode, n] - host["elementwise", mode, n] for n in (1, _CHAIN))
        label = f" with {mode}" if len(modes) > 1 else ""
        print(f"beside elementwise{label}: {one:+.1f} us for one call, {chain / _CHAIN:+.2f} us a call in a chain")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
