"""Times choices of kernels and tiles beside each other, for cpp/cuda/heuristics.cc: each with its own line.

    python -m benchmarks.tune --group hopper --only 'h128_4096_*' --pass forward

A choice is a set of fields of KernelConfig (cpp/common/config.h) in place of the heuristics' own. CHOICES has those
that are worth a look, by pass and head dim; --choice adds others, as in --choice block_kv=176. A choice whose
results differ from those of the portable kernels is not timed.
"""

import argparse
import fnmatch
import functools
import sys
from collections.abc import Sequence

import jax

from . import machine, peers, run, timing, workloads

Choice = dict[str, int]

_PORTABLE: Choice = {"family": 0}
CHOICES: dict[tuple[str, int], list[Choice]] = {
    ("forward", 64): [  # for 2048 queries and more, which three warpgroups take 192 at a time
        {"num_stages": 2},
        {"block_q": 128, "num_warps": 8},
        {"block_q": 128, "num_warps": 8, "block_kv": 192, "num_stages": 2},
    ],
    ("forward", 128): [{"block_q": 128, "num_warps": 8}, {"block_q": 192, "num_warps": 12}],
    ("forward", 256): [{"block_kv": 64}],
    ("backward", 64): [{"block_q": 64}],
}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if not peers.on_gpu():
        print("there is no GPU to tune for", file=sys.stderr)
        return 2
    from jax_flash import _core

    print(f"{machine.describe()}\n{'workload':25} {'choice':60} {'ms':>9} {'spread':>7} {'TFLOP/s':>8}")
    for workload in workloads.GROUPS[args.group]():
        if any(fnmatch.fnmatch(workload.name, pattern) for pattern in args.only):
            _tune(workload, args.pass_, args.choice, args.rounds)
    _core.override_config({})
    return 0


def _tune(workload: workloads.Workload, pass_: str, more: list[Choice], rounds: int) -> None:
    choices = [_PORTABLE, {}, *CHOICES.get((pass_, workload.head_dim), []), *more]
    ours = next(peer for peer in peers.PEERS if peer.name == "jax_flash").build(workload, workload.inputs(), pass_)
    calls: dict[str, peers.Call] = {}
    expected: list[jax.Array] = []
    for choice in choices:
        name = ", ".join(f"{field}={value}" for field, value in choice.items()) or "the heuristics'"
        call = peers.Call(functools.partial(_run, ours, choice), ours.wait, ours.arrays)
        try:
            arrays = call.arrays(jax.block_until_ready(call.run()))
        except Exception as error:  # a choice that does not compile must not end the run
            print(f"{workload.name:25} {name:60} failed: {str(error).splitlines()[0][:100]}", flush=True)
            continue
        expected = expected or arrays
        difference = max(run.difference(x, y) for x, y in zip(arrays, expected, strict=True))
        if difference <= run.TOLERANCE[workload.dtype]:
            calls[name] = call
        else:
            print(f"{workload.name:25} {name:60} wrong: differs by {difference:.1e}", flush=True)
    for name, samples in timing.measure(calls, rounds, True).items():
        median, spread = timing.median_and_spread(samples)
        rate = workload.flops(pass_) / median / 1e12
        print(f"{workload.name:25} {name:60} {median * 1e3:9.3f} {spread:7.1%} {rate:8.1f}", flush=True)


def _run(call: peers.Call, choice: Choice) -> object:
    from jax_flash import _core

    _core.override_config(choice)
    return call.run()


def _choice(text: str) -> Choice:
    fields = (item.partition("=") for item in text.split(","))
    return {name: int(value) for name, _, value in fields}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--group", choices=workloads.GROUPS, default="hopper")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="workloads, as shell patterns")
    parser.add_argument("--pass", dest="pass_", choices=("forward", "backward"), default="forward")
    parser.add_argument("--choice", nargs="+", type=_choice, default=[], metavar="FIELD=VALUE,...")
    parser.add_argument("--rounds", type=int, default=5)
    return parser


if __name__ == "__main__":
    sys.exit(main())
