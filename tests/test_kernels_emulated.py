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
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_equal

from jax_flash import _ffi, flash_api, flash_attention, flash_attention_varlen, paged_attention

ROOT = Path(__file__).resolve().parents[1]
EMULATOR = ROOT / "tests" / "emulator"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or "no C++ compiler"
# Each library keeps its symbols to itself.
FLAGS = "-std=c++20 -w -fPIC -shared -fno-gnu-unique -Wl,-Bsymbolic"
# -O1: most kernels run for less time than more would take to compile. Fortified longjmp would not leave a fiber.
KERNEL_FLAGS = (
    f"{FLAGS} -O1 -fno-strict-aliasing -U_FORTIFY_SOURCE "
    "-fsanitize=undefined -fsanitize-undefined-trap-on-error -ftrivial-auto-var-init=pattern"
)
HOST_FILES = [f"cuda/{n}.cc" for n in "batch_axes disk_cache heuristics jit launch_bwd launch_fwd".split()] + ["ffi/decode.cc"]
# Shared memory, as cpp/cuda/driver.cc knows it: of the largest and of the smallest GPUs.
ARCHS = {90: 232448, 86: 101376}
BF16, F16 = jnp.bfloat16, jnp.float16


def version_of_compiler() -> str:
    try:
        return subprocess.run([*COMPILER.split(), "--version"], capture_output=True, text=True, check=True).stdout
    except OSError:
        return ""


if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
    pytest.skip("the emulated GPU needs Linux on x86-64 or aarch64", allow_module_level=True)
if "Free Software Foundation" not in version_of_compiler():
    pytest.skip("the emulated GPU needs g++ (or $CXX, a GCC)", allow_module_level=True)


# ---- The emulated GPU ----


def compile_library(target: Path, flags: list[str]) -> None:
    """Under another name first: several workers may do the same."""
    temporary = target.with_suffix(f".{os.getpid()}")
    done = subprocess.run([*COMPILER.split(), *flags, "-o", str(temporary)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    temporary.replace(target)


@pytest.fixture(scope="session")
def runtime(request) -> ctypes.CDLL:
    """The library with the emulated GPU's run time, registered with XLA. It and all kernels stay in pytest's cache."""
    sources = [p for folder in (ROOT / "cpp", EMULATOR) for p in sorted(folder.rglob("*")) if p.is_file()]
    key = hashlib.sha256("\0".join([KERNEL_FLAGS, version_of_compiler(), jax.__version__]).encode())
    for path in sources:
        key.update(path.read_bytes())
    version = key.hexdigest()[:16]
    folder = request.config.cache.mkdir("jax_flash_emulator") / version
    folder.mkdir(exist_ok=True)
    library = folder / "emulator.so"
    if not library.exists():
        with contextlib.suppress(FileExistsError):
            (folder / "cuda").symlink_to(ROOT / "cpp")  # where the library looks for the kernels' sources
        kernel_compiler = f"{COMPILER} {KERNEL_FLAGS} -I{EMULATOR}"
        defines = [f'-DEMULATOR_VERSION="{version}"', f'-DEMULATOR_COMPILER="{kernel_compiler}"']
        files = [str(EMULATOR / "runtime.cc"), *(str(ROOT / "cpp" / name) for name in HOST_FILES)]
        compile_library(library, [*FLAGS.split(), *defines, f"-I{ROOT / 'cpp'}", "-isystem", jax.ffi.include_dir(), *files, "-ldl"])
    loaded = ctypes.CDLL(str(library))
    loaded.emulate.argtypes = [ctypes.c_int, ctypes.c_longlong]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_FLASH_CACHE_DIR", str(folder / "kernels"))
        loaded.emulate(90, ARCHS[90])
    for name in ("emulated_fwd", "emulated_bwd"):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    return loaded


@pytest.fixture
def emulated(runtime, monkeypatch):
    """``emulated(sm=90)``: a context in which attention that is traced, and run, goes to the emulated GPU."""

    @contextlib.contextmanager
    def context(sm: int = 90):
        runtime.emulate(sm, ARCHS[sm])
        with monkeypatch.context() as patch:
            patch.setattr(_ffi, "FORWARD_TARGET", "emulated_fwd")
            patch.setattr(_ffi, "BACKWARD_TARGET", "emulated_bwd")
            yield

    return context


# ---- Comparison ----


def ints(*values) -> jax.Array:
    return jnp.array(values, jnp.int32)


def with_gradients(call, arrays, cotangents):
    """(out, lse) and the gradients of all arrays."""

    def run(arrays, cotangents):
        results, vjp = jax.vjp(call, *arrays)
        d_out, d_lse = (c.astype(r.dtype) for c, r in zip(cotangents, results, strict=True))
        return results, vjp((d_out, jnp.where(jnp.isneginf(results[1]), 0, d_lse)))

    return jax.block_until_ready(jax.jit(run)(arrays, cotangents))


def cotangents_of(rng, q, v):
    """Of out and lse, for query [..., T, N, H] and value [..., S, K, D]."""
    return rng.normal(*q.shape[:-1], v.shape[-1], dtype=q.dtype), rng.normal(*q.shape[:-3], q.shape[-2], q.shape[-3])


def wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype in (BF16, F16) else x, tree)


def assert_near(actual, expected, dtype, factor: float = 1.0) -> None:
    """Twice the error that plain arithmetic in ``dtype`` makes: 0.6 to 0.9 eps of root mean square, 2 eps at most."""
    eps = factor * float(jnp.finfo(dtype).eps)
    for i, (x, e) in enumerate(zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)):
        x, e = np.asarray(x, np.float32), np.asarray(e, np.float32)
        assert x.shape == e.shape
        if x.size:
            error = np.abs(x - e)
            assert error.max() <= 4 * eps * np.abs(e).max() + 1e-6, f"array {i} at {np.argwhere(error == error.max())[0]}"
            assert np.sqrt(np.mean(error**2)) <= 1.5 * eps * np.sqrt(np.mean(e**2)) + 1e-6, f"array {i}"


def compare(emulated, call, arrays, cotangents, sm=90, factor: float = 1.0):
    with emulated(sm):
        actual = with_gradients(call, arrays, cotangents)
    expected = with_gradients(call, wide(arrays), wide(cotangents))
    np.testing.assert_allclose(actual[0][1], expected[0][1], rtol=1e-4, atol=1e-3)
    assert_near((actual[0][0], actual[1]), (expected[0][0], expected[1]), arrays[0].dtype, factor)
    return actual


# ---- Dense ----

DROPOUT = {"dropout_rate": 0.3, "dropout_key": np.uint32([7, 8])}
# Name -> seqlen_q, seqlen_kv, head_dim, head_dim_v, then functions of the random generator that give options.
CASES = {
    "full": (150, 200, 64, 64, {}),
    "causal": (150, 200, 64, 64, {"is_causal": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_dense(rng, emulated, case):
    seqlen_q, seqlen_kv, dim, dim_v, options = CASES[case]
    arrays = rng.qkv(2, seqlen_q, seqlen_kv, 4, 2, dim, dim_v, dtype=BF16)
    call = functools.partial(flash_attention, return_lse=True, **options)
    compare(emulated, call, arrays, cotangents_of(rng, arrays[0], arrays[2]))
