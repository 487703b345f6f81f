"""Shows that memory grows linearly in the sequence length, and what importing jax_flash costs.

    python -m benchmarks.memory --out benchmarks/results/memory.json

Two views of memory, each length in a process of its own: what XLA plans for the compiled program beside its arguments
and results, and how far the process really grew while it ran. Twice the length should take about twice the memory; a
seqlen x seqlen buffer would take four times as much.
"""

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from . import machine

_HEADS, _HEAD_DIM = 2, 64

_TIME_IMPORT = """
import time, jax
start = time.perf_counter()
import jax_flash
print(time.perf_counter() - start)
"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seqlens", nargs="+", type=int, default=[4096, 8192, 16384])
    parser.add_argument("--imports", type=int, default=7, help="how often the import is timed")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--one", nargs=2, metavar=("PASS", "SEQLEN"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one:
        print(json.dumps(_measure(args.one[0], int(args.one[1]))))
        return 0

    report: dict[str, Any] = {"command": shlex.join(["python", "-m", "benchmarks.memory", *arguments])}
    report |= machine.describe() | {"memory": []}
    print(f"{'pass':17} {'seqlen':>7} {'inputs':>11} {'results':>11} {'temporary':>11} {'grew by':>11}  MiB")
    for pass_ in ("forward", "forward_backward"):
        for seqlen in args.seqlens:
            row = json.loads(_subprocess("-m", "benchmarks.memory", "--one", pass_, str(seqlen)))
            report["memory"].append(row)
            keys = ("argument_bytes", "output_bytes", "temporary_bytes", "growth_bytes")
            print(f"{pass_:17} {seqlen:7}", *(f"{row[key] / 2**20:11.1f}" for key in keys), flush=True)
    if args.imports:
        # -P: the source tree in the working directory must not hide the installed package.
        samples = [float(_subprocess("-P", "-c", _TIME_IMPORT)) for _ in range(args.imports)]
        report["import_ms"] = {"median": 1e3 * statistics.median(samples), "samples": [1e3 * s for s in samples]}
        print(f"import jax_flash adds {report['import_ms']['median']:.0f} ms to import jax")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _subprocess(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=machine.ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def _measure(pass_: str, seqlen: int) -> dict[str, Any]:
    """Compiles and runs causal attention once, in this process."""
    import jax_flash

    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16  # what there are kernels for

    def forward(*qkv):
        return jax_flash.flash_attention(*qkv, is_causal=True)

    def forward_backward(query, key, value):
        out, backward = jax.vjp(forward, query, key, value)
        return out, *backward(out)

    keys = jax.random.split(jax.random.key(0), 3)
    qkv = [jax.random.normal(key, (1, seqlen, _HEADS, _HEAD_DIM), dtype) for key in keys]
    jax.block_until_ready(qkv)
    compiled = jax.jit(forward if pass_ == "forward" else forward_backward).lower(*qkv).compile()
    # The peak may have been set by the compiler already, so this growth is an upper bound.
    before = _resident_bytes()
    jax.block_until_ready(compiled(*qkv))
    peak = _peak_bytes()
    plan = compiled.memory_analysis()
    assert plan is not None, "this backend does not say what memory it plans"
    return {
        "pass": pass_,
        "seqlen": seqlen,
        "num_heads": _HEADS,
        "head_dim": _HEAD_DIM,
        "argument_bytes": plan.argument_size_in_bytes,
        "output_bytes": plan.output_size_in_bytes,
        "temporary_bytes": plan.temp_size_in_bytes,
        "growth_bytes": max(0, peak - before),
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # Not Linux.
        return _peak_bytes()


if __name__ == "__main__":
    sys.exit(main())
