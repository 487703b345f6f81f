"""Times jax_flash beside its peers and writes a table, a JSON report and a plot.

    python -m benchmarks.run --group cpu --out benchmarks/results/cpu.json --plot benchmarks/results/cpu.png

Before anything is timed, the outputs and gradients of the implementations are compared on the same data: the speed of
a wrong result means nothing. The exit status says whether jax_flash ran and agreed, never whether it was fast.
"""

import argparse
import collections
import fnmatch
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from . import machine, peers, plot, timing, workloads

# Relative root-mean-square difference of any (batch, head) between two right implementations: loose enough for
# another order of summation, far below what one wrong block or mask causes.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 4e-2}

Record = dict[str, Any]  # What the report holds of one (workload, pass, implementation).


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(arguments)
    selected = [w for w in workloads.GROUPS[args.group]() if any(fnmatch.fnmatch(w.name, p) for p in args.only)]
    if not selected:
        print(f"no workload of group {args.group} matches {args.only}", file=sys.stderr)
        return 2
    # Leave torch some memory of the GPU; JAX reads this when it first touches the device, which is below.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    passes = args.passes or (["forward", "backward"] if peers.on_gpu() else ["forward", "forward_backward"])
    report: dict[str, Any] = {"command": shlex.join(["python", "-m", "benchmarks.run", *arguments])}
    report |= machine.describe() | {"group": args.group, "rounds": args.rounds, "results": []}
    if args.commit:
        report |= {"commit": args.commit, "dirty": False}

    rate = "TFLOP/s" if peers.on_gpu() else "GFLOP/s"
    print(f"{'workload':25} {'pass':17} {'implementation':15} {'ms':>9} {'spread':>7} {rate:>8}  jax_flash is")
    for workload in selected:
        inputs = workload.inputs()
        for pass_ in passes:
            records = _run_pass(workload, inputs, pass_, args)
            _print_rows(records)
            report["results"] += records
        if args.out:  # each time, so that a run that is cut off leaves what it has measured
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    skipped = collections.Counter((r["implementation"], r["skipped"]) for r in report["results"] if "skipped" in r)
    for (name, reason), count in skipped.items():
        print(f"{name} skipped {count} of {len(passes) * len(selected)} passes: {reason}")
    _print_summary(report["results"], passes)

    if args.plot:
        plot.draw(report, args.plot)
    return int(any("failed" in r for r in report["results"] if r["implementation"] == "jax_flash"))


def _parser() -> argparse.ArgumentParser:
    names = [peer.name for peer in peers.PEERS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--group", choices=workloads.GROUPS, default="cpu")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="workloads, as shell patterns")
    parser.add_argument("--peers", nargs="+", choices=names, default=names)
    parser.add_argument("--passes", nargs="+", choices=workloads.PASSES, help="default: as suits the device")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check-only", action="store_true", help="compare the results and time nothing")
    parser.add_argument("--commit", help="the commit that this tree is a copy of, where git does not know it")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    return parser


def _run_pass(
    workload: workloads.Workload, inputs: dict[str, jax.Array], pass_: str, args: argparse.Namespace
) -> list[Record]:
    """One record for each implementation: what was measured, or why it was `skipped` or has `failed`."""
    records: dict[str, Record] = {}
    calls: dict[str, peers.Call] = {}
    arrays: dict[str, list[jax.Array]] = {}
    for peer in (peer for peer in peers.PEERS if peer.name in args.peers):
        record = records[peer.name] = {"workload": workload.name, "pass": pass_, "implementation": peer.name}
        if reason := peer.unavailable(workload, pass_):
            record["skipped"] = reason
            continue
        try:
            calls[peer.name] = peer.build(workload, inputs, pass_)
            arrays[peer.name] = calls[peer.name].arrays(calls[peer.name].run())
        except Exception as error:  # A peer that cannot do a workload, or lacks memory for it, must not end the run.
            record["failed"] = f"{type(error).__name__}: {error}".split("\n")[0]
    _compare(workload, arrays, records)
    if args.check_only:
        return list(records.values())
    calls = {name: call for name, call in calls.items() if "failed" not in records[name]}
    for name, samples in timing.measure(calls, args.rounds, peers.on_gpu()).items():
        median, spread = timing.median_and_spread(samples)
        records[name] |= {"ms": median * 1e3, "spread": spread, "tflops": workload.flops(pass_) / median / 1e12}
        records[name]["samples_ms"] = [sample * 1e3 for sample in samples]
    return list(records.values())


def _compare(workload: workloads.Workload, arrays: dict[str, list[jax.Array]], records: dict[str, Record]) -> None:
    """Notes in each record how far it is from the reference: the first implementation that ran and is not ours."""
    reference = next((name for name in arrays if name != "jax_flash"), None)
    for name in arrays:
        if workload.dropout_rate:
            records[name]["unchecked"] = "every implementation drops other elements"
        elif reference is None:
            records[name]["unchecked"] = "nothing to compare with"
        elif name != reference:
            largest = max(difference(x, y) for x, y in zip(arrays[name], arrays[reference], strict=True))
            records[name] |= {"difference": largest, "compared_with": reference}
            if not largest <= TOLERANCE[workload.dtype]:  # So written, it also catches a NaN.
                records[name]["failed"] = f"differs from {reference} by {largest:.1e}"


def difference(x: jax.typing.ArrayLike, reference: jax.typing.ArrayLike) -> float:
    """Largest relative root-mean-square difference of any (batch, head) of `[batch, seqlen, num_heads, head_dim]`."""
    return float(_difference_on_device(x, reference))


@jax.jit
def _difference_on_device(x, reference):
    x, reference = x.astype(jnp.float32), reference.astype(jnp.float32)
    squares = [jnp.square(y).sum((1, 3)) for y in (x - reference, reference)]
    return jnp.sqrt((squares[0] / squares[1]).max())


def _print_rows(records: list[Record]) -> None:
    ours = next((r["ms"] for r in records if r["implementation"] == "jax_flash" and "ms" in r), None)
    for record in (r for r in records if "skipped" not in r):
        row = f"{record['workload']:25} {record['pass']:17} {record['implementation']:15}"
        if "failed" in record:
            row += f" failed: {record['failed']}"
        elif "ms" in record:
            rate = record["tflops"] * (1 if peers.on_gpu() else 1e3)
            row += f" {record['ms']:9.3f} {record['spread']:7.1%} {rate:8.1f}"
            if ours and record["implementation"] != "jax_flash":
                row += f"  {record['ms'] / ours:.2f}x as fast"
        elif "difference" in record:
            row += f" agrees with {record['compared_with']}: {record['difference']:.1e}"
        elif "unchecked" not in record:
            row += " is what the others are compared with"
        print(row + (f"  (unchecked: {record['unchecked']})" if "unchecked" in record else ""), flush=True)


def _print_summary(records: list[Record], passes: list[str]) -> None:
    """One line for each workload: the rates of all implementations, pass by pass, and ours relative to torch's."""
    rates = {(r["workload"], r["implementation"], r["pass"]): r["tflops"] for r in records if "tflops" in r}
    names = [peer.name for peer in peers.PEERS if any(name == peer.name for _, name, _ in rates)]
    if not names:
        return
    unit, factor = ("TFLOP/s", 1) if peers.on_gpu() else ("GFLOP/s", 1e3)
    print(f"\n{unit}, {' / '.join(passes)}")
    print(f"{'workload':25}", *(f"{name:>13}" for name in names), f"{'jax_flash/torch':>17}")
    for workload in dict.fromkeys(workload for workload, _, _ in rates):

        def cell(texts: list[str]) -> str:
            return "" if set(texts) == {"-"} else "/".join(texts)

        row = {
            name: [rates.get((workload, name, pass_)) for pass_ in passes] for name in (*names, "jax_flash", "torch")
        }
        cells = [cell([f"{x * factor:.0f}" if x else "-" for x in row[name]]) for name in names]
        ratios = zip(row["jax_flash"], row["torch"], strict=True)
        ratio = cell([f"{ours / theirs:.2f}" if ours and theirs else "-" for ours, theirs in ratios])
        print(f"{workload:25}", *(f"{x:>13}" for x in cells), f"{ratio:>17}")


if __name__ == "__main__":
    sys.exit(main())
