"""Runs a small subset of everything under NVIDIA's compute-sanitizer: `make test-sanitizer-gpu`.

    python tests/sanitizer_subset.py [--tools memcheck racecheck initcheck synccheck] [--jobs 4]

Started so, it starts itself for each tool (with --run), several times at once with a share of the calls each, and fails
on reports about our kernels alone: those of XLA and of the driver are not ours to mend. initcheck watches the others'
kernels too, as it would otherwise not know what they have written.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
KERNELS = "jax_flash"


def reports(log: str) -> list[tuple[str, str]]:
    """The sanitizer's reports about one of our kernels, each behind the call that it came from: a line, with the
    indented ones below it."""
    of_calls = re.split(r"^((?:portable|hopper): .*)$", log, flags=re.MULTILINE)  # a line in front of each
    return [
        (call, block)
        for call, text in zip(["", *of_calls[1::2]], of_calls[::2], strict=True)
        for block in re.split(r"^=========\s?(?=\S)", text, flags=re.MULTILINE)
        if re.search(rf"\bat (0x\w+ in )?\S*{KERNELS}", block)
    ]


def find_sanitizer() -> str | None:
    """That of the package nvidia-cuda-sanitizer-api, else a CUDA toolkit's.

    The racecheck of CUDA 13.0 reports what Hopper's backward reads of a buffer that the copy engine fills again, as it
    does not see that barriers are in between. That of 13.5 does see it.
    """
    spec = importlib.util.find_spec("nvidia")
    for root in (spec and spec.submodule_search_locations) or []:
        for path in Path(root).glob("*/bin/compute-sanitizer"):
            return str(path)
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def check(tool: str, sanitizer: str, jobs: int) -> bool:
    command = [sanitizer, "--tool", tool, "--report-api-errors", "no", "--print-limit", "20"]
    if tool != "initcheck":
        command += ["--kernel-name", f"kernel_substring={KERNELS}"]
    # Every buffer is an allocation of its own, so that the sanitizer sees where it ends.
    environment = os.environ | {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "JAX_PLATFORMS": "cuda,cpu"}
    command += [sys.executable, "-P", __file__, "--run"]

    def run(job: int) -> subprocess.CompletedProcess:
        share = [*command, str(job), str(jobs)]
        return subprocess.run(
            share, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment
        )

    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(run, range(jobs)))
    found = [report for process in done for report in reports(process.stdout)]
    failed = [process for process in done if process.returncode]
    clean = not failed and not found
    print(f"{tool}: {'clean' if clean else f'{len(failed)} of {jobs} failed, {len(found)} reports'}", flush=True)
    # Such as that there are more barriers than the tool follows.
    logs = "\n".join(process.stdout for process in done)
    for warning in sorted(set(re.findall(r"^=+ (Warning: .*)", logs, flags=re.MULTILINE))):
        print(warning, flush=True)
    if not clean:
        # Which calls they are of, as only the first reports are shown.
        for call, count in Counter(call for call, _ in found).items():
            print(f"{call}: {count} times", flush=True)
        print("\n".join(block for _, block in found[:5]) or failed[0].stdout[-3000:], flush=True)
    return clean


def calls() -> dict[str, Callable[[], object]]:
    """What is run: every kind of operand, mask and kernel, on a few tiles with ragged edges."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jax_flash import flash_api, flash_attention, flash_attention_varlen, paged_attention

    rng = np.random.default_rng(0)

    def normal(*shape, dtype=jnp.bfloat16):
        return jax.device_put(rng.standard_normal(shape).astype(dtype))

    def ints(*values):
        return jax.device_put(np.array(values, np.int32))

    def gradients(call, *arrays):
        @jax.jit
        def step(arrays, d_out, d_lse):
            (out, lse), vjp = jax.vjp(call, *arrays)
            return out, lse, vjp((d_out, jnp.where(jnp.isneginf(lse), 0, d_lse)))

        q, v = arrays[0], arrays[2]
        d_lse = normal(*q.shape[:-3], q.shape[-2], q.shape[-3], dtype=np.float32)
        return step(arrays, normal(*q.shape[:-1], v.shape[-1], dtype=q.dtype), d_lse)

    def dense(dim=64, dim_v=None, dtype=jnp.bfloat16, seqlen_q=130, seqlen_kv=203, bias=None, **options):
        arrays = [normal(2, n, k, d, dtype=dtype) for n, k, d in
                  ((seqlen_q, 4, dim), (seqlen_kv, 2, dim), (seqlen_kv, 2, dim_v or dim))]  # fmt: skip
        if bias is not None:  # its rows can be copied in tiles where they are of 16 bits and start on 16 bytes
            arrays.append(normal(*bias, dtype=jnp.bfloat16 if seqlen_kv % 8 == 0 else np.float32))
        return lambda: gradients(
            lambda q, k, v, bias=None: flash_attention(q, k, v, bias=bias, return_lse=True, **options), *arrays
        )

    def varlen(offsets_q, offsets_kv, dim=64, longest=100, **options):
        arrays = [normal(200, heads, dim) for heads in (4, 2, 2)]
        where = ints(*offsets_q), ints(*offsets_kv)

        def call(q, k, v):
            lengths = {"max_seqlen_q": longest, "max_seqlen_kv": longest}
            return flash_attention_varlen(q, k, v, *where, **lengths, return_lse=True, **options)

        return lambda: gradients(call, *arrays)

    def paged(table, lengths, page_size=16, dim=64, seqlen_q=3):
        arrays = normal(2, seqlen_q, 4, dim), *(normal(7, page_size, 2, dim) for _ in range(2))
        return lambda: paged_attention(*arrays, ints(*table), ints(*lengths), return_lse=True)

    def softmax():
        qkv = [normal(2, n, h, 64) for n, h in ((130, 4), (203, 2), (203, 2))]
        return lambda: flash_api.mha_fwd(
            *qkv, is_causal=True, p_dropout=0.2, dropout_key=np.uint32([1, 2]), return_softmax=True
        )

    dropout = {"dropout_rate": 0.2, "dropout_key": np.uint32([1, 2])}
    heads = np.float32([0.5, 0.25, 0.1, 0.05])
    huge = 2**31 - 1
    result = {
        "full": dense(),
        "float16": dense(dtype=jnp.float16),
        "one query": dense(seqlen_q=1),
        "long": dense(seqlen_q=2060),
        "several units of a thread block": dense(seqlen_kv=10240),
        "several units of a pair of thread blocks": dense(256, seqlen_kv=3000),
        "window": dense(local_window_size=(40, 30)),
        "window of causal": dense(local_window_size=(40, 0), is_causal=True, causal_alignment="top_left"),
        "softcap": dense(logits_soft_cap=3.0),
        "softcap 256": dense(256, logits_soft_cap=3.0),
        "alibi, sinks": dense(is_causal=True, alibi_slopes=heads, sinks=heads),
        "mask": dense(mask=rng.random((2, 1, 130, 203)) < 0.5),
        "mask of whole words": dense(seqlen_kv=208, mask=rng.random((2, 1, 130, 208)) < 0.5),
        "lengths": dense(query_seq_lengths=np.int32([130, 7]), key_value_seq_lengths=np.int32([0, 99])),
        "lengths out of range": dense(
            query_seq_lengths=np.int32([huge, -1]), key_value_seq_lengths=np.int32([huge, 204])
        ),
        "segments": dense(
            query_segment_ids=np.repeat(np.int32([[0, 1], [0, 2]]), 65, 1),
            key_value_segment_ids=np.zeros((2, 203), np.int32),
        ),
        "bias": dense(bias=(2, 4, 130, 203)),
        "bias in tiles": dense(seqlen_kv=208, bias=(1, 4, 130, 208)),
        "bias of keys": dense(bias=(1, 1, 1, 203)),
        "bias of queries": dense(bias=(1, 4, 130, 1), deterministic=True),
        "dim 72": dense(72, 40),
        "dim 192, 128": dense(192, 128, is_causal=True),
        "varlen": varlen((3, 60, 60, 160), (0, 90, 100, 190)),
        "varlen out of range": varlen((-5, 60, 20, huge), (huge, 0, 300, 100)),
        "varlen longer than stated": varlen((0, 10, 200), (0, 10, 200), longest=64),
        "varlen longer than stated 192": varlen((0, 10, 200), (0, 10, 200), 192, longest=64),
        "pages": paged(([0, 3, 5], [1, 2, 4]), (48, 17)),
        "pages of 1": paged(([0, 3, 5], [1, 2, 4]), (3, 0), page_size=1),
        "pages out of range": paged(([-1, huge, 7], [-(2**31), 2, 4]), (huge, -1)),
        "softmax": softmax(),
    }
    for dim in (64, 128, 256):
        result |= {
            f"causal {dim}": dense(dim, is_causal=True),
            f"deterministic {dim}": dense(dim, is_causal=True, deterministic=True),
            f"dropout {dim}": dense(dim, **dropout),
            f"varlen causal {dim}": varlen((0, 77, 77, 177), (0, 33, 100, 200), dim, is_causal=True),
            f"pages {dim}": paged(([0, 3, 5], [1, 2, 4]), (48, 17), dim=dim, seqlen_q=70),
        }
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--jobs", type=int, default=4, help="processes at once, with a share of the calls each")
    parser.add_argument("--run", type=int, nargs=2, metavar=("JOB", "JOBS"), help="the calls of this share themselves")
    args = parser.parse_args()
    if not args.run:
        sanitizer = find_sanitizer()
        if not sanitizer:
            sys.exit(
                "compute-sanitizer is missing: install nvidia-cuda-sanitizer-api, or put a CUDA toolkit's on the PATH"
            )
        failed = [tool for tool in args.tools if not check(tool, sanitizer, args.jobs)]
        return int(bool(failed))
    import jax

    from jax_flash import _core

    # Where there are two families of kernels, both.
    for family in ("portable", "hopper") if "sm_90a" in _core.visible_archs() else ("portable",):
        _core.override_config({"family": int(family == "hopper")})
        for name, call in list(calls().items())[args.run[0] :: args.run[1]]:
            print(f"{family}: {name}", flush=True)
            jax.block_until_ready(call())
    return 0


if __name__ == "__main__":
    sys.exit(main())
