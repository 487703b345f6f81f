"""Eight CPU devices for the sharding tests, and the helpers that most tests share."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@dataclasses.dataclass
class Rng:
    """Fresh random arrays, reproducible by the test's name."""

    generator: np.random.Generator

    def normal(self, *shape: int, dtype=jnp.float32) -> jax.Array:
        return jnp.asarray(self.generator.standard_normal(shape), dtype)

    def bernoulli(self, *shape: int, p: float = 0.5) -> jax.Array:
        return jnp.asarray(self.generator.random(shape) < p)

    def integers(self, low: int, high: int, *shape: int) -> jax.Array:
        """int32 in [low, high]."""
        return jnp.asarray(self.generator.integers(low, high + 1, shape), jnp.int32)

    def qkv(self, batch=2, seqlen_q=24, seqlen_kv=24, heads=4, heads_kv=2, dim=16, dim_v=None, dtype=jnp.float32):
        """query [B, T, N, H], key [B, S, K, H], value [B, S, K, D]; no batch axis with batch=()."""
        lead = (batch,) if isinstance(batch, int) else batch
        return (
            self.normal(*lead, seqlen_q, heads, dim, dtype=dtype),
            self.normal(*lead, seqlen_kv, heads_kv, dim, dtype=dtype),
            self.normal(*lead, seqlen_kv, heads_kv, dim_v or dim, dtype=dtype),
        )


@pytest.fixture
def rng(request) -> Rng:
    return Rng(np.random.default_rng(list(request.node.name.encode())))


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


def assert_close(actual, expected, tolerance: float = 2e-5) -> None:
    """Trees of arrays equal up to float32 rounding."""
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(np.asarray(a), np.asarray(e), rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


def assert_equal(actual, expected) -> None:
    """Trees of arrays equal bit by bit."""
    jax.tree.map(lambda a, e: np.testing.assert_array_equal(np.asarray(a), np.asarray(e)), actual, expected)
