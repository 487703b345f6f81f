"""The devices: eight of the CPU for the sharding tests, and a fixture that selects one. Helpers that tests share."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# The CPU is the default also on a machine with a GPU: in tests that select no device, and in processes that they start.
# JAX by itself leaves "cuda" out of this list where there is no GPU.
if any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
    if "JAX_PLATFORMS" not in os.environ:
        os.environ["JAX_PLATFORMS"] = "cpu,cuda"
        jax.config.update("jax_platforms", "cpu,cuda")
elif jax.__version_info__ < (0, 11):  # XLA ends a process over flags that it does not know: these it knows up to there
    # What it compiles here runs once, mostly: three quarters of the time were spent on making it fast.
    flags = "backend_optimization_level=0", "cpu_use_fusion_emitters=false", "cpu_parallel_codegen_split_count=1"
    os.environ.setdefault("XLA_FLAGS", " ".join(f"--xla_{flag}" for flag in flags))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several workers share one GPU
jax.config.update("jax_num_cpu_devices", 8)
# References that run on the GPU: a float32 product is TF32 there unless told otherwise.
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_addoption(parser):
    parser.addoption("--portable", action="store_true", help="on an H100 or H200, test the portable kernels")
    parser.addoption("--repeats", type=int, default=200, help="how often the tests for races compare bits")


def pytest_configure(config):
    if config.getoption("portable", False):
        from jax_flash import _core

        _core.override_config({"family": 0})


@pytest.fixture
def portable_kernels(request):
    """For bits that are compared: those of one family of kernels."""
    from jax_flash import _core

    _core.override_config({"family": 0})
    yield
    _core.override_config({"family": 0} if request.config.getoption("portable") else {})


def _find_gpu() -> jax.Device | None:
    try:
        return jax.devices("cuda")[0]
    except RuntimeError:  # unknown backend
        return None


CPU, GPU = jax.devices("cpu")[0], _find_gpu()
NO_GPU = "needs an NVIDIA GPU, and JAX's CUDA plugin"

# Of tests that use the fixture `device`, those that make sense on one of the two only.
CPU_ONLY = pytest.mark.parametrize("device", ["cpu"], indirect=True)
CUDA_ONLY = pytest.mark.parametrize("device", ["cuda"], indirect=True)


@pytest.fixture(params=["cpu"] if GPU is None else ["cpu", "cuda"])
def device(request):
    """Makes the CPU, and where there is one also a GPU, JAX's default device: each test runs on both.

    A file selects it for all of its tests: ``pytestmark = pytest.mark.usefixtures("device")``.
    """
    selected = {"cpu": CPU, "cuda": GPU}[request.param]
    if selected is None:
        pytest.skip(NO_GPU)
    with jax.default_device(selected):
        yield selected


def on_gpu() -> bool:
    """Whether the test at hand runs on the GPU."""
    return GPU is not None and jax.config.jax_default_device == GPU


def kernel_dtype(dtype: Any) -> Any:
    """``dtype``, or float16 in place of float32 where the device's kernels do not take that."""
    return jnp.float16 if on_gpu() and dtype == jnp.float32 else dtype


def run_on_cpu(function, *args):
    """``function(*args)`` on the CPU whatever the device under test: for references, which compile faster there."""
    with jax.default_device(CPU):
        return function(*jax.device_put(args, CPU))


@dataclasses.dataclass
class Rng:
    """Fresh random arrays, reproducible by the test's name; ``dtype`` is what the device's kernels take best."""

    generator: np.random.Generator
    dtype: Any = jnp.float32

    def normal(self, *shape: int, dtype=jnp.float32) -> jax.Array:
        return jnp.asarray(self.generator.standard_normal(shape), dtype)

    def activations(self, *shape: int) -> jax.Array:
        """Standard normal, of a dtype that query, key and value may have on the device."""
        return self.normal(*shape, dtype=self.dtype)

    def bernoulli(self, *shape: int, p: float = 0.5) -> jax.Array:
        return jnp.asarray(self.generator.random(shape) < p)

    def integers(self, low: int, high: int, *shape: int) -> jax.Array:
        """int32 in [low, high]."""
        return jnp.asarray(self.generator.integers(low, high + 1, shape), jnp.int32)

    def qkv(self, batch=2, seqlen_q=24, seqlen_kv=24, heads=4, heads_kv=2, dim=16, dim_v=None, dtype=None):
        """query [B, T, N, H], key [B, S, K, H], value [B, S, K, D]; no batch axis with batch=()."""
        lead = (batch,) if isinstance(batch, int) else batch
        dtype = dtype or self.dtype
        return (
            self.normal(*lead, seqlen_q, heads, dim, dtype=dtype),
            self.normal(*lead, seqlen_kv, heads_kv, dim, dtype=dtype),
            self.normal(*lead, seqlen_kv, heads_kv, dim_v or dim, dtype=dtype),
        )


@pytest.fixture
def rng(request) -> Rng:
    if "device" in request.fixturenames:
        request.getfixturevalue("device")  # selected before the arrays are made
    name = request.node.name.replace("cuda", "cpu")  # the same numbers on each device
    return Rng(np.random.default_rng(list(name.encode())), kernel_dtype(jnp.float32))


def assert_accurate(actual, reference, low, factor: float = 2.0) -> None:
    """The accuracy contract: at most ``factor`` times the error of plain arithmetic in the input dtype.

    Args:
      actual: the array under test.
      reference: the same in float32 or float64.
      low: the same mathematics in plain jnp in the input dtype.
      factor: 2, or 3 with a soft cap.
    """
    assert actual.shape == reference.shape
    dtype = actual.dtype
    actual, reference, low = (np.asarray(x, np.float64) for x in (actual, reference, low))
    finite = np.isfinite(reference)
    np.testing.assert_array_equal(actual[~finite], reference[~finite])
    if not finite.any():
        return
    rounded = np.asarray(
        jnp.asarray(reference[finite], dtype) + jnp.asarray(0.3, dtype) - jnp.asarray(0.3, dtype), np.float64
    )
    atol = 2 * np.abs(rounded - reference[finite]).max()
    bound = factor * np.abs(low[finite] - reference[finite]).max() + atol
    error = np.abs(actual[finite] - reference[finite]).max()
    assert error <= bound, f"error {error:.3g} is above the bound {bound:.3g}"


def assert_close(actual, expected, tolerance: float = 2e-5, gpu_tolerance: float = 2e-2) -> None:
    """Trees of arrays equal up to float32 rounding; on the GPU, whose kernels take 16-bit inputs, up to float16's."""
    if on_gpu():
        tolerance = max(tolerance, gpu_tolerance)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(np.asarray(a), np.asarray(e), rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


def assert_equal(actual, expected) -> None:
    """Trees of arrays equal bit by bit."""
    jax.tree.map(lambda a, e: np.testing.assert_array_equal(np.asarray(a), np.asarray(e)), actual, expected)


# ---- kernels in 16 bits against the CPU's implementation in float32 ----


def ints(*values) -> jax.Array:
    return jnp.array(values, jnp.int32)


def with_gradients(call, compiler_options=None):
    """Jitted ``(arrays, cotangents) -> ((out, lse), gradients of all arrays)`` of ``call(*arrays)``."""

    def run(arrays, cotangents):
        results, vjp = jax.vjp(call, *arrays)
        # lse is -inf in rows that see no key: there its cotangent has nothing to act on.
        d_out, d_lse = (c.astype(r.dtype) for c, r in zip(cotangents, results, strict=True))
        return results, vjp((d_out, jnp.where(jnp.isneginf(results[1]), 0, d_lse)))

    return jax.jit(run, compiler_options=compiler_options)


def cotangents_of(rng, q, v):
    """Of out and lse, for query [..., T, N, H] and value [..., S, K, D]."""
    return rng.normal(*q.shape[:-1], v.shape[-1], dtype=q.dtype), rng.normal(*q.shape[:-3], q.shape[-2], q.shape[-3])


def wide(tree):
    """16-bit values as float32, which is what the CPU computes the oracle from."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x, tree)


def assert_near(actual, expected, dtype, factor: float = 1.0) -> None:
    """Twice the error that plain arithmetic in ``dtype`` makes: 0.6 to 0.9 eps of root mean square, 2 eps at most."""
    eps = factor * float(jnp.finfo(dtype).eps)
    for i, (x, e) in enumerate(zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)):
        x, e = np.asarray(x, np.float32), np.asarray(e, np.float32)
        assert x.shape == e.shape
        assert not np.isnan(x).any(), f"array {i} has NaN"
        if x.size:
            error = np.abs(x - e)
            assert error.max() <= 4 * eps * np.abs(e).max() + 1e-6, (
                f"array {i} at {np.argwhere(error == error.max())[0]}"
            )
            assert np.sqrt(np.mean(error**2)) <= 1.5 * eps * np.sqrt(np.mean(e**2)) + 1e-6, f"array {i}"
