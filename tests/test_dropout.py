"""Dropout: the exact bits against Philox in NumPy, the statistics, and the gradients for a known mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CPU_ONLY, CUDA_ONLY, assert_close, assert_equal, run_on_cpu

from jax_flash import _core, _reference, flash_api, flash_attention, flash_attention_varlen

pytestmark = pytest.mark.usefixtures("device")


def philox_4x32_7(counter, key):
    """Salmon et al., 2011, on uint64 arrays that hold 32-bit words."""
    c, k = [np.asarray(x, np.uint64) for x in counter], [np.asarray(x, np.uint64) for x in key]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(7):
        product0, product1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(product1 >> 32) ^ c[1] ^ k[0], product1 & low, (product0 >> 32) ^ c[3] ^ k[1], product0 & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return c


def keep_mask(key, rate, batch, heads, seqlen_q, seqlen_kv):
    """bool [batch, heads, seqlen_q, seqlen_kv], from the rule in the documentation of cpp/common/philox.h."""
    words = np.asarray(jax.random.key_data(key))
    b, n, i, j = np.meshgrid(*(np.arange(s) for s in (batch, heads, seqlen_q, seqlen_kv)), indexing="ij")
    random = np.stack(philox_4x32_7((i // 32 * 8 + i % 8, j // 32 * 8 + j % 8, b, n), words))
    word = np.take_along_axis(random, (i // 8 % 4)[None], 0)[0]
    byte = (word >> (8 * (j // 8 % 4)).astype(np.uint64)) & np.uint64(0xFF)
    return jnp.asarray(byte < threshold(rate))


def threshold(rate):
    return max(1, round(256 * (1 - rate)))


def test_philox_known_answer():
    """Test vector of the authors' Random123 (philox4x32 7: all ones)."""
    ones = 0xFFFFFFFF
    words = [int(w) for w in philox_4x32_7((ones,) * 4, (ones,) * 2)]
    assert words == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]


def check_bits(rng, rate):
    """Forward and backward use exactly the documented mask."""
    q, k, v = rng.qkv(batch=2, seqlen_q=90, seqlen_kv=150)
    key = jax.random.key(3)
    keep = keep_mask(key, rate, 2, 4, 90, 150)
    d_out = rng.activations(*q.shape)

    def reference(keep, d_out, *qkv):
        out, vjp = jax.vjp(
            lambda *qkv: _reference.attention(*qkv, keep=keep, keep_probability=threshold(rate) / 256)[0], *qkv
        )
        return out, vjp(d_out.astype(out.dtype))

    actual, vjp = jax.vjp(lambda *qkv: flash_attention(*qkv, dropout_rate=rate, dropout_key=key), q, k, v)
    expected, gradients = run_on_cpu(reference, keep, d_out, q, k, v)
    assert_close(actual, expected, 1e-4)
    assert_close(vjp(d_out), gradients, 1e-3)


RATES = pytest.mark.parametrize("rate", [0.1, 0.5, 0.999])


@CPU_ONLY
@pytest.mark.parametrize("instruction_set", _core.instruction_sets())
@RATES
def test_bits(rng, instruction_set, rate):
    _core.use_instruction_set(instruction_set)
    try:
        check_bits(rng, rate)
    finally:
        _core.use_instruction_set(_core.instruction_sets()[0])


@CUDA_ONLY
@RATES
def test_bits_on_the_gpu(rng, rate):
    check_bits(rng, rate)


def test_varlen_mask_is_that_of_a_padded_batch(rng):
    key = jax.random.key(9)
    q, k, v = rng.qkv(batch=3, seqlen_q=40, seqlen_kv=50)
    offsets_q, offsets_kv = jnp.arange(4, dtype=jnp.int32) * 40, jnp.arange(4, dtype=jnp.int32) * 50
    packed = flash_attention_varlen(
        *(x.reshape(-1, *x.shape[2:]) for x in (q, k, v)),
        offsets_q,
        offsets_kv,
        max_seqlen_q=40,
        max_seqlen_kv=50,
        dropout_rate=0.4,
        dropout_key=key,
    )
    assert_equal(packed.reshape(q.shape), flash_attention(q, k, v, dropout_rate=0.4, dropout_key=key))


@pytest.mark.parametrize("rate", [0.05, 0.17, 0.5, 0.9])
def test_statistics(rng, rate):
    """The kept fraction over all, and over each head, row and column, within five standard deviations."""
    q, k, v = rng.qkv(batch=2, seqlen_q=256, seqlen_kv=256, heads=4)
    result = flash_api.mha_fwd(q, k, v, p_dropout=rate, return_softmax=True, dropout_key=jax.random.key(0))
    kept = np.asarray(result.S_dmask) > 0
    p = threshold(rate) / 256
    assert abs(p - (1 - rate)) <= 1 / 512
    for axes in [None, (2, 3), (0, 1, 2), (0, 1, 3)]:
        mean = kept.mean(axis=axes)
        count = kept.size / np.size(mean)
        assert np.all(np.abs(mean - p) < 5 * np.sqrt(p * (1 - p) / count))
    # Heads, batches and neighbouring elements are independent of each other.
    x = kept - p
    for other in (
        np.roll(x, 1, 0),
        np.roll(x, 1, 1),
        np.roll(x, 1, 2),
        np.roll(x, 1, 3),
        np.roll(x, 8, 2),
        np.roll(x, 32, 3),
    ):
        assert abs((x * other).mean()) < 5 * p * (1 - p) / np.sqrt(x.size)


def test_expectation_is_kept(rng):
    """The mean over many keys approaches the result without dropout: kept values are scaled by the effective rate."""
    q, k, v = rng.qkv(batch=1, seqlen_q=8, seqlen_kv=32)
    keys = jax.random.split(jax.random.key(1), 4000)
    outs = jax.vmap(lambda key: flash_attention(q, k, v, dropout_rate=0.3, dropout_key=key).astype(jnp.float32))(keys)
    deviation = np.asarray(outs.std(0) / np.sqrt(len(keys)))
    assert np.all(np.abs(np.asarray(outs.mean(0) - flash_attention(q, k, v))) < 6 * deviation + 1e-6)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_key_forms(rng, implementation):
    """Typed keys of any implementation and raw keys; equal keys give equal masks, others differ."""
    q, k, v = rng.qkv()

    def out(key):
        return flash_attention(q, k, v, dropout_rate=0.5, dropout_key=key)

    one, other = jax.random.key(1, impl=implementation), jax.random.key(2, impl=implementation)
    assert_equal(out(one), out(one))
    assert_equal(out(one), out(jax.random.key_data(one)))
    assert not np.array_equal(out(one), out(other))
    assert not np.array_equal(out(one), out(jax.random.fold_in(one, 1)))


def test_broadcast_dropout(rng):
    """One mask for all batch entries and heads."""
    q, k, v = rng.qkv(batch=1, heads=1, heads_kv=1)
    q, k, v = (jnp.broadcast_to(x, (3, 24, 4, 16)) for x in (q, k, v))
    out = flash_attention(q, k, v, dropout_rate=0.5, dropout_key=jax.random.key(0), broadcast_dropout=True)
    assert_equal(out, jnp.broadcast_to(out[:1, :, :1], out.shape))
    own = flash_attention(q, k, v, dropout_rate=0.5, dropout_key=jax.random.key(0))
    assert not np.array_equal(own[0, :, 0], own[0, :, 1]) and not np.array_equal(own[0, :, 0], own[1, :, 0])


def test_rate_that_rounds_to_nothing(rng):
    """Below 1/512 no byte is ever dropped: the result is that without dropout."""
    q, k, v = rng.qkv()
    assert_equal(flash_attention(q, k, v, dropout_rate=0.001, dropout_key=jax.random.key(0)), flash_attention(q, k, v))
