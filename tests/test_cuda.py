"""What the GPU's kernels alone can get wrong: tiles at every length, races, dirty memory, graphs, foreign processes.

The files about single features run on the GPU too (the fixture ``device``), among them every operand under vmap, empty
axes and other bad input. Here the oracle is the CPU's implementation, which is tested against plain jnp: it makes long
sequences affordable, and has the same dropout bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import itertools
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    CPU,
    CUDA_ONLY,
    GPU,
    NO_GPU,
    assert_equal,
    assert_near,
    cotangents_of,
    ints,
    run_on_cpu,
    wide,
    with_gradients,
)

from jax_flash import _core, flash_api, flash_attention, flash_attention_varlen, paged_attention

if GPU is None:
    pytest.skip(NO_GPU, allow_module_level=True)
pytestmark = [pytest.mark.usefixtures("device"), CUDA_ONLY]

BF16, F16 = jnp.bfloat16, jnp.float16
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
DTYPES = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
HEAD_DIMS = pytest.mark.parametrize("dim", [64, 128, 256, 111])


def compare_with_cpu(call, arrays, cotangents, factor: float = 1.0):
    actual = with_gradients(call)(arrays, cotangents)
    expected = run_on_cpu(with_gradients(call), wide(arrays), wide(cotangents))
    np.testing.assert_allclose(actual[0][1], expected[0][1], rtol=1e-4, atol=1e-3)
    assert_near((actual[0][0], actual[1]), (expected[0][0], expected[1]), arrays[0].dtype, factor)
    return actual


# ---- FlashAttention's grid ----

PAIRS = (
    "1,1 64,128 128,192 256,256 239,1 1,239 799,3 113,203 113,128 128,217 113,211 108,256 256,512 384,256 640,128 "
    "512,256 1024,1024 1023,1024 1024,1023 4096,4096 4224,4224"
)
PAIRS = [tuple(map(int, pair.split(","))) for pair in PAIRS.split()]
MASKS = ["full", "causal", "window"]


@pytest.mark.parametrize("mask", MASKS)
@HEAD_DIMS
@pytest.mark.parametrize("lengths", PAIRS, ids=str)
def test_pairs_of_lengths(rng, lengths, dim, mask):
    """Own, shared and single key heads; each (length, head dim) in both dtypes."""
    seqlen_q, seqlen_kv = lengths
    long = seqlen_kv > 2048
    options = {"is_causal": mask == "causal"}
    if mask == "window":
        options["local_window_size"] = tuple(rng.generator.integers(0, seqlen_kv, 2).tolist())
    start = PAIRS.index(lengths) + MASKS.index(mask)
    for i, heads_kv in enumerate([(6, 2, 1)[start % 3]] if long else [6, 2, 1]):
        dtype = (BF16, F16)[(start + i) % 2]
        arrays = rng.qkv(1 if long else 2, seqlen_q, seqlen_kv, 6, heads_kv, dim, dtype=dtype)
        call = functools.partial(flash_attention, return_lse=True, **options)
        compare_with_cpu(call, arrays, cotangents_of(rng, arrays[0], arrays[2]))


VARLEN = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (70, 20)},
    "alibi": {"is_causal": True, "alibi_slopes": np.float32([0.5, 0.25, 0.1, 0.05])},
    "dropout": {"dropout_rate": 0.17, "dropout_key": np.uint32([7, 8])},
}


@dataclasses.dataclass
class Packed:
    """Sequences in arrays of fixed size, so that all lengths share one compiled program."""

    dtype: object
    dim: int
    heads_kv: int
    options: dict
    num_sequences: int = 9
    longest: int = 400
    total: int = 2048

    def call(self, q, k, v, offsets_q, offsets_kv, used):
        return flash_attention_varlen(
            q, k, v, offsets_q, offsets_kv, max_seqlen_q=self.longest, max_seqlen_kv=self.longest, seqused_kv=used,
            return_lse=True, **self.options,
        )  # fmt: skip

    def arrays(self, rng):
        return rng.qkv((), self.total, self.total, 4, self.heads_kv, self.dim, dtype=self.dtype)

    def lengths(self, rng):
        """Offsets and used lengths; a third of the sequences is empty or short, rows before and behind are unused."""
        sizes = rng.generator.integers(0, self.longest + 1, (2, self.num_sequences))
        sizes[:, ::3] = rng.generator.integers(0, 3, sizes[:, ::3].shape)
        sizes[0, 1] = sizes[1, 2] = 0
        sizes = np.where(sizes.sum(1, keepdims=True) > self.total - 20, sizes // 2, sizes)
        offsets = (np.cumsum([rng.generator.integers(0, 20), *row]) for row in sizes)
        return *(ints(*x) for x in offsets), ints(*rng.generator.integers(0, sizes[1] + 1))


def check_packed(rng, dim, option, dtype):
    packed = Packed(dtype, dim, int(rng.generator.choice([4, 2, 1])), VARLEN[option])
    arrays = packed.arrays(rng)
    cotangents = cotangents_of(rng, arrays[0], arrays[2])

    @jax.jit
    def run(arrays, cotangents, lengths):
        return with_gradients(lambda *qkv: packed.call(*qkv, *lengths))(arrays, cotangents)

    for _ in range(4):
        lengths = packed.lengths(rng)
        (out, lse), gradients = run(arrays, cotangents, lengths)
        expected = run_on_cpu(run, wide(arrays), wide(cotangents), lengths)
        np.testing.assert_allclose(lse, expected[0][1], rtol=1e-4, atol=1e-3)
        assert_near((out, gradients), (expected[0][0], expected[1]), dtype)


@DTYPES
@pytest.mark.parametrize("option", VARLEN)
@pytest.mark.parametrize("dim", [64, 128, 256, 40])
def test_random_packed_lengths(rng, dim, option, dtype):
    check_packed(rng, dim, option, dtype)


@pytest.fixture
def large_blocks(request):
    """Hopper's forward has blocks of 192 queries, as it has where these are many."""
    if request.config.getoption("portable") or GPU.compute_capability != "9.0":
        pytest.skip("Hopper's kernels only")
    _core.override_config({"direction": 0, "block_q": 192, "num_warps": 12})
    yield
    _core.override_config({})


LARGE_BLOCKS = pytest.mark.parametrize("dim", [64, 96, 128])


@LARGE_BLOCKS
@pytest.mark.parametrize("mask", [*MASKS, "lengths", "sinks"])
def test_large_blocks(rng, large_blocks, dim, mask):
    for seqlen_q, seqlen_kv in [(1, 300), (200, 130), (385, 385), (640, 1000), (1500, 777)]:
        options = {
            "full": {},
            "causal": {"is_causal": True},
            "window": {"local_window_size": tuple(rng.generator.integers(0, seqlen_kv, 2).tolist())},
            "lengths": {
                "is_causal": True,
                "query_seq_lengths": rng.integers(0, seqlen_q, 2),
                "key_value_seq_lengths": rng.integers(0, seqlen_kv, 2),
            },
            "sinks": {"is_causal": True, "sinks": rng.normal(6)},
        }[mask]
        arrays = rng.qkv(2, seqlen_q, seqlen_kv, 6, 2, dim, dtype=BF16)
        call = functools.partial(flash_attention, return_lse=True, **options)
        compare_with_cpu(call, arrays, cotangents_of(rng, arrays[0], arrays[2]))


@LARGE_BLOCKS
@pytest.mark.parametrize("option", ["full", "causal", "window"])
def test_packed_in_large_blocks(rng, large_blocks, dim, option):
    check_packed(rng, dim, option, BF16)


@HEAD_DIMS
def test_scores_below_zero_that_rise(rng, dim):
    """Each block of keys, from the last to the first, has a greater maximum, and all of them are far below 0."""
    q, k, v = rng.qkv(2, 1000, 1500, 2, 2, dim, dtype=F16)
    q, k = 0.1 * q + 1, 0.1 * k - (2 + 0.02 * jnp.arange(1500, dtype=F16)[:, None, None])
    call = functools.partial(flash_attention, scale=0.125 * 64 / dim, return_lse=True)
    compare_with_cpu(call, (q, k, v), cotangents_of(rng, q, v), factor=2)


@pytest.mark.parametrize("heads", [(8, 2), (160, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("option", ["plain", "window", "sinks", "cap, bias, mask", "alibi"])
def test_one_query(rng, option, heads):
    """Decoding: heads that share keys, of which there may be more than a block has queries, are read together."""
    num_heads, heads_kv = heads
    for dim in (64, 128, 256, 111):
        options = {
            "plain": {},
            "window": {"local_window_size": (300, 0)},
            "sinks": {"sinks": rng.normal(num_heads)},
            "cap, bias, mask": {
                "logits_soft_cap": 3.0,
                "bias": rng.normal(3, num_heads, 1, 1000, dtype=BF16),
                "mask": rng.bernoulli(3, 1, 1, 1000),
            },
            "alibi": {"alibi_slopes": rng.normal(num_heads)},
        }[option]
        lengths = ints(1000, 0, 517)

        def call(q, k, v, options=options, lengths=lengths):
            return flash_attention(q, k, v, key_value_seq_lengths=lengths, is_causal=True, return_lse=True, **options)

        arrays = rng.qkv(3, 1, 1000, num_heads, heads_kv, dim, dtype=BF16)
        out, lse = jax.jit(call)(*arrays)
        expected = run_on_cpu(call, *wide(arrays))
        np.testing.assert_allclose(lse, expected[1], rtol=1e-4, atol=1e-3)
        assert_near(out, expected[0], BF16, 2 if option == "cap, bias, mask" else 1)


def test_thousands_of_short_sequences(rng):
    sizes = rng.generator.integers(0, 5, 3000)
    offsets, total = ints(0, *np.cumsum(sizes)), int(sizes.sum())
    arrays = rng.qkv((), total, total, 4, 2, 64, dtype=BF16)

    def call(q, k, v):
        return flash_attention_varlen(
            q, k, v, offsets, offsets, max_seqlen_q=4, max_seqlen_kv=4, is_causal=True, return_lse=True
        )

    compare_with_cpu(call, arrays, cotangents_of(rng, arrays[0], arrays[2]))


@DTYPES
@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
@pytest.mark.parametrize("seqlen_q", [1, 7, 200])
def test_pages(rng, seqlen_q, page_size, dtype):
    """Decoding, speculative decoding and chunked prefill over a shuffled cache."""
    lengths = ints(1000, 0, 257, 513)
    max_pages = -(-1024 // page_size)
    pages = [rng.normal(4 * max_pages + 3, page_size, 2, dim, dtype=dtype) for dim in (128, 64)]
    table = jnp.asarray(rng.generator.permutation(4 * max_pages + 3)[: 4 * max_pages].reshape(4, -1), jnp.int32)
    q = rng.normal(4, seqlen_q, 8, 128, dtype=dtype)

    def call(q, pages, table, lengths):
        return paged_attention(q, *pages, table, lengths, return_lse=True)

    out, lse = call(q, pages, table, lengths)
    expected = run_on_cpu(call, *wide((q, pages)), table, lengths)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-4, atol=1e-3)
    assert_near(out, expected[0], dtype)


# ---- dropout ----


@HEAD_DIMS
def test_dropout_bits_are_those_of_the_cpu(rng, dim):
    q, k, v = rng.qkv(2, 203, 277, 4, 2, dim, dtype=BF16)

    def forward(*qkv):
        return flash_api.mha_fwd(
            *qkv, p_dropout=0.17, is_causal=True, return_softmax=True, dropout_key=jax.random.key(5)
        )

    actual, expected = forward(q, k, v), run_on_cpu(forward, *wide((q, k, v)))
    assert_equal(jnp.signbit(actual.S_dmask), jnp.signbit(expected.S_dmask))
    np.testing.assert_allclose(actual.S_dmask, expected.S_dmask, rtol=1e-2, atol=1e-4)
    assert_equal((actual.philox_seed, actual.philox_offset), (expected.philox_seed, expected.philox_offset))


def test_dropout_bits_of_packed_sequences(rng):
    q, k, v = rng.qkv((), 300, 400, 4, 2, 64, dtype=F16)
    where = ints(3, 103, 103, 290), ints(0, 130, 200, 390)

    def forward(*arrays):
        options = {"p_dropout": 0.5, "return_softmax": True, "dropout_key": jax.random.key(6)}
        return flash_api.mha_varlen_fwd(*arrays, max_seqlen_q=187, max_seqlen_k=190, **options).S_dmask

    actual, expected = forward(q, k, v, *where), run_on_cpu(forward, *wide((q, k, v)), *where)
    assert_equal(jnp.signbit(actual), jnp.signbit(expected))
    np.testing.assert_allclose(actual, expected, rtol=1e-2, atol=1e-4)


@DTYPES
@pytest.mark.parametrize("rate", [0.17, 0.9])
@HEAD_DIMS
def test_dropout(rng, dim, rate, dtype):
    arrays = rng.qkv(2, 333, 277, 4, 2, dim, dtype=dtype)
    options = {"dropout_rate": rate, "dropout_key": np.uint32([1, 2]), "return_lse": True}
    # What is kept is scaled up, and so are the differences that gradients are made of.
    compare_with_cpu(functools.partial(flash_attention, **options), arrays, cotangents_of(rng, arrays[0], arrays[2]), 2)


# ---- races ----


@contextlib.contextmanager
def other_work():
    """Keeps kernels of PyTorch running on a stream of their own, where it is installed: they shift the timing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
    if torch is None or not torch.cuda.is_available():
        yield
        return
    stop = threading.Event()

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            matrices = [torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for n in (300, 1000, 2500)]
            while not stop.is_set():
                for x in matrices:
                    (x @ x).sin_()
                torch.cuda.current_stream().synchronize()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def bits(x):
    return jax.lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32)


@jax.jit
def count_differences(results, expected):
    """Elements whose bits differ, per array."""
    return jax.tree.map(lambda x, e: jnp.sum(bits(x) != bits(e)), results, expected)


@pytest.fixture
def assert_repeats_bitwise(request):
    """``assert_repeats_bitwise(step, *args)``: as often as asked for, with other work on the GPU."""
    return functools.partial(_assert_repeats_bitwise, request.config.getoption("repeats"))


def _assert_repeats_bitwise(repeats: int, step, *args) -> None:
    expected = step(*args)
    with other_work():
        counts = [count_differences(step(*args), expected) for _ in range(repeats)]
        jax.block_until_ready(counts)
    totals = jax.tree.map(lambda *xs: int(np.sum(xs)), *counts)
    assert not any(jax.tree.leaves(totals)), totals


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", [(513, 513), (239, 1), (1, 239), (1024, 128), (97, 2000), (2100, 300)], ids=str)
@HEAD_DIMS
def test_repeats_are_bitwise_equal(rng, assert_repeats_bitwise, dim, lengths, mask):
    """out, lse, dk and dv without grouped heads: always."""
    arrays = rng.qkv(8, *lengths, 4, 4, dim, dtype=BF16)
    options = {"is_causal": mask == "causal", "local_window_size": (100, 30) if mask == "window" else None}
    run = with_gradients(functools.partial(flash_attention, return_lse=True, **options))

    @jax.jit
    def step(*args):
        (out, lse), (_, dk, dv) = run(*args)
        return {"out": out, "lse": lse, "dk": dk, "dv": dv}

    assert_repeats_bitwise(step, arrays, cotangents_of(rng, arrays[0], arrays[2]))


@pytest.mark.parametrize("shape", [(1, 4, 512, 512), (8, 1, 1, 512), (1, 1, 1, 1)], ids=str)
@HEAD_DIMS
def test_repeats_of_a_bias_gradient_are_bitwise_equal(rng, assert_repeats_bitwise, dim, shape):
    """Always, whatever it is summed over."""
    q, k, v = rng.qkv(8, 512, 512, 4, 2, dim, dtype=BF16)
    run = with_gradients(lambda q, k, v, bias: flash_attention(q, k, v, bias=bias, is_causal=True, return_lse=True))
    step = jax.jit(lambda *args: run(*args)[1][3])
    assert_repeats_bitwise(step, (q, k, v, rng.normal(*shape)), cotangents_of(rng, q, v))


DETERMINISTIC = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (200, 100)},
    "softcap": {"is_causal": True, "logits_soft_cap": 3.0},
    "dropout": {"dropout_rate": 0.17, "dropout_key": np.uint32([7, 8])},
    "bias": {},
}


@pytest.mark.parametrize("option", DETERMINISTIC)
@pytest.mark.parametrize("dim", [64, 128, 192, 256, 111])
def test_repeats_are_bitwise_equal_if_deterministic(rng, assert_repeats_bitwise, dim, option):
    """All gradients, with grouped heads, odd lengths, sinks and, in one case, a bias that all batch entries share."""
    q, k, v = rng.qkv(4, 777, 1001, 8, 2, dim, dtype=BF16)
    arrays = (q, k, v, rng.normal(8), rng.normal(1, 8, 1, 1001) if option == "bias" else rng.normal(1, 1, 1, 1))
    options = {"deterministic": True, "return_lse": True, **DETERMINISTIC[option]}

    def call(q, k, v, sinks, bias):
        return flash_attention(q, k, v, sinks=sinks, bias=bias if option == "bias" else None, **options)

    assert_repeats_bitwise(with_gradients(call), arrays, cotangents_of(rng, q, v))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_repeats_of_packed_sequences_are_bitwise_equal_if_deterministic(rng, assert_repeats_bitwise, dim):
    packed = Packed(BF16, dim, 2, {"is_causal": True, "deterministic": True})
    arrays, lengths = packed.arrays(rng), packed.lengths(rng)
    run = with_gradients(lambda *qkv: packed.call(*qkv, *lengths))
    assert_repeats_bitwise(run, arrays, cotangents_of(rng, arrays[0], arrays[2]))


# ---- memory ----


def fill_free_memory_with_nan() -> None:
    """All bits set, which is NaN in every float and -1 in every counter, where the next results and workspaces lie."""
    # Small pieces first: they take the gaps that bigger ones would leave.
    filled = [jnp.full(2**size, 0xFFFFFFFF, jnp.uint32) for size in range(6, 25) for _ in range(6)]
    jax.block_until_ready(filled)
    for x in filled:
        x.delete()


def dense_case(rng, dim, **options):
    arrays = rng.qkv(3, 203, 277, 4, 2, dim, dtype=BF16)
    return functools.partial(flash_attention, return_lse=True, **options), arrays


def packed_case(rng, dim, **options):
    packed = Packed(BF16, dim, 2, options)
    lengths = packed.lengths(rng)
    return lambda *qkv: packed.call(*qkv, *lengths), packed.arrays(rng)


def biased_case(rng, dim, shape, **options):
    (q, k, v), bias = rng.qkv(3, 203, 277, 4, 2, dim, dtype=BF16), rng.normal(*shape)
    return lambda q, k, v, bias: flash_attention(q, k, v, bias=bias, return_lse=True, **options), (q, k, v, bias)


DIRTY = {
    "plain": dense_case,
    "causal": functools.partial(dense_case, is_causal=True, local_window_size=(50, 0)),
    "lengths": functools.partial(
        dense_case, query_seq_lengths=np.int32([0, 203, 70]), key_value_seq_lengths=np.int32([277, 1, 0])
    ),
    "no row sees a key": functools.partial(dense_case, mask=np.zeros((1, 1, 1, 277), bool)),
    "dropout": functools.partial(dense_case, dropout_rate=0.17, dropout_key=np.uint32([1, 2])),
    "packed": functools.partial(packed_case, is_causal=True),
    "bias": functools.partial(biased_case, shape=(3, 4, 203, 277)),
    "bias of all": functools.partial(biased_case, shape=(1, 1, 1, 1)),
    "bias of keys": functools.partial(biased_case, shape=(1, 4, 1, 277)),
}


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])
@pytest.mark.parametrize("case", DIRTY)
@HEAD_DIMS
def test_in_memory_full_of_nan(rng, dim, case, deterministic):
    """Every element of the results is written, and no workspace is taken to be zero."""
    call, arrays = DIRTY[case](rng, dim, deterministic=deterministic)
    cotangents = cotangents_of(rng, arrays[0], arrays[2])
    expected = run_on_cpu(with_gradients(call), wide(arrays), wide(cotangents))
    step = with_gradients(call)
    jax.block_until_ready(step(arrays, cotangents))
    for _ in range(3):
        fill_free_memory_with_nan()
        (out, lse), gradients = step(arrays, cotangents)
        np.testing.assert_allclose(lse, expected[0][1], rtol=1e-4, atol=1e-3)
        assert_near((out, gradients), (expected[0][0], expected[1]), BF16, 2 if case == "dropout" else 1)


def test_softmax_in_memory_full_of_nan(rng):
    q, k, v = rng.qkv(2, 203, 277, dtype=BF16)

    def forward(*qkv):
        return flash_api.mha_fwd(*qkv, is_causal=True, window_size_left=70, return_softmax=True).S_dmask

    jax.block_until_ready(forward(q, k, v))
    fill_free_memory_with_nan()
    actual, expected = forward(q, k, v), run_on_cpu(forward, *wide((q, k, v)))
    np.testing.assert_allclose(actual, expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
@pytest.mark.parametrize("option", [{}, {"is_causal": True}, {"local_window_size": (90, 40)}], ids=str)
@HEAD_DIMS
def test_nan_behind_the_lengths(rng, dim, option, garbage):
    """Whole tiles of it and parts of tiles: the same bits as with zeros."""
    q, k, v = rng.qkv(4, 300, 400, 4, 2, dim, dtype=BF16)
    lengths_q, lengths_kv = ints(300, 0, 129, 64), ints(131, 400, 1, 256)
    cotangents = cotangents_of(rng, q, v)
    rows = (jnp.arange(300) < lengths_q[:, None])[:, :, None, None]
    keys = (jnp.arange(400) < lengths_kv[:, None])[:, :, None, None]
    call = functools.partial(
        flash_attention, query_seq_lengths=lengths_q, key_value_seq_lengths=lengths_kv, deterministic=True,
        return_lse=True, **option,
    )  # fmt: skip
    step = with_gradients(call)

    def fill(x, used, value):
        return jnp.where(used, x, jnp.asarray(value, x.dtype))

    clean, dirty = (
        step(
            (fill(q, rows, x), fill(k, keys, x), fill(v, keys, x)),
            (fill(cotangents[0], rows, x), fill(cotangents[1], rows[..., 0].swapaxes(1, 2), x)),
        )
        for x in (0, garbage)
    )
    assert_equal(dirty, clean)
    assert all(bool(jnp.isfinite(x).all()) for x in (clean[0][0], *clean[1]))


@pytest.mark.parametrize("operand", range(3), ids=["query", "key", "value"])
@HEAD_DIMS
def test_nan_stays_in_its_batch_entry_and_head(rng, dim, operand):
    arrays = list(rng.qkv(2, 203, 277, 4, 2, dim, dtype=BF16))
    cotangents = cotangents_of(rng, arrays[0], arrays[2])
    step = with_gradients(functools.partial(flash_attention, deterministic=True, return_lse=True))
    expected = step(arrays, cotangents)
    arrays[operand] = arrays[operand].at[1, 130, 1].set(jnp.nan)
    (out, lse), gradients = step(arrays, cotangents)
    heads = [1] if operand == 0 else [2, 3]  # of key head 0 and 1

    def others(x, heads, head_axis=2):
        x = np.array(x, np.float32)
        x[(1, *[slice(None)] * (head_axis - 1), heads)] = 0
        return x

    assert_equal(others(out, heads), others(expected[0][0], heads))
    assert_equal(others(lse, heads, 1), others(expected[0][1], heads, 1))
    assert_equal(others(gradients[0], heads), others(expected[1][0], heads))
    for x, e in zip(gradients[1:], expected[1][1:], strict=True):
        assert_equal(others(x, [heads[0] // 2]), others(e, [heads[0] // 2]))


# ---- command buffers ----

GRAPHS = {
    "default": {},
    "always": {"xla_gpu_graph_min_graph_size": 1},
    "never": {"xla_gpu_enable_command_buffer": ""},
}


def chain(q, k, v):
    """Enough calls in a row for XLA to make a graph of them."""
    for i in range(8):
        q = flash_attention(q, k, v, is_causal=i % 2 == 0, deterministic=True)
    return q


@pytest.mark.parametrize("graphs", GRAPHS)
def test_replay_with_moving_buffers(rng, graphs):
    """Donated, fresh and many live buffers: a replayed graph takes each call's own."""
    options = GRAPHS[graphs]
    inputs = [rng.qkv(2, 200, 200, 4, 2, 64, dtype=BF16) for _ in range(6)]
    plain = jax.jit(chain, compiler_options=GRAPHS["never"])
    gradient = jax.grad(lambda *args: chain(*args).astype(jnp.float32).sum(), (0, 1, 2))
    plain_gradient = jax.jit(gradient, compiler_options=GRAPHS["never"])
    expected = [jax.device_get((plain(*x), plain_gradient(*x))) for x in inputs]
    step, step_gradient = (jax.jit(f, compiler_options=options) for f in (chain, gradient))

    for _ in range(4):  # results are freed and their memory is used again
        for x, e in zip(inputs, expected, strict=True):
            assert_equal((step(*x), step_gradient(*x)), e)
    fresh = [[jnp.array(y) for y in inputs[i % 6]] for i in range(30)]
    alive = [(step(*x), step_gradient(*x)) for x in fresh]  # all outputs at once
    for i, results in enumerate(alive):
        assert_equal(results, expected[i % 6])

    donated = jax.jit(chain, donate_argnums=0, compiler_options=options)
    x, y = jnp.array(inputs[0][0]), jnp.array(inputs[0][0])
    for _ in range(20):
        x, y = donated(x, *inputs[0][1:]), plain(y, *inputs[0][1:])
    assert_equal(x, y)


@pytest.mark.parametrize("graphs", GRAPHS)
def test_lengths_and_seeds_change_between_replays(rng, graphs):
    """They are operands: a graph must not have their values in it."""
    packed = Packed(BF16, 64, 2, {"is_causal": True, "dropout_rate": 0.3, "deterministic": True})
    arrays = packed.arrays(rng)

    def layers(q, k, v, key, lengths):
        for i in range(6):
            options = packed.options | {"dropout_key": jax.random.fold_in(key, i)}
            q = dataclasses.replace(packed, options=options).call(q, k, v, *lengths)[0]
        return q

    step = jax.jit(layers, compiler_options=GRAPHS[graphs])
    plain = jax.jit(layers, compiler_options=GRAPHS["never"])
    seen = []
    for i in range(6):
        args = *arrays, jax.random.key(i), packed.lengths(rng)
        seen.append(np.asarray(step(*args), np.float32))
        assert_equal(seen[-1], np.asarray(plain(*args), np.float32))
    assert not any(np.array_equal(x, y) for x, y in itertools.pairwise(seen))


# ---- transformations, threads, processes ----


# A second batch axis is nothing for Hopper's kernels.
@pytest.mark.usefixtures("portable_kernels")
def test_vmap_with_shared_operands_of_many_tiles(rng):
    """As in test_transforms, over several tiles: an operand that the map shares has a batch axis of size 1."""
    q, (_, k, v) = rng.normal(3, 2, 203, 4, 64, dtype=BF16), rng.qkv(2, 203, 277, dim=64, dtype=BF16)
    bias, lengths = rng.normal(3, 1, 4, 1, 277), ints([277, 3], [100, 200], [64, 0])

    def call(q, k, v, bias, lengths):
        options = {"dropout_rate": 0.2, "dropout_key": np.uint32([3, 4]), "deterministic": True, "return_lse": True}
        run = with_gradients(
            lambda q, k, v, bias: flash_attention(q, k, v, bias=bias, key_value_seq_lengths=lengths, **options)
        )
        return run((q, k, v, bias), (jnp.ones_like(q), jnp.ones((2, 4, 203))))

    for axes in itertools.product((0, None), repeat=2):
        in_axes = (axes[0], None, None, axes[1], 0)
        args = (q if axes[0] == 0 else q[0], k, v, bias if axes[1] == 0 else bias[0], lengths)
        actual = jax.jit(jax.vmap(call, in_axes))(*args)
        for i in range(3):
            one = jax.jit(call)(*(x if a is None else x[i] for x, a in zip(args, in_axes, strict=True)))
            results, (*gradients, d_bias) = jax.tree.map(lambda x, i=i: x[i], actual)
            one_results, (*one_gradients, one_d_bias) = one
            assert_equal((results, gradients), (one_results, one_gradients))
            np.testing.assert_allclose(d_bias, one_d_bias, rtol=1e-5, atol=1e-4)  # XLA sums it up, in its own order


def test_layers_in_a_scan_with_remat(rng):
    x, (_, k, v) = rng.normal(2, 203, 4, 64, dtype=BF16), rng.qkv((5, 2), 203, 203, dim=64, dtype=BF16)

    def layer(x, kv):
        return x + flash_attention(x, *kv, is_causal=True, deterministic=True), None

    def loss(body, x, k, v):
        return jax.lax.scan(body, x, (k, v))[0].astype(jnp.float32).sum()

    def unrolled(x, k, v):
        for i in range(5):
            x = layer(x, (k[i], v[i]))[0]
        return x.astype(jnp.float32).sum()

    def step(function):
        return jax.jit(jax.value_and_grad(function, (0, 1, 2)))(x, k, v)

    expected = step(unrolled)
    for body in (layer, jax.checkpoint(layer)):
        actual = step(functools.partial(loss, body))
        assert_near(actual, expected, BF16)


def test_four_threads(rng):
    """Calls of several configurations compile, load and launch at once."""
    cases = [dense_case(rng, dim, deterministic=True, is_causal=causal) for dim in (48, 72) for causal in (False, True)]
    cases = [(with_gradients(call), arrays, cotangents_of(rng, arrays[0], arrays[2])) for call, arrays in cases]
    selected = jax.config.jax_default_device

    def work(offset: int):
        results = [[] for _ in cases]
        with jax.default_device(selected):  # a thread begins with none
            for i in range(40):
                step, *args = cases[(i + offset) % 4]
                results[(i + offset) % 4].append(step(*args))
        return results

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(work, range(4)))
    for i, (step, *args) in enumerate(cases):
        expected = step(*args)
        for results in found:
            for x in results[i]:
                assert_equal(x, expected)


PROCESS = """
import os, pickle, sys
import jax, jax.monitoring, jax.numpy as jnp, numpy as np
import jax_flash
from jax.experimental import serialize_executable

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
mode, path = sys.argv[1:]
rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(rng.standard_normal((2, 203, n, 64)), jnp.bfloat16) for n in (4, 2, 2))

def attend(q, k, v, key):
    options = {"is_causal": True, "dropout_rate": 0.2, "deterministic": True, "return_lse": True}
    (out, lse), vjp = jax.vjp(lambda *qkv: jax_flash.flash_attention(*qkv, dropout_key=key, **options), q, k, v)
    return out, lse, vjp((jnp.ones_like(out), jnp.zeros_like(lse)))

step, args = jax.jit(attend), (q, k, v, np.uint32([1, 2]))
if mode == "export":
    exported = jax.export.export(step, disabled_checks=jax_flash.DISABLED_CHECKS)(*args)
    open(path, "wb").write(exported.serialize())
elif mode == "call":
    step = jax.jit(jax.export.deserialize(bytearray(open(path, "rb").read())).call)
elif mode == "serialize":
    pickle.dump(serialize_executable.serialize(step.lower(*args).compile()), open(path, "wb"))
elif mode == "deserialize":
    serialized = pickle.load(open(path, "rb"))
    step = serialize_executable.deserialize_and_load(*serialized, execution_devices=jax.devices()[:1])
results = [np.asarray(x, np.float32) for x in jax.tree.leaves([step(*args) for _ in range(3)])]
np.savez(f"{path}.{mode}", events.count("/jax/compilation_cache/cache_misses"), *results)
"""
PLATFORMS = "cuda,cpu"


@pytest.mark.parametrize("modes", [("compile", "cached"), ("export", "call"), ("serialize", "deserialize")], ids=str)
def test_programs_of_another_process(tmp_path, modes):
    """One process makes a program, another runs it, with no kernel in the cache: instantiate is skipped there."""
    if modes[0] == "export":
        pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers")
    results = []
    for mode in modes:
        environment = os.environ | {
            "JAX_PLATFORMS": PLATFORMS,
            "JAX_FLASH_CACHE_DIR": str(tmp_path / f"kernels of {mode}"),
        }
        if modes[0] == "compile":
            environment |= {
                "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            }
        # -P: the working directory may hold our sources, without the extension.
        command = [sys.executable, "-P", "-c", PROCESS, mode, str(tmp_path / "program")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        with np.load(tmp_path / f"program.{mode}.npz") as arrays:
            results.append([arrays[name] for name in arrays])
    if modes[0] == "compile":
        assert results[0][0] > 0 and results[1][0] == 0, "the second process compiled anew"
    assert_equal(results[1][1:], results[0][1:])

    generator = np.random.default_rng(0)
    q, k, v = (jnp.asarray(generator.standard_normal((2, 203, n, 64)), BF16) for n in (4, 2, 2))
    options = {"is_causal": True, "dropout_rate": 0.2, "dropout_key": np.uint32([1, 2])}
    expected = run_on_cpu(functools.partial(flash_attention, **options), *wide((q, k, v)))
    assert_near(results[1][1], expected, BF16, 2)


# ---- bad values, refused dtypes, large arrays ----

OFFSETS = {
    "decreasing": (0, 600, 200, 400),
    "negative": (-500, -3, 300, 700),
    "too large": (0, 300, 5000, 10000),
    "extremes": (INT_MIN, INT_MAX, INT_MIN, INT_MAX),
    "never begins": (INT_MAX,) * 4,
}


@pytest.mark.parametrize("offsets_kv", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("offsets_q", OFFSETS.values(), ids=OFFSETS)
def test_out_of_range_offsets(rng, offsets_q, offsets_kv):
    """Sequences are clamped to the arrays and to the one before, over several tiles as over one (test_robustness)."""
    packed = Packed(BF16, 128, 2, {"deterministic": True}, longest=700, total=700)
    arrays = packed.arrays(rng)
    cotangents = cotangents_of(rng, arrays[0], arrays[2])

    @jax.jit
    def run(arrays, cotangents, lengths):
        return with_gradients(lambda *qkv: packed.call(*qkv, *lengths))(arrays, cotangents)

    clamped = [np.maximum.accumulate(np.clip(x, 0, 700)) for x in (offsets_q, offsets_kv)]
    wild = run(arrays, cotangents, (ints(*offsets_q), ints(*offsets_kv), ints(INT_MAX, INT_MIN, 50)))
    tame = run(arrays, cotangents, (ints(*clamped[0]), ints(*clamped[1]), ints(700, 0, 50)))
    assert_equal(wild, tame)


@pytest.mark.parametrize("max_q, max_kv", [(1, 1), (0, 0), (64, 700), (700, 64), (130, 130)])
def test_sequences_longer_than_stated(rng, max_q, max_kv):
    """They come out right all the same, of fewer thread blocks."""
    arrays = rng.qkv((), 700, 700, 4, 2, 64, dtype=BF16)
    offsets = ints(0, 600, 700)
    call = functools.partial(flash_attention_varlen, is_causal=True, deterministic=True, return_lse=True)
    cotangents = cotangents_of(rng, arrays[0], arrays[2])

    def run(max_q, max_kv):
        options = {"max_seqlen_q": max_q, "max_seqlen_kv": max_kv}
        return with_gradients(lambda *qkv: call(*qkv, offsets, offsets, **options))(arrays, cotangents)

    assert_equal(run(max_q, max_kv), run(600, 600))


@pytest.mark.parametrize("page_size", [1, 16, 100])
def test_out_of_range_pages_and_lengths(rng, page_size):
    pages = rng.normal(2, 5, page_size, 2, 64, dtype=F16)
    q = rng.normal(6, 3, 4, 64, dtype=F16)
    lengths = ints(8 * page_size, INT_MAX, page_size + 1, -1, INT_MIN, 4)
    table = ints(*[[INT_MIN, -1, 5, INT_MAX, 0, 4, 10**6, 3]] * 6)
    wild = paged_attention(q, *pages, table, lengths, return_lse=True)
    tame = paged_attention(q, *pages, jnp.clip(table, 0, 4), jnp.clip(lengths, 0, 8 * page_size), return_lse=True)
    assert_equal(wild, tame)


REFUSED = {
    "dense": lambda x: flash_attention(x[None], x[None], x[None]),
    "gradient": jax.grad(lambda x: flash_attention(x[None], x[None], x[None]).sum()),
    "packed": lambda x: flash_attention_varlen(x, x, x, ints(0, 9), ints(0, 9), max_seqlen_q=9, max_seqlen_kv=9),
    "pages": lambda x: paged_attention(x[None], x[None], x[None], ints([0]), ints(9)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_float32_is_refused(rng, kind):
    """With a sentence that says to cast: never a silent loss of precision."""
    with pytest.raises((NotImplementedError, jax.errors.JaxRuntimeError), match=r"(?i)\bcast"):
        jax.block_until_ready(jax.jit(REFUSED[kind])(rng.normal(9, 4, 64)))


@pytest.fixture
def large_memory(device):
    """45 GB for arrays of more than 2^31 elements."""
    stats = device.memory_stats() or {}
    if stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0) < 45e9:
        pytest.skip("needs 45 GB of the GPU's memory")


def large(key: int, *shape: int) -> jax.Array:
    assert np.prod(shape, dtype=np.int64) > 2**31
    return jax.jit(lambda: jax.random.normal(jax.random.key(key), shape, BF16))()


@pytest.mark.usefixtures("large_memory")
def test_more_than_2_to_31_elements_of_query(rng):
    """One batch entry, so that offsets within it are that large; rows do not depend on each other."""
    q, (_, k, v) = large(0, 1, 2**17 + 200, 64, 256), rng.qkv(1, 1, 64, 64, 1, 256, dtype=BF16)

    @jax.jit
    def run(q):
        out, vjp = jax.vjp(lambda q: flash_attention(q, k, v), q)
        return out[:, -150:], vjp(out)[0][:, -150:]

    assert_near(run(q), run(q[:, -150:]), BF16)


@pytest.mark.usefixtures("large_memory")
def test_more_than_2_to_31_elements_of_key_and_value(rng):
    """A window lets the queries see only the end."""
    k = large(1, 1, 2**17 + 200, 64, 256)
    q = rng.normal(1, 64, 64, 256, dtype=BF16)

    @jax.jit
    def run(k):
        def attend(q, k):
            return flash_attention(q, k, k, is_causal=True, local_window_size=(80, 0))

        out, vjp = jax.vjp(attend, q, k)
        dq, dk = vjp(out)
        return out, dq, dk[:, -150:]

    assert_near(run(k), run(k[:, -150:]), BF16)


@pytest.mark.usefixtures("large_memory")
def test_more_than_2_to_31_elements_in_many_batch_entries(rng):
    """Of queries; keys that large would leave a GPU of 80 GB no room for the gradients."""
    q = large(2, 2**15 + 9, 8, 128, 64)

    @jax.jit
    def run(q):
        k = q[:, :, :1]
        out, vjp = jax.vjp(lambda q: flash_attention(q, k, k, is_causal=True), q)
        return out[-5:], vjp(out)[0][-5:]

    assert_near(run(q), run(q[-5:]), BF16)


@pytest.mark.usefixtures("large_memory")
def test_more_than_2_to_31_elements_of_bias(rng):
    bias = large(3, 1, 2, 2**15 + 64, 2**15)
    q, k, v = rng.qkv(1, 2**15 + 64, 2**15, 2, 2, 64, dtype=BF16)

    @jax.jit
    def run(q, bias):
        return flash_attention(q, k, v, bias=bias, return_lse=True)

    out, lse = run(q, bias)
    end_out, end_lse = run(q[:, -150:], bias[:, :, -150:])
    assert_near((out[:, -150:], lse[..., -150:]), (end_out, end_lse), BF16)


def test_arrays_of_both_devices_in_one_process(rng):
    """The array's own device picks the kernel."""
    q, k, v = rng.qkv(2, 100, 100, dtype=BF16)
    here, there = flash_attention(q, k, v), flash_attention(*jax.device_put((q, k, v), CPU))
    assert here.devices() != there.devices() == {CPU}
    assert_near(here, there, BF16)
