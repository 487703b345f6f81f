"""FlashAttention's four functions: views on flash_attention, so they are compared with it and with the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, assert_equal, run_on_cpu

from jax_flash import _reference, flash_api, flash_attention, flash_attention_varlen, paged_attention

pytestmark = pytest.mark.usefixtures("device")

OPTIONS = {
    "plain": ({}, {}),
    "causal": ({"is_causal": True}, {"is_causal": True}),
    "window": ({"window_size_left": 5, "window_size_right": 2}, {"local_window_size": (5, 2)}),
    "softcap": ({"softcap": 3.0}, {"logits_soft_cap": 3.0}),
    "scale": ({"softmax_scale": 0.5}, {"scale": 0.5}),
    "alibi": ({"alibi_slopes": np.float32([0.1, 0.2, 0.3, 0.4])},) * 2,
    "dropout": ({"p_dropout": 0.3}, {"dropout_rate": 0.3, "dropout_key": jax.random.PRNGKey(5)}),
}


def offsets(*lengths):
    return jnp.cumsum(jnp.array([0, *lengths], jnp.int32), dtype=jnp.int32)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "varlen"])
def test_forward_and_backward(rng, option, packed):
    """Both directions agree with the differentiable functions, given the state that the forward returned."""
    ours, theirs = OPTIONS[option]
    q, k, v = rng.qkv(batch=() if packed else 2, seqlen_q=60, seqlen_kv=70)
    if packed:
        where = (offsets(20, 0, 33), offsets(30, 5, 35))
        lengths = {"max_seqlen_q": 33, "max_seqlen_kv": 35}

        def reference(q, k, v):
            return flash_attention_varlen(q, k, v, *where, **lengths, **theirs, deterministic=True, return_lse=True)

        forward, backward = flash_api.mha_varlen_fwd, flash_api.mha_varlen_bwd
        ours = ours | {"max_seqlen_q": 33, "max_seqlen_k": 35}
    else:
        where = ()

        def reference(q, k, v):
            return flash_attention(q, k, v, **theirs, deterministic=True, return_lse=True)

        forward, backward = flash_api.mha_fwd, flash_api.mha_bwd

    key = {"dropout_key": jax.random.PRNGKey(5)} if option == "dropout" else {}
    result = forward(q, k, v, *where, **ours, **key)
    (out, lse), vjp = jax.vjp(reference, q, k, v)
    assert_equal((result.out, result.softmax_lse), (out, lse))
    assert result.S_dmask.shape == (0,)

    state = {"philox_seed": result.philox_seed, "philox_offset": result.philox_offset} if key else {}
    if key:  # the state of an earlier forward gives the same mask again
        assert_equal(forward(q, k, v, *where, **ours, **state).out, out)
    d_out = rng.activations(*out.shape)
    gradients = backward(d_out, q, k, v, out, lse, *where, **ours, **state, deterministic=True)
    assert_equal(gradients[:3], vjp((d_out, jnp.zeros_like(lse))))
    used = jnp.isfinite(lse)
    products = d_out.astype(jnp.float32) * out.astype(jnp.float32)
    delta = jnp.where(used, jnp.swapaxes(products.sum(-1), -1, -2), 0)
    assert_close(gradients.softmax_d, delta)


def test_philox_offset_changes_the_mask(rng):
    q, k, v = rng.qkv()
    seed = jnp.array([1, 2], jnp.uint32)

    def out(offset):
        state = {"philox_seed": seed, "philox_offset": jnp.uint32(offset)}
        return flash_api.mha_fwd(q, k, v, p_dropout=0.5, **state).out

    assert_equal(out(0), flash_attention(q, k, v, dropout_rate=0.5, dropout_key=seed))
    assert not np.array_equal(out(0), out(7))


def probabilities_of(q, k, v, **options):
    return np.asarray(run_on_cpu(lambda *qkv: _reference.attention(*qkv, **options)[2], q, k, v))


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_return_softmax(rng, rate):
    """Probabilities before rescaling, negative where dropped, 0 where masked."""
    q, k, v = rng.qkv(seqlen_q=70, seqlen_kv=90)
    key = {"dropout_key": jax.random.key(0)} if rate else {}
    result = flash_api.mha_fwd(q, k, v, p_dropout=rate, is_causal=True, return_softmax=True, **key)
    probabilities = probabilities_of(q, k, v, window=(-1, 0))
    assert result.S_dmask.shape == (2, 4, 70, 90)
    assert_close(jnp.abs(result.S_dmask), probabilities)
    assert bool((result.S_dmask < 0).any()) == (rate > 0)
    threshold = round(256 * (1 - rate))
    kept = jnp.maximum(result.S_dmask, 0) * 256 / threshold
    assert_close(result.out, jnp.einsum("bnts,bsnd->btnd", kept, jnp.repeat(v, 2, axis=2)))


def test_return_softmax_varlen(rng):
    q, k, v = rng.qkv(batch=(), seqlen_q=50, seqlen_kv=60)
    at_q, at_k = offsets(20, 0, 28), offsets(25, 5, 30)
    result = flash_api.mha_varlen_fwd(q, k, v, at_q, at_k, max_seqlen_q=28, max_seqlen_k=32, return_softmax=True)
    assert result.S_dmask.shape == (3, 4, 28, 32)
    for b, (tq, tk) in enumerate([(20, 25), (0, 5), (28, 30)]):
        one = (q[at_q[b] :][:tq], k[at_k[b] :][:tk], v[at_k[b] :][:tk])
        expected = probabilities_of(*(x[None] for x in one))[0] if tq else jnp.zeros((4, 0, tk))
        assert_close(result.S_dmask[b], jnp.zeros((4, 28, 32)).at[:, :tq, :tk].set(expected))


@pytest.mark.parametrize("lengths", ["seqused_k", "cu_seqlens_k"])
def test_block_table(rng, lengths):
    q = rng.activations(7, 4, 16)
    pages = rng.activations(2, 6, 8, 2, 16)
    table = jnp.array([[4, 1, 0], [2, 5, 3]], jnp.int32)
    used = jnp.array([20, 9], jnp.int32)
    given = {"seqused_k": used} if lengths == "seqused_k" else {"cu_seqlens_k": offsets(20, 9)}
    result = flash_api.mha_varlen_fwd(
        q, *pages, offsets(3, 4), **given, block_table=table, max_seqlen_q=4, max_seqlen_k=24, is_causal=True
    )
    expected = paged_attention(q, *pages, table, used, cu_seqlens_q=offsets(3, 4), max_seqlen_q=4, return_lse=True)
    assert_equal(result[:2], expected)


def test_zero_tensors_has_no_effect(rng):
    """Rows outside of all sequences are defined either way."""
    q, k, v = rng.qkv(batch=(), seqlen_q=30, seqlen_kv=30)
    outs = [
        flash_api.mha_varlen_fwd(q, k, v, *(offsets(10, 12),) * 2, max_seqlen_q=12, max_seqlen_k=12, zero_tensors=zero)
        for zero in (False, True)
    ]
    assert_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0].out[22:], 0)
    np.testing.assert_array_equal(outs[0].softmax_lse[:, 22:], -np.inf)


def test_forward_is_differentiable(rng):
    q, k, v = rng.qkv()
    ours = jax.grad(lambda q: flash_api.mha_fwd(q, k, v, return_softmax=True).out.sum())(q)
    assert_close(ours, jax.grad(lambda q: flash_attention(q, k, v).sum())(q))


def test_backward_of_seqused_k(rng):
    """The packed backward takes the lengths that the forward took."""
    q, k, v = rng.qkv(batch=(), seqlen_q=30, seqlen_kv=30)
    where, longest = (offsets(10, 20),) * 2, {"max_seqlen_q": 20, "max_seqlen_k": 20}
    used = {"seqused_k": jnp.array([7, 13], jnp.int32)}

    def forward(q, k, v):
        return flash_api.mha_varlen_fwd(q, k, v, *where, **longest, **used)

    result, vjp = jax.vjp(lambda *a: forward(*a)[:2], q, k, v)
    d_out = rng.activations(*q.shape)
    gradients = flash_api.mha_varlen_bwd(d_out, q, k, v, *result, *where, **longest, **used)
    assert_close(gradients[:3], vjp((d_out, jnp.zeros_like(result[1]))))
