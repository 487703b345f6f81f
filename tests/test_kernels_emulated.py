"""The GPU kernels without a GPU: their sources, compiled by g++, run on the CPU (see tests/emulator).

The public functions call an emulated GPU through XLA's CPU client, with the same decoding, choice of tiles and launches
as on a real one. The oracle is the CPU's implementation in float32, which is tested against plain jnp and has the same
dropout bits. The emulator turns a wild access, a race between warps, a copy that is not waited for and undefined
behaviour into errors, and results start as NaN.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_equal, assert_near, cotangents_of, ints, wide, with_gradients

from jax_flash import _ffi, flash_api, flash_attention, flash_attention_varlen, paged_attention

ROOT = Path(__file__).resolve().parents[1]
EMULATOR = ROOT / "tests" / "emulator"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or "no C++ compiler"
# Each library keeps its symbols to itself.
LINKING = ("-shared", "-Wl,-Bsymbolic")
FLAGS = f"-std=c++20 -w -fPIC -fno-gnu-unique {' '.join(LINKING)}"
# Of what runs in fibers, which a fortified longjmp would not leave.
FIBER_FLAGS = f"{FLAGS} -fno-strict-aliasing -U_FORTIFY_SOURCE"
GPU_FLAGS = f"{FIBER_FLAGS} -O2"
# -Og: most kernels run for less time than more would take to compile. A GPU shifts by too much otherwise than a CPU
# does.
KERNEL_FLAGS = (
    f"{FIBER_FLAGS} -Og -Wno-psabi "
    "-ftrivial-auto-var-init=pattern -fsanitize-undefined-trap-on-error "
    "-fsanitize=alignment,bounds,integer-divide-by-zero,shift,signed-integer-overflow"
)
GPU_FILES = ["gpu.cc", "ptx.cc"]
HOST_FILES = [
    "cuda/disk_cache.cc", "cuda/heuristics.cc", "cuda/jit.cc", "cuda/launch_bwd.cc", "cuda/launch_dbias.cc",
    "cuda/launch_fwd.cc", "cuda/simplify.cc", "cuda/tensor_map.cc", "ffi/decode.cc",
]  # fmt: skip
# Shared memory, as cpp/cuda/driver.cc knows it.
ARCHS = {90: 232448, 86: 101376, 80: 166912}
PORTABLE, HOPPER = 0, 1  # families of kernels
BF16, F16 = jnp.bfloat16, jnp.float16


def version_of_compiler() -> str:
    try:
        return subprocess.run([*COMPILER.split(), "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


GCC = re.match(r"\S+ \(.*\) (\d+)\.(?s:.*)Free Software Foundation", version_of_compiler())
if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
    pytest.skip("the emulated GPU needs Linux on x86-64 or aarch64", allow_module_level=True)
if not GCC or int(GCC[1]) < 12:
    pytest.skip("the emulated GPU needs g++ 12 or later, as $CXX or on the PATH", allow_module_level=True)


# ---- The emulated GPU ----


def compile_library(target: Path, flags: list[str]) -> None:
    """Under another name first: several workers may do the same."""
    temporary = target.with_suffix(f".{os.getpid()}")
    done = subprocess.run(
        [*COMPILER.split(), *flags, "-o", str(temporary)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    temporary.replace(target)


INCLUDES = [f"-I{EMULATOR}", f"-I{ROOT / 'cpp'}"]


@pytest.fixture(scope="session")
def build(request, tmp_path_factory) -> Path:
    """The folder for what is compiled of these sources: in pytest's cache, where it stays."""
    cache = getattr(request.config, "cache", None)  # None with -p no:cacheprovider
    sources = [p for folder in (ROOT / "cpp", EMULATOR) for p in sorted(folder.rglob("*")) if p.is_file()]
    key = hashlib.sha256("\0".join([GPU_FLAGS, KERNEL_FLAGS, version_of_compiler(), jax.__version__]).encode())
    for path in sources:
        key.update(path.read_bytes())
    folder = (cache.mkdir("emulator") if cache else tmp_path_factory.mktemp("emulator")) / key.hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def gpu(build) -> Path:
    """The library with what all kernels have in common."""
    library = build / "gpu.so"
    if not library.exists():
        compile_library(library, [*GPU_FLAGS.split(), *INCLUDES, *(str(EMULATOR / f) for f in GPU_FILES)])
    return library


@pytest.fixture(scope="session")
def runtime(build, gpu) -> ctypes.CDLL:
    """The library with the emulated GPU's run time, registered with XLA."""
    library = build / "emulator.so"
    if not library.exists():
        with contextlib.suppress(FileExistsError):
            (build / "cuda").symlink_to(ROOT / "cpp")  # where the library looks for the kernels' sources
        precompiled = build / "precompiled"
        precompiled.mkdir(exist_ok=True)
        header = ["-x", "c++-header", str(EMULATOR / "ptx.h")]
        flags = [flag for flag in KERNEL_FLAGS.split() if flag not in LINKING]
        compile_library(precompiled / "ptx.h.gch", [*flags, *INCLUDES, *header])
        kernel_compiler = f"{COMPILER} {KERNEL_FLAGS} -I'{precompiled}' -I. -I'{EMULATOR}' -I'{ROOT / 'cpp'}'"
        defines = [
            f'-DEMULATOR_VERSION="{build.name}"',
            f'-DEMULATOR_COMPILER="{kernel_compiler}"',
            f'-DEMULATOR_LIBRARY="{gpu}"',
        ]
        files = [str(EMULATOR / "runtime.cc"), *(str(ROOT / "cpp" / name) for name in HOST_FILES)]
        compile_library(
            library,
            [*FLAGS.split(), *defines, *INCLUDES, "-isystem", jax.ffi.include_dir(), *files, "-ldl"],
        )
    loaded = ctypes.CDLL(str(library))
    loaded.emulate.argtypes = [ctypes.c_int, ctypes.c_longlong]
    loaded.emulate_choice.argtypes = [ctypes.c_int, ctypes.c_bool]
    loaded.emulated_blocks.restype = ctypes.c_longlong
    loaded.has_sound_order.argtypes = [ctypes.c_longlong] * 5
    loaded.has_sound_order.restype = ctypes.c_bool
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_FLASH_CACHE_DIR", str(build / "kernels"))
        loaded.emulate(90, ARCHS[90])
    for name in ("emulated_fwd", "emulated_bwd", "emulated_dbias"):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    return loaded


@pytest.fixture
def emulated(runtime, monkeypatch):
    """``emulated(sm=90, family, large_blocks)``: a context in which attention that is traced, and run, goes to the
    emulated GPU. Large blocks are what Hopper's forward takes where there are many queries."""

    @contextlib.contextmanager
    def context(sm: int = 90, family: int = PORTABLE, large_blocks: bool = False):
        runtime.emulate(sm, ARCHS[sm])
        runtime.emulate_choice(family, large_blocks)
        with monkeypatch.context() as patch:
            patch.setattr(_ffi, "FORWARD_TARGET", "emulated_fwd")
            patch.setattr(_ffi, "BACKWARD_TARGET", "emulated_bwd")
            patch.setattr(_ffi, "DBIAS_TARGET", "emulated_dbias")
            yield

    return context


# ---- Comparison ----


def results_of(call, arrays, cotangents):
    """(out, lse) and the gradients of all arrays, waited for while the emulated GPU is there."""
    return jax.block_until_ready(with_gradients(call)(arrays, cotangents))


def compare(emulated, call, arrays, cotangents, sm=90, factor: float = 1.0, family=PORTABLE, large_blocks=False):
    with emulated(sm, family, large_blocks):
        actual = results_of(call, arrays, cotangents)
    expected = results_of(call, wide(arrays), wide(cotangents))
    np.testing.assert_allclose(actual[0][1], expected[0][1], rtol=1e-4, atol=1e-3)
    assert_near((actual[0][0], actual[1]), (expected[0][0], expected[1]), arrays[0].dtype, factor)
    return actual


# ---- Dense ----

HEADS = np.float32([0.5, -0.25, 0.1, 0.05])
DROPOUT = {"dropout_rate": 0.3, "dropout_key": np.uint32([7, 8])}
LENGTHS = {"query_seq_lengths": np.int32([150, 77]), "key_value_seq_lengths": np.int32([131, 0])}
BOTTOM, TOP = {"is_causal": True}, {"is_causal": True, "causal_alignment": "top_left"}


def normal(*shape, dtype=jnp.float32):
    return lambda rng: rng.normal(*shape, dtype=dtype)


def booleans(*shape):
    return lambda rng: rng.bernoulli(*shape, p=0.7)


def segments(last: int, *shape):
    return lambda rng: jnp.sort(rng.integers(0, last, *shape))


def segments_apart(T: int, S: int):
    """No query sees a key from the 60th on."""
    ids = np.repeat(np.int32([[0] * 60 + [7] * (S - 60)]), 2, 0)
    return {"T": T, "S": S, "query_segment_ids": np.zeros((2, T), np.int32), "key_value_segment_ids": ids}


# [B, T, N, H] = [2, 150, 4, 64] and [B, S, K] = [2, 200, 2] unless a case says otherwise. Options that are functions
# are called with the random generator. Every tiling of heuristics.cc is here, and every field of KernelConfig.
CASES = {
    "64": {},
    "64 float16 bottom": {"dtype": F16, "T": 300, "S": 333, **BOTTOM},
    "64 rows without keys": {"T": 300, "S": 130, **BOTTOM},
    "64 keys that no row sees": {"T": 70, "S": 300, **TOP},
    "64 one query": {"T": 1, "S": 129, **BOTTOM},
    "no keys": {"S": 0},
    "no queries": {"T": 0},
    "32": {"H": 32, "sm": 86, **TOP},
    "96 window": {"H": 96, "local_window_size": (70, 20)},
    "128": {"H": 128, "T": 130, "S": 260, **BOTTOM},
    "128 small": {"H": 128, "sm": 86, "dtype": F16, "K": 1, "local_window_size": (20, 5)},
    "256": {"H": 256, "T": 100, "S": 90, **BOTTOM},
    "256 small": {"H": 256, "T": 70, "S": 130, "sm": 86, "N": 2, "K": 1},
    "256 on A100": {"H": 256, "T": 70, "S": 130, "sm": 80, "N": 2, "K": 1},
    "192, 128": {"H": 192, "D": 128, "T": 70, "N": 2, "K": 1, **BOTTOM},
    "72, 40": {"H": 72, "D": 40},
    "64, 40": {"D": 40},
    "59": {"H": 59, "dtype": F16, **BOTTOM},
    "131, 7": {"H": 131, "D": 7, "T": 40, "S": 70, "dtype": F16},
    "negative scale": {"scale": -0.2, **TOP},
    "cap, alibi, sinks": {"logits_soft_cap": 3.0, "alibi_slopes": HEADS, "sinks": normal(4), **BOTTOM, "factor": 2},
    "bias": {"bias": normal(2, 4, 150, 200, dtype=BF16), **BOTTOM},
    "bias for all": {"H": 128, "bias": normal(1, 1, 150, 200, dtype=F16), "local_window_size": (70, 20)},
    "bias of odd rows": {"S": 199, "bias": normal(1, 4, 150, 199, dtype=BF16), "dtype": F16, "factor": 1.5},
    "bias of keys": {"S": 201, "bias": normal(2, 1, 1, 201), "H": 128},
    "bias of queries": {"bias": normal(1, 4, 150, 1, dtype=F16), "deterministic": True},
    "bias 256": {"H": 256, "T": 70, "S": 96, "bias": normal(1, 4, 70, 96, dtype=F16), "dtype": F16},
    "bias 256 small": {"H": 256, "T": 70, "S": 130, "sm": 86, "N": 2, "bias": normal(1, 2, 70, 130)},
    "bias 128 on A100": {"H": 128, "sm": 80, "bias": normal(1, 4, 150, 200, dtype=BF16), "is_causal": True},
    "bias 128 small": {"H": 128, "D": 96, "sm": 86, "bias": normal(1, 4, 150, 200, dtype=BF16), **BOTTOM},
    "bias 59": {"H": 59, "T": 70, "S": 136, "bias": normal(2, 1, 70, 136, dtype=F16), "dtype": F16, "factor": 1.5},
    "bias, lengths": {"T": 300, "S": 270, "N": 2, "bias": normal(1, 2, 300, 270), **LENGTHS},
    "bias beside queries and keys": {"T": 300, "S": 130, "bias": normal(2, 1, 300, 130, dtype=BF16), **BOTTOM},
    "bias that no query sees": {"T": 300, "S": 136, "bias": normal(2, 4, 300, 136, dtype=BF16), **BOTTOM},
    "mask, lengths": {"mask": booleans(2, 1, 150, 200), **LENGTHS},
    "wide mask": {"S": 208, "mask": booleans(1, 4, 150, 208), "local_window_size": (90, 20), "dtype": F16},
    "wide mask 128": {"H": 128, "T": 200, "S": 176, "mask": booleans(2, 1, 200, 176)},
    "mask of odd rows": {"S": 203, "H": 128, "mask": booleans(1, 4, 150, 203), **BOTTOM},
    "lengths": {"H": 128, **BOTTOM, **LENGTHS},
    "segments": {
        "T": 300, "S": 333, "query_segment_ids": segments(3, 2, 300), "key_value_segment_ids": segments(4, 2, 333)
    },
    "segments apart": segments_apart(150, 200),
    "segments in any order": {
        "query_segment_ids": lambda r: r.integers(0, 2, 2, 150),
        "key_value_segment_ids": lambda r: r.integers(0, 2, 2, 200), **BOTTOM,
    },
    "dropout": {**DROPOUT, **BOTTOM},
    "dropout 128": {"H": 128, **DROPOUT, "deterministic": True},
    "dropout 128 small": {"H": 128, "sm": 86, **DROPOUT},
    "dropout 256": {"H": 256, "T": 70, "S": 130, **DROPOUT},
    "dropout 256 small": {"H": 256, "T": 70, "S": 130, "sm": 86, "N": 2, **DROPOUT},
    "deterministic": {"T": 200, "S": 500, "deterministic": True, "local_window_size": (150, 100)},
    "deterministic 256": {"H": 256, "T": 130, "S": 200, "deterministic": True, "N": 2, **BOTTOM},
    "everything": {
        "H": 40, "scale": 0.2, "logits_soft_cap": 4.0, "alibi_slopes": 0.1 * HEADS, "sinks": normal(4),
        "bias": normal(2, 1, 150, 200), "mask": booleans(1, 4, 150, 200), **LENGTHS, **DROPOUT, "deterministic": True,
        "query_segment_ids": segments(1, 2, 150), "key_value_segment_ids": segments(1, 2, 200),
        "local_window_size": (120, 10), "factor": 2,
    },
}  # fmt: skip


def check_dense(rng, emulated, case, family, large_blocks=False):
    shape = {"T": 150, "S": 200, "N": 4, "K": 2, "H": 64, "dtype": BF16, "sm": 90, "factor": 1}
    options = {name: x(rng) if callable(x) else x for name, x in case.items() if name not in {*shape, "D"}}
    shape |= {name: x for name, x in case.items() if name in {*shape, "D"}}
    T, S, dtype = shape["T"], shape["S"], shape["dtype"]
    q, k, v = rng.qkv(2, T, S, shape["N"], shape["K"], shape["H"], shape.get("D"), dtype=dtype)
    d_out, d_lse = cotangents_of(rng, q, v)
    if (
        options.get("is_causal")
        and options.get("causal_alignment") != "top_left"
        and T > S > 0
        and "sinks" not in options
    ):
        # Rows that see no key have no gradient, whatever theirs is.
        d_out, q = d_out.at[:, : T - S].set(jnp.nan), q.at[:, : T - S].set(jnp.nan)
    # What lies behind the lengths must reach nothing.
    for b, length in enumerate(options.get("key_value_seq_lengths", ())):
        k, v = k.at[b, length:].set(jnp.nan), v.at[b, length:].set(jnp.nan)
    for b, length in enumerate(options.get("query_seq_lengths", ())):
        q, d_out = q.at[b, length:].set(jnp.nan), d_out.at[b, length:].set(jnp.nan)
    more = [name for name in ("bias", "sinks") if name in options]
    arrays = [q, k, v, *(options.pop(name) for name in more)]

    def call(q, k, v, *rest):
        return flash_attention(q, k, v, **dict(zip(more, rest, strict=True)), **options, return_lse=True)

    compare(emulated, call, arrays, (d_out, d_lse), shape["sm"], shape["factor"], family, large_blocks)


@pytest.mark.parametrize("case", CASES)
def test_dense(rng, emulated, case):
    check_dense(rng, emulated, CASES[case], PORTABLE)


# Of those, what makes a difference to Hopper's kernels.
ON_HOPPER = (
    "64 float16 bottom", "72, 40", "96 window", "128", "256", "192, 128", "cap, alibi, sinks", "no keys", "no queries",
    "bias", "bias for all", "wide mask", "wide mask 128", "segments", "segments apart", "dropout 128",
    "deterministic", "deterministic 256", "everything",
)  # fmt: skip


@pytest.mark.parametrize("case", ON_HOPPER)
def test_dense_on_hopper(rng, emulated, case):
    check_dense(rng, emulated, CASES[case], HOPPER)


# The same with three warpgroups: blocks that end with the sequence, of which the first one is not full.
LARGE_BLOCKS = {
    "64": {"T": 300, "S": 333, **BOTTOM},
    "64, lengths, sinks": {"T": 500, "S": 200, "sinks": normal(4), **TOP, **LENGTHS},
    "96 window": {"H": 96, "T": 470, "S": 400, "dtype": F16, "local_window_size": (150, 40)},
    "128": {"H": 128, "T": 200, "S": 150, "N": 2, "K": 1},
    "128, lengths, sinks": {"H": 128, "T": 330, "S": 300, "sinks": normal(4), **BOTTOM, **LENGTHS},
    "64, 128 rows without keys": {"D": 128, "T": 400, "S": 130, "N": 2, **BOTTOM},
}


@pytest.mark.parametrize("case", LARGE_BLOCKS)
def test_large_blocks(rng, emulated, case):
    check_dense(rng, emulated, LARGE_BLOCKS[case], HOPPER, large_blocks=True)


# The backward of large head dims, by pairs of thread blocks.
PAIRS = {
    "everything": {**CASES["everything"], "H": 200, "D": 32, "dtype": F16},
    "192 bias, cap": {
        "H": 192,
        "logits_soft_cap": 3.0,
        "bias": normal(2, 4, 150, 200, dtype=BF16),
        **DROPOUT,
        **BOTTOM,
        "factor": 2,
    },
    "192 segments apart": {"H": 192, **CASES["segments apart"]},
    "96, 192 lengths": {"H": 96, "D": 192, **LENGTHS, **TOP},
    "32, 256 dropout": {"H": 32, "D": 256, "dtype": F16, **DROPOUT},
}


@pytest.mark.parametrize("case", PAIRS)
def test_pairs(rng, emulated, case):
    check_dense(rng, emulated, PAIRS[case], HOPPER)


# The backward where a warpgroup sees nothing of the first step of a block of keys.
PASSED_OVER = {
    "128": {"H": 128, "T": 200, **BOTTOM},
    "128 deterministic": {"H": 128, "T": 200, "deterministic": True, "N": 2, **BOTTOM},
    "128 segments apart": {"H": 128, **segments_apart(150, 190)},  # nor of the last 64 keys by position
    "192, 128": {"H": 192, "D": 128, "T": 200, "N": 2, **TOP},
    "192, 128 segments apart": {"H": 192, "D": 128, "N": 2, **TOP, **segments_apart(200, 200)},
    "256 its only step": {"H": 256, "T": 192, "S": 192, "N": 2, **BOTTOM, "dtype": F16},
}


@pytest.mark.parametrize("case", PASSED_OVER)
def test_steps_passed_over(rng, emulated, case):
    check_dense(rng, emulated, PASSED_OVER[case], HOPPER)


# A warpgroup, or a pair's thread block, may be further ahead of others than warps in turns ever are.
LAGGING = {
    "64": CASES["64 float16 bottom"],
    "256 deterministic": CASES["deterministic 256"],
    **{f"{name} passed over": PASSED_OVER[name] for name in ("128", "192, 128", "256 its only step")},
}


@pytest.mark.parametrize("seed", (1, 2, 3))
@pytest.mark.parametrize("case", LAGGING)
def test_lagging_warps(rng, emulated, gpu, case, seed):
    library = ctypes.CDLL(str(gpu))
    library.let_warps_lag(seed)
    try:
        check_dense(rng, emulated, LAGGING[case], HOPPER)
    finally:
        library.let_warps_lag(0)


@pytest.mark.parametrize("family", [PORTABLE, HOPPER])
def test_scores_below_zero_that_rise(rng, emulated, family):
    """Each block of keys, from the last to the first, has a greater maximum, and all of them are far below 0."""
    q, k, v = rng.qkv(2, 70, 300, 2, 2, 64, dtype=F16)
    q, k = 0.1 * q + 1, 0.1 * k - (2 + 0.02 * jnp.arange(300, dtype=F16)[:, None, None])

    def call(q, k, v):
        return flash_attention(q, k, v, return_lse=True)

    compare(emulated, call, (q, k, v), cotangents_of(rng, q, v), factor=2, family=family)


LENGTHS_OF_KEYS = {"key_value_seq_lengths": np.int32([131, 0])}
# One query: heads that share keys become queries of one head, where they are `together`.
ONE_QUERY = {
    "causal, lengths": (True, {**BOTTOM, **LENGTHS_OF_KEYS}),
    "128, cap": (True, {"H": 128, "D": 64, "logits_soft_cap": 3.0, "local_window_size": (199, 3), **BOTTOM}),
    "bias, mask": (True, {"bias": normal(2, 4, 1, 200, dtype=BF16), "mask": booleans(1, 4, 1, 200), **BOTTOM}),
    "bias, wide mask for all heads": (True, {"S": 208, "bias": normal(1, 1, 1, 208), "mask": booleans(2, 1, 1, 208)}),
    "window": (True, {"local_window_size": (70, 0), "sinks": normal(4)}),
    "more heads than a block has queries": (True, {"N": 140, "K": 1, "sinks": normal(140), **LENGTHS_OF_KEYS}),
    "top": (True, {"local_window_size": (3, 150), "causal_alignment": "top_left"}),
    "alibi": (False, {"alibi_slopes": HEADS}),
    "dropout": (False, DROPOUT),
    "query lengths": (False, {"query_seq_lengths": np.int32([1, 0])}),
    "segments": (False, {"query_segment_ids": segments(2, 2, 1), "key_value_segment_ids": segments(2, 2, 200)}),
    "two queries": (False, {"T": 2}),
}


@pytest.mark.parametrize(
    ("family", "case"),  # on Hopper those that look new to its kernels
    [(family, case) for case, (new, _) in ONE_QUERY.items() for family in ((PORTABLE, HOPPER) if new else (PORTABLE,))],
)
def test_one_query(rng, emulated, runtime, family, case):
    together, options = ONE_QUERY[case]
    shape = {"T": 1, "S": 200, "N": 4, "K": 2, "H": 64} | {n: x for n, x in options.items() if n in set("TSNKHD")}
    options = {name: x(rng) if callable(x) else x for name, x in options.items() if name not in shape and name != "D"}
    num_heads, heads_kv = shape["N"], shape["K"]
    arrays = rng.qkv(2, shape["T"], shape["S"], num_heads, heads_kv, shape["H"], shape.get("D"), dtype=BF16)

    def call(q, k, v):
        return flash_attention(q, k, v, **options, return_lse=True)

    with emulated(90, family):
        out, lse = jax.block_until_ready(call(*arrays))
    if family == PORTABLE:
        assert runtime.emulated_blocks() == 2 * (heads_kv * -(num_heads // heads_kv // -128) if together else num_heads)
    expected = call(*wide(arrays))
    assert_near(out, expected[0], BF16)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-4, atol=1e-3)


# What Hopper's gradient of a bias has to bear beside "bias" and "bias for all" above.
BIAS_ON_HOPPER = {
    "lengths": {"H": 128, "T": 300, "S": 272, "N": 2, "bias": normal(1, 2, 300, 272, dtype=BF16), **LENGTHS},
    "96, 40": {"H": 96, "D": 40, "T": 300, "S": 136, "bias": normal(1, 4, 300, 136, dtype=F16), "dtype": F16, **BOTTOM},
    "32, one query head": {
        "H": 32, "D": 128, "T": 129, "S": 264, "N": 1, "K": 1, "bias": normal(1, 1, 129, 264, dtype=BF16), **TOP
    },
    "dropout": {"S": 264, "bias": normal(2, 1, 150, 264, dtype=BF16), **DROPOUT},
    "rows without keys, cap": {
        "bias": lambda r: r.normal(1, 4, 150, 200, dtype=BF16).at[:, :, 3:70].set(-jnp.inf),
        "logits_soft_cap": 3.0, "factor": 2,
    },
    "everything": {
        "H": 40, "scale": 0.2, "logits_soft_cap": 4.0, "alibi_slopes": 0.1 * HEADS,
        "bias": normal(1, 1, 150, 208, dtype=BF16), "mask": booleans(1, 4, 150, 208), "S": 208, **LENGTHS, **DROPOUT,
        "query_segment_ids": segments(1, 2, 150), "key_value_segment_ids": segments(1, 2, 208),
        "local_window_size": (120, 10), "factor": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", BIAS_ON_HOPPER)
def test_bias_gradient_on_hopper(rng, emulated, case):
    check_dense(rng, emulated, BIAS_ON_HOPPER[case], HOPPER)


@pytest.mark.parametrize("full", list(itertools.product([False, True], repeat=4)), ids=str)
def test_bias_gradient(rng, emulated, full):
    """Of a bias that broadcasts any of [B, N, T, S]. Rows that see no key have no part in it, whatever they hold."""
    sizes = (2, 2, 150, 130)
    q, k, v = rng.qkv(2, 150, 130, 2, 1, dtype=BF16, dim=64)
    bias = rng.normal(*(size if x else 1 for size, x in zip(sizes, full, strict=True)))
    d_out, d_lse = cotangents_of(rng, q, v)
    d_out, q = d_out.at[:, :20].set(jnp.nan), q.at[:, :20].set(jnp.inf)

    def call(q, k, v, bias):
        return flash_attention(q, k, v, bias=bias, is_causal=True, return_lse=True)

    # In the sum over all keys nothing is left but d_lse: what errors are relative to.
    compare(emulated, call, (q, k, v, bias), (d_out, d_lse), factor=1 if full[3] else 3)


def test_bias_shared_by_an_outer_batch_axis(rng, emulated):
    q, k, v = rng.qkv((3, 2), 70, 90, 2, 1, dtype=BF16, dim=64)
    arrays = q, k, v, rng.normal(1, 2, 2, 70, 90, dtype=BF16)
    compare(emulated, lambda *x: flash_attention(*x[:3], bias=x[3], return_lse=True), arrays, cotangents_of(rng, q, v))


def test_vmap(rng, emulated):
    """Batch axes that no kernel can take as one, and operands that all share."""
    q, k, v = rng.qkv((3, 2), 70, 90, dtype=BF16, dim=64)
    bias = rng.normal(3, 1, 1, 70, 1)

    def call(q, k, v, bias):
        attend = functools.partial(flash_attention, is_causal=True, return_lse=True)
        return jax.vmap(lambda q, k, v, b: attend(q, k, v, bias=b), in_axes=(0, None, 0, 0))(q, k, v, bias)

    compare(emulated, call, (q, k[0], v, bias), cotangents_of(rng, q, v))


def test_vmap_with_shared_keys_on_hopper(rng, emulated):
    """Its tensor maps have one batch axis, here one of size 1 for what all share."""
    q, k, v = rng.qkv(3, 70, 150, dtype=BF16, dim=128)

    def call(q, k, v):
        attend = functools.partial(flash_attention, is_causal=True, return_lse=True)
        return jax.vmap(attend, in_axes=(0, None, 0))(q, k, v)

    compare(emulated, call, (q, k[0], v), cotangents_of(rng, q, v), family=HOPPER)


@pytest.mark.parametrize("dim, dim_v", [(64, 96), (256, 256)])
def test_softmax(rng, emulated, dim, dim_v):
    """The probabilities, whose sign is the dropout bit."""
    q, k, v = rng.qkv(2, 70, 133, 4, 2, dim, dim_v, dtype=BF16)
    options = {"is_causal": True, "p_dropout": 0.3, "dropout_key": np.uint32([3, 4]), "return_softmax": True}
    with emulated():
        actual = np.asarray(flash_api.mha_fwd(q, k, v, **options).S_dmask)
    expected = np.asarray(flash_api.mha_fwd(*wide((q, k, v)), **options).S_dmask)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    assert_equal(np.signbit(actual[expected != 0]), np.signbit(expected[expected != 0]))


# ---- Packed and paged ----

PACKED = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (40, 10), "alibi_slopes": HEADS},
    "dropout": {**DROPOUT, "seqused_kv": np.int32([20, 60, 0, 33, 90])},
    "deterministic": {"deterministic": True, "is_causal": True},
}


def packed(rng, offsets_q, offsets_kv, dim, longest, heads=4, **options):
    arrays = [rng.normal(200, n, dim, dtype=BF16) for n in (heads, 2, 2)]
    call = functools.partial(
        flash_attention_varlen, cu_seqlens_q=ints(*offsets_q), cu_seqlens_kv=ints(*offsets_kv), max_seqlen_q=longest,
        max_seqlen_kv=longest, return_lse=True, **options,
    )  # fmt: skip
    return call, arrays, cotangents_of(rng, arrays[0], arrays[2])


FAMILIES = pytest.mark.parametrize("family", [PORTABLE, HOPPER], ids=["portable", "hopper"])


@pytest.mark.parametrize(
    "option, dim, family",
    [(option, *kernels) for kernels in ((64, PORTABLE), (128, HOPPER)) for option in PACKED]
    # Blocks of 128 queries backwards, and pairs of thread blocks.
    + [("deterministic", 64, HOPPER), ("causal", 192, HOPPER)],
)
def test_packed(rng, emulated, option, dim, family):
    """Sequences without queries, without keys, and rows in front of the first and behind the last."""
    offsets = (
        (3, 30, 100, 100, 133, 190),
        (0, 20, 90, 95, 130, 130) if option != "dropout" else (0, 20, 90, 95, 130, 190),
    )
    compare(emulated, *packed(rng, *offsets, dim, 100, **PACKED[option]), family=family)


@pytest.mark.parametrize("dim, family", [(64, PORTABLE), (128, HOPPER), (192, HOPPER)])
def test_sequences_longer_than_stated(rng, emulated, dim, family):
    """A unit of work has several blocks then: with an even and an odd number of steps, and with none."""
    for offsets_q, heads, options in (
        ((0, 10, 200), 4, PACKED["causal"]),
        ((0, 10, 200), 2, PACKED["causal"]),
        ((0, 10, 40), 2, {**PACKED["causal"], **TOP}),
    ):
        compare(emulated, *packed(rng, offsets_q, (0, 10, 200), dim, 64, heads, **options), family=family)


@pytest.mark.parametrize("option, dim", [("causal", 64), ("full", 128)])
def test_packed_in_large_blocks(rng, emulated, option, dim):
    offsets = (3, 30, 30, 180, 182, 190), (0, 20, 90, 95, 130, 130)
    compare(emulated, *packed(rng, *offsets, dim, 160, **PACKED[option]), family=HOPPER, large_blocks=True)


@pytest.mark.parametrize(
    "shape",
    [
        (16, 4, 4096, 4096, 4),
        (16, 16, 512, 1024, 64),
        (7, 7, 1000, 3000, 13),
        (32, 1, 8192, 0, 1),
        (0, 0, 100, 100, 3),
        (4, 2, 1, 1, 1),
        (3, 3, 70000, 200000, 1),
    ],
    ids=str,
)
def test_order_of_units(runtime, shape):
    assert runtime.has_sound_order(*shape)


@FAMILIES
def test_no_sequences(rng, emulated, family):
    """All rows lie in none, and of the slopes there is not even one."""
    call, arrays, cotangents = packed(rng, (0,), (0,), 128, 100, alibi_slopes=jnp.ones((0, 4)))
    compare(emulated, call, arrays, cotangents, family=family)


@FAMILIES
@pytest.mark.parametrize(
    "offsets_q, offsets_kv, longest",
    [
        ((-5, 60, 20, 2**31 - 1), (2**31 - 1, 0, 300, 100), 100),
        ((0, 150, 120, 200), (0, 90, 80, 200), 200),
        ((0, 10, 200), (0, 10, 200), 64),
    ],
    ids=["out of range", "decreasing", "longer than stated"],
)
def test_bad_offsets(rng, emulated, offsets_q, offsets_kv, longest, family):
    """Any result, but no access outside of the arrays."""
    dims = {PORTABLE: [64], HOPPER: [128, 192]}[family]  # whose kernels test_packed needs too, but for one
    for options, dim in itertools.product(({}, {"is_causal": True, "deterministic": True}), dims):
        call, arrays, cotangents = packed(rng, offsets_q, offsets_kv, dim, longest, **options)
        with emulated(family=family):
            results_of(call, arrays, cotangents)


@pytest.mark.parametrize("dim, page_size, seqlen_q", [(64, 16, 3), (128, 1, 1), (256, 48, 70), (40, 7, 20)])
def test_paged(rng, emulated, dim, page_size, seqlen_q):
    """What the table says past a length need not be a page, and nothing that it says leads outside of the pages."""
    pages = 2 + 100 // page_size
    table = rng.integers(0, pages - 1, 2, pages)
    lengths = ints(100, 33)
    beyond = jnp.arange(pages) * page_size >= lengths[:, None]
    q = rng.normal(2, seqlen_q, 4, dim, dtype=BF16)
    k, v = (rng.normal(pages, page_size, 2, dim, dtype=BF16) for _ in range(2))

    def attend(q, k, v, garbage):
        return paged_attention(q, k, v, jnp.where(beyond, garbage, table), lengths, return_lse=True)

    with emulated():
        results = jax.block_until_ready([attend(q, k, v, garbage) for garbage in (2**31 - 1, -5)])
        for garbage in (2**31 - 1, -5):
            jax.block_until_ready(paged_attention(q, k, v, jnp.full_like(table, garbage), lengths))
    expected = attend(*wide((q, k, v)), 0)
    for out, lse in results:
        np.testing.assert_allclose(lse, expected[1], rtol=1e-4, atol=1e-3)
        assert_near(out, expected[0], BF16)


# ---- The emulator itself ----

# Kernels of 2 blocks of 64 threads, with 256 bytes of shared memory, that turn 64 floats round; what is said of them.
LOAD, WAIT = "ptx::cp_async_4(at, p.source + threadIdx.x, 4);", "ptx::cp_async_commit(); ptx::cp_async_wait<0>();"
STORE = "p.target[threadIdx.x] = reinterpret_cast<float*>(shared)[63 - threadIdx.x];"
BARRIER = "__syncthreads();"
KERNELS = {
    "right": (LOAD + WAIT + BARRIER + STORE, None),
    "nothing waited for": (LOAD + "ptx::cp_async_commit();" + BARRIER + STORE, "NaN"),
    "too little waited for": (LOAD + "ptx::cp_async_commit(); ptx::cp_async_wait<1>();" + BARRIER + STORE, "NaN"),
    "nothing committed": (LOAD + "ptx::cp_async_wait<0>();" + BARRIER + STORE, "never committed"),
    "overwritten": (LOAD + "ptx::st_shared(at, 0);", "a copy is under way"),
    "no barrier": (LOAD + WAIT + STORE, "NaN"),
    "nothing loaded": (STORE, "NaN"),
    "loaded into what others read": (LOAD + WAIT + BARRIER + STORE + LOAD + BARRIER + WAIT, "NaN"),
    "wild read": ("p.target[0] = p.source[1 << 30];", "outside of every buffer"),
    "wild copy": ("ptx::cp_async_4(at, p.source + (1 << 30), 4);" + WAIT, "outside of every buffer"),
    "no shared memory left": ("ptx::st_shared(at + 4, 0);", "shared memory ends before byte 260"),
    "behind shared memory": ("shared[256] = 0;", "writes behind its shared memory"),
    "alignment": ("ptx::cp_async_16(at + 4, p.source, 16);", "are not aligned"),
    "alignment of vectors": (
        "*reinterpret_cast<float4*>(p.target + 1) = *reinterpret_cast<const float4*>(p.source);", "undefined behaviour"
    ),
    "parted lanes": ("if (threadIdx.x != 5) __any_sync(~0u, true);", "waits for lanes that do not come"),
    "lanes at two places": (
        "if (threadIdx.x < 9) __any_sync(~0u, true); else ptx::reduce_max(1);", "at different instructions"
    ),
    "shift": ("p.target[0] = 1 << threadIdx.x;", "undefined behaviour"),
    "spin": ("while (ptx::ld_acquire(&none) != 1) {}", "a turn that never comes"),
}  # fmt: skip


# Kernels of a warpgroup, with a tile of 64 x 64 bfloat16 in shared memory, and two mbarriers behind it. They bring the
# source there and multiply it by its transpose.
INIT = "if (threadIdx.x == 0) ptx::mbarrier_init(barrier, 1);" + BARRIER
FETCH = """if (threadIdx.x == 0) {
  ptx::mbarrier_arrive_expect_tx(barrier, 8192);
  ptx::tma_load(tile, map, barrier, 0, 0, 0, 0);
}"""
ARRIVED, MULTIPLY = "ptx::mbarrier_wait(barrier, 0);", "issue_gemm<DType::kBF16, 64, false>(c, rows, rows);"
FINISH, FENCE = "wait_gemm<0>(c);", "ptx::fence_proxy_async();"
RESULT = """for (int n = 0; n < 8; ++n) for (int e = 0; e < 4; ++e)
  p.target[(threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + e / 2 * 8) * 64 + 8 * n + threadIdx.x % 4 * 2 + e % 2] =
      c.x[0][n][e];"""
OVERWRITE = "ptx::st_shared(tile + 4 * threadIdx.x, 0);"
HOPPER_KERNELS = {
    "right": (INIT + FETCH + ARRIVED + MULTIPLY + FINISH + RESULT, None),
    "copy not waited for": (INIT + FETCH + MULTIPLY + FINISH + RESULT, "a copy is under way"),
    "product not waited for": (INIT + FETCH + ARRIVED + MULTIPLY + RESULT, "never waited for"),
    "accumulator used too early": (INIT + FETCH + ARRIVED + MULTIPLY + RESULT + FINISH, "NaN"),
    "only older products waited for": (INIT + FETCH + ARRIVED + MULTIPLY + "wait_gemm<1>(c);" + RESULT + FINISH, "NaN"),
    "operand overwritten": (INIT + FETCH + ARRIVED + MULTIPLY + OVERWRITE + FENCE + FINISH + RESULT, "wrong"),
    "operand copied over": (INIT + FETCH + ARRIVED + MULTIPLY + FETCH + FINISH + RESULT, "a copy is under way"),
    "no fence": (INIT + FETCH + ARRIVED + OVERWRITE + BARRIER + MULTIPLY + FINISH, "without fence.proxy.async"),
    "fence of another thread": (
        INIT + FETCH + ARRIVED + OVERWRITE + "if (threadIdx.x > 0) " + FENCE + BARRIER + MULTIPLY + FINISH,
        "without fence.proxy.async",
    ),
    "no barrier": (FETCH, "no mbarrier was initialised"),
    "another phase": (INIT + FETCH + "ptx::mbarrier_wait(barrier, 1);" + MULTIPLY + FINISH, "a copy is under way"),
    "bytes that do not come": (INIT + FETCH.replace("8192", "8208") + ARRIVED, "waits at a barrier for ever"),
    "too many arrivals": (INIT + FETCH + "ptx::mbarrier_arrive(barrier);", "once too often"),
    "threads that do not come": ("ptx::barrier_sync(1, 160);", "waits at a barrier for ever"),
    "parted at __syncthreads": ("if (threadIdx.x < 32) ptx::barrier_sync(1, 64); else __syncthreads();", "for ever"),
}  # fmt: skip


@pytest.fixture(scope="session")
def kernels(gpu, tmp_path_factory) -> ctypes.CDLL:
    source = '#include "ptx.h"\nusing namespace flash;\nstruct P { const float* source; float* target; };\n'
    source += "alignas(1024) char shared[1 << 16];\nint none;\n"
    for i, (body, _) in enumerate(KERNELS.values()):
        source += (
            f"void kernel_{i}(P p) {{ const uint32 at = ptx::shared_address(shared) + 4 * threadIdx.x; {body} }}\n"
        )
        source += f'extern "C" const char* run_{i}(P p) {{\n'
        source += f"  return emulator::launch(kernel_{i}, 2, 64, 256, shared, sizeof shared, &p);\n}}\n"
    source += """
#include "kernels/tile/warpgroup_gemm.cuh"
TensorMap map_of(const float* source) {
  emulator::TensorBoxes boxes = {(const char*)source, {64, 64, 1, 1}, {128, 8192, 8192}, 2, {64, 64, 1, 1}, 128};
  TensorMap map;
  memcpy(&map, &boxes, sizeof boxes);
  return map;
}
"""
    for i, (body, _) in enumerate(HOPPER_KERNELS.values()):
        source += f"""
void hopper_{i}(P p) {{
  const TensorMap map = map_of(p.source);
  const uint32 tile = ptx::shared_address(shared), barrier = tile + 8192;
  const RowsOperand<Tile<64, 64>> rows(tile);
  Accumulator<16, 64> c;
  {body}
}}
extern "C" const char* run_hopper_{i}(P p) {{
  return emulator::launch(hopper_{i}, 1, 128, 8192 + 16, shared, sizeof shared, &p);
}}
"""
    folder = tmp_path_factory.mktemp("emulator")
    (folder / "kernels.cc").write_text(source)
    # ptx.h stands for the folder, as in runtime.cc.
    (folder / "kernels" / "ptx").mkdir(parents=True)
    for header in (ROOT / "cpp" / "kernels" / "ptx").iterdir():
        (folder / "kernels" / "ptx" / header.name).write_text("#pragma once\n")
    compile_library(
        folder / "kernels.so", [*KERNEL_FLAGS.split(), f"-I{folder}", *INCLUDES, str(folder / "kernels.cc"), str(gpu)]
    )
    return ctypes.CDLL(str(folder / "kernels.so"))


class Problem(ctypes.Structure):
    _fields_ = (("source", ctypes.c_void_p), ("target", ctypes.c_void_p))


def error_of(run, source: np.ndarray, target: np.ndarray) -> str | None:
    run.argtypes, run.restype = [Problem], ctypes.c_char_p
    error = run(Problem(source.ctypes.data, target.ctypes.data))
    return error.decode() if error else None


@pytest.mark.parametrize("name", KERNELS)
def test_emulator(kernels, name):
    """It runs what is right and finds what is wrong."""
    source, target = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    error = error_of(getattr(kernels, f"run_{list(KERNELS).index(name)}"), source, target)
    expected = KERNELS[name][1]
    if expected is None:
        assert error is None
        assert_equal(target, source[::-1])
    elif expected == "NaN":
        assert error is None and np.isnan(target).any()
    else:
        assert error and expected in error


@pytest.mark.parametrize("name", HOPPER_KERNELS)
def test_emulator_of_hopper(rng, kernels, name):
    source, target = np.asarray(rng.normal(64, 64, dtype=BF16)), np.zeros((64, 64), np.float32)
    error = error_of(getattr(kernels, f"run_hopper_{list(HOPPER_KERNELS).index(name)}"), source, target)
    product, expected = source.astype(np.float32) @ source.astype(np.float32).T, HOPPER_KERNELS[name][1]
    if expected is None:
        assert error is None
        np.testing.assert_allclose(target, product, rtol=1e-4, atol=1e-4)
    elif expected in ("NaN", "wrong"):
        assert error is None
        assert np.isnan(target).any() if expected == "NaN" else np.abs(target - product).max() > 1
    else:
        assert error and expected in error
