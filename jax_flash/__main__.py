"""``python -m jax_flash``: what was found on this machine, and the cache of compiled GPU kernels."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax

from jax_flash import _core
from jax_flash._attrs import MAX_HEAD_DIM

# Names and values of fields of KernelConfig.
DIRECTIONS = {"forward": 0, "backward": 1}
DTYPES = {"bfloat16": 1, "float16": 2}
FEATURES = ("alibi", "deterministic", "dropout", "segments", "softcap")

DESCRIPTION = "FlashAttention for JAX: what was found on this machine, and the cache of compiled GPU kernels."


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jax_flash", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", title="commands")
    cache = commands.add_parser(
        "cache",
        help="show, clear or fill the cache of compiled kernels",
        description="Shows the cache of compiled kernels: its folder, the number of entries and their size. Kernels "
        "that are missing are compiled when a program first needs them, in about a second each.",
        epilog="The folder is JAX_FLASH_CACHE_DIR, or jax_flash in the user's cache folder.",
    )
    action = cache.add_mutually_exclusive_group()
    action.add_argument("--clear", action="store_true", help="remove all entries")
    action.add_argument(
        "--precompile",
        action="store_true",
        help="compile the common kernels, forward and backward, for instance while building a container image: this "
        "needs NVRTC, but no GPU",
    )
    choice = cache.add_argument_group("what to precompile")
    choice.add_argument("--arch", nargs="+", metavar="SM", help="as in sm_80 or sm_90a (default: this machine's GPUs)")
    choice.add_argument(
        "--head-dim", nargs="+", type=head_dim, metavar="D", default=[64, 128], help="(default: 64 128)"
    )
    choice.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="(default: both)")
    choice.add_argument(
        "--feature",
        nargs="+",
        choices=FEATURES,
        default=[],
        help="compile for calls that use all of these (default: none). Causal masks, windows, sinks, grouped heads and "
        "packed sequences need no kernels of their own",
    )
    return parser


def head_dim(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= MAX_HEAD_DIM:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not in 1..{MAX_HEAD_DIM}")


def found() -> str:
    """Versions, one on a line; what is missing says so."""

    def or_error(function: Callable[[], object]) -> object:
        try:
            return function()
        except (RuntimeError, PackageNotFoundError) as error:
            return error

    archs = or_error(lambda: ", ".join(_core.visible_archs()) or "none")
    rows = {
        "jax_flash": or_error(lambda: version("jax-flash")),
        "jax": jax.__version__,
        "CUDA driver": or_error(_core.driver_version),
        "NVRTC": or_error(_core.nvrtc_version),
        "GPUs": archs,
        "CPU": _core.instruction_sets()[0],
    }
    return "found:\n" + "\n".join(f"  {name:12} {text}" for name, text in rows.items())


def cache_directory() -> Path:
    if directory := _core.cache_directory():
        return Path(directory)
    raise RuntimeError("there is no folder for the cache: set JAX_FLASH_CACHE_DIR, XDG_CACHE_HOME or HOME")


def show(directory: Path) -> None:
    sizes = [path.stat().st_size for path in directory.glob("*.cubin")]
    print(f"{directory}: {len(sizes)} kernels, {sum(sizes) / 2**20:.1f} MiB")


def clear(directory: Path) -> None:
    paths = [path for pattern in ("*.cubin", "*.tmp") for path in directory.glob(pattern)]
    for path in paths:
        path.unlink(missing_ok=True)
    print(f"{directory}: {len(paths)} files removed")


def precompile(directory: Path, archs: list[str], head_dims: list[int], dtypes: list[str], features: list[str]) -> None:
    if not archs:
        raise RuntimeError("no GPU was found: say for which to compile, as in --arch sm_90a")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):  # a cache that cannot be written is an error here, and nowhere else
        pass

    def compile_kernel(arch: str, direction: str, dtype: str, head_dim: int) -> None:
        facts = {
            "direction": DIRECTIONS[direction],
            "dtype": DTYPES[dtype],
            "head_dim": head_dim,
            "head_dim_v": head_dim,
            "num_batch_axes": 1,  # those that lie one behind the other count as one
            "positive_scale": 1,
            "aligned": int(head_dim % 8 == 0),
            **dict.fromkeys(features, 1),
        }
        for large_blocks in (0, 1):
            _core.compile_kernel(_core.configure(facts | {"large_blocks": large_blocks}, arch), arch)
        print(f"{arch} {direction} {dtype} head_dim {head_dim}")

    kernels = itertools.product(archs, DIRECTIONS, dtypes, head_dims)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in [pool.submit(compile_kernel, *kernel) for kernel in kernels]:
            done.result()


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        print(f"\n{found()}")
        return 0
    if options.arch and not options.precompile:
        parser.error("--arch is for --precompile")
    try:
        directory = cache_directory()
        if options.clear:
            clear(directory)
        else:
            if options.precompile:
                archs = options.arch or _core.visible_archs()
                precompile(directory, archs, options.head_dim, options.dtype, options.feature)
            show(directory)
    except (OSError, RuntimeError) as error:
        print(f"jax_flash: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
