"""Every error about arguments: its type, and that its message names the argument, what was expected and what came."""

from __future__ import annotations

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash import dot_product_attention, flash_api, flash_attention, flash_attention_varlen, paged_attention

NAN, INF, I32 = float("nan"), float("inf"), jnp.int32


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


def ints(*values):
    return jnp.array(values, jnp.int32)


def uints(*values):
    return jnp.array(values, jnp.uint32)


Q, KV, PACKED_Q, PACKED_KV, PAGES = ones(2, 6, 4, 8), ones(2, 7, 2, 8), ones(10, 4, 8), ones(12, 2, 8), ones(5, 4, 2, 8)
OFFSETS_Q, OFFSETS_KV, TABLE, LENGTHS = ints(0, 4, 10), ints(0, 5, 12), ints([0, 1, 2], [3, 4, 0]), ints(3, 7)
KEY = jax.random.key(0)
_QKV = {"q": Q, "k": KV, "v": KV}
_PACKED = {"q": PACKED_Q, "k": PACKED_KV, "v": PACKED_KV, "cu_seqlens_q": OFFSETS_Q, "cu_seqlens_k": OFFSETS_KV}
_PACKED |= {"max_seqlen_q": 6, "max_seqlen_k": 7}
_KV_PAGES = ("key_pages", "value_pages")
_PAGED = {"k": PAGES, "v": PAGES, "block_table": TABLE}

# Each function with arguments that are right.
DENSE = (flash_attention, {"query": Q, "key": KV, "value": KV})
JAX_NN = (dot_product_attention, {"query": Q, "key": KV, "value": KV})
VARLEN = (
    flash_attention_varlen,
    {
        "query": PACKED_Q, "key": PACKED_KV, "value": PACKED_KV, "cu_seqlens_q": OFFSETS_Q,
        "cu_seqlens_kv": OFFSETS_KV, "max_seqlen_q": 6, "max_seqlen_kv": 7,
    },
)  # fmt: skip
PAGED = (
    paged_attention,
    {"query": Q, "key_pages": PAGES, "value_pages": PAGES, "page_table": TABLE, "key_value_seq_lengths": LENGTHS},
)
FWD = (flash_api.mha_fwd, _QKV)
VARLEN_FWD = (flash_api.mha_varlen_fwd, _PACKED)
BWD = (flash_api.mha_bwd, {**_QKV, "dout": Q, "out": Q, "softmax_lse": ones(2, 4, 6)})
VARLEN_BWD = (flash_api.mha_varlen_bwd, {**_PACKED, "dout": PACKED_Q, "out": PACKED_Q, "softmax_lse": ones(4, 10)})

FUNCTIONS = [DENSE, JAX_NN, VARLEN, PAGED, FWD, VARLEN_FWD, BWD, VARLEN_BWD]

# The function, the arguments that are changed, the error, and a pattern of its message.
WRONG = [
    # query, key, value
    (DENSE, {"query": None}, ValueError, "`query` must be an array, got None"),
    (DENSE, {"query": "x"}, ValueError, "`query` must be an array, got 'x'"),
    (DENSE, {"key": {}}, ValueError, "`key` must be an array, got dict"),
    (DENSE, {"value": [[1.0], [2.0, 3.0]]}, ValueError, "`value` must be an array, got list"),
    (DENSE, {"query": ones(4, 8)}, ValueError, r"`query` must have at least 3 axes .*\[4, 8\]"),
    (DENSE, {"query": Q.astype(jnp.int32)}, NotImplementedError, "`query` has dtype int32; .* float32, bfloat16"),
    (DENSE, {"value": KV.astype(jnp.complex64)}, NotImplementedError, "`value` has dtype complex64; .* float32"),
    (DENSE, {"key": KV > 0}, NotImplementedError, "`key` has dtype bool; .* float32, bfloat16"),
    (DENSE, {"query": jax.random.split(KEY, (2, 6, 4, 8))}, NotImplementedError, "`query` has dtype key.* float32"),
    (DENSE, {"key": KV.astype(jnp.bfloat16)}, ValueError, "one dtype, got float32, bfloat16, float32"),
    (DENSE, {"value": KV.astype(jnp.float16)}, ValueError, "one dtype, got float32, float32, float16"),
    (DENSE, {"query": ones(2, 6, 4, 257)}, NotImplementedError, "`query` has head dim 257; supported are 1 to 256"),
    (DENSE, {"query": ones(2, 6, 4, 0)}, NotImplementedError, "`query` has head dim 0; supported are 1 to 256"),
    (DENSE, {"value": ones(2, 7, 2, 300)}, NotImplementedError, "`value` has head dim 300; supported are 1 to 256"),
    (DENSE, {"query": ones(2, 6, 4, 9)}, ValueError, "query and key must have the same head dim, got 9 and 8"),
    (DENSE, {"value": ones(2, 3, 2, 8)}, ValueError, r"key and value must agree .*\[2, 7, 2, 8\] and \[2, 3, 2, 8\]"),
    (DENSE, {"value": ones(2, 7, 1, 8)}, ValueError, r"key and value must agree .*\[2, 7, 2, 8\] and \[2, 7, 1, 8\]"),
    (DENSE, {"query": ones(2, 6, 3, 8)}, ValueError, "query heads must be a multiple .* got 3 and 2"),
    (DENSE, {"query": ones(2, 6, 0, 8)}, ValueError, "query heads must be a multiple .* got 0 and 2"),
    (DENSE, {"query": ones(3, 6, 4, 8)}, ValueError, r"leading \(batch\) axes, got \[3, 6, 4, 8\] and \[2, 7, 2, 8\]"),
    (DENSE, {"query": ones(6, 4, 8)}, ValueError, r"leading \(batch\) axes, got \[6, 4, 8\] and \[2, 7, 2, 8\]"),
    (DENSE, dict.fromkeys(("query", "key", "value"), ones(*[1] * 12)), NotImplementedError, "at most 8 .* got 9"),
    # bias, mask
    (DENSE, {"bias": ones(6, 7)}, ValueError, r"`bias` .*\[2, 4, 6, 7\], any axis of which may be 1, got \[6, 7\]"),
    (DENSE, {"bias": ones(2, 2, 6, 7)}, ValueError, r"`bias` .*\[2, 4, 6, 7\].* got \[2, 2, 6, 7\]"),
    (DENSE, {"bias": ones(1, 1, 6, 7, dtype=I32)}, ValueError, "`bias` must be float32, .* got int32"),
    (DENSE, {"bias": ones(1, 1, 6, 7, dtype=bool)}, ValueError, "`bias` must be float32, .* got bool"),
    (DENSE, {"mask": ones(1, 1, 6, 7)}, ValueError, "`mask` must be bool .* got float32.* `bias`"),
    (DENSE, {"mask": ones(1, 1, 6, 7, dtype=I32)}, ValueError, "`mask` must be bool .* got int32.* `mask != 0`"),
    (DENSE, {"mask": ones(2, 1, 7, 6, dtype=bool)}, ValueError, r"`mask` .*\[2, 4, 6, 7\].* got \[2, 1, 7, 6\]"),
    (DENSE, {"mask": True}, ValueError, "`mask` must be an array, got True"),
    # Numbers
    (DENSE, {"scale": jnp.float32(0.1)}, ValueError, "`scale` .* got an array .pass x.item|`scale` .* static_argnames"),
    (DENSE, {"scale": True}, ValueError, "`scale` must be a Python number .* got bool"),
    (DENSE, {"scale": np.bool_(True)}, ValueError, "`scale` must be a Python number .* got bool"),
    (DENSE, {"scale": "1"}, ValueError, "`scale` must be a Python number .* got str"),
    (DENSE, {"scale": 1j}, ValueError, "`scale` must be a Python number .* got complex"),
    (DENSE, {"scale": NAN}, ValueError, "`scale` must be finite.* got nan"),
    (DENSE, {"scale": -INF}, ValueError, "`scale` must be finite.* got -inf"),
    (DENSE, {"scale": 1e39}, ValueError, r"`scale` must be finite.* got 1e\+39"),  # inf in float32
    (DENSE, {"scale": 10**400}, ValueError, "`scale` must be finite"),
    (DENSE, {"logits_soft_cap": jnp.float32(3)}, ValueError, "`logits_soft_cap` must be a Python number .* got"),
    (DENSE, {"logits_soft_cap": 0}, ValueError, "`logits_soft_cap` must be positive .* None for no cap, got 0"),
    (DENSE, {"logits_soft_cap": -2.0}, ValueError, "`logits_soft_cap` must be positive .* got -2"),
    (DENSE, {"logits_soft_cap": NAN}, ValueError, "`logits_soft_cap` must be positive .* got nan"),
    (DENSE, {"logits_soft_cap": INF}, ValueError, "`logits_soft_cap` must be positive .* got inf"),
    (DENSE, {"logits_soft_cap": 1e39}, ValueError, r"`logits_soft_cap` must be positive .* got 1e\+39"),
    (DENSE, {"logits_soft_cap": 1e-60}, ValueError, "`logits_soft_cap` must be positive .* got 1e-60"),  # 0 in float32
    # Switches
    (DENSE, {"is_causal": 1}, ValueError, "`is_causal` must be True or False, .* got int: 1"),
    (DENSE, {"is_causal": None}, ValueError, "`is_causal` must be True or False, .* got NoneType"),
    (DENSE, {"is_causal": jnp.array(True)}, ValueError, "`is_causal` must be True or False, known when tracing, got"),
    (DENSE, {"deterministic": 1}, ValueError, "`deterministic` must be True or False, .* got int: 1"),
    (DENSE, {"return_lse": 1}, ValueError, "`return_lse` must be True or False, .* got int: 1"),
    (DENSE, {"broadcast_dropout": 1}, ValueError, "`broadcast_dropout` must be True or False, .* got int: 1"),
    (DENSE, {"causal_alignment": "top"}, ValueError, "`causal_alignment` must be .*bottom_right.* got 'top'"),
    (DENSE, {"causal_alignment": None}, ValueError, "`causal_alignment` must be .*bottom_right.* got None"),
    # Window
    (DENSE, {"local_window_size": -2}, ValueError, "`local_window_size` must be a Python int from -1 .* got -2"),
    (DENSE, {"local_window_size": (1, -2)}, ValueError, "`local_window_size` must be a Python int from -1 .* got -2"),
    (DENSE, {"local_window_size": 2**31}, ValueError, "`local_window_size` must be a Python int .* got 2147483648"),
    (DENSE, {"local_window_size": ["a", 1]}, ValueError, "`local_window_size` must be a Python int .* got str: 'a'"),
    (DENSE, {"local_window_size": (1, True)}, ValueError, "`local_window_size` must be a Python int .* got bool: True"),
    (DENSE, {"local_window_size": (1, 2, 3)}, ValueError, r"`local_window_size` must be None, .*\(1, 2, 3\)"),
    (DENSE, {"local_window_size": 1.5}, ValueError, "`local_window_size` must be None, .* got float: 1.5"),
    (DENSE, {"local_window_size": True}, ValueError, "`local_window_size` must be None, .* got bool: True"),
    (DENSE, {"local_window_size": jnp.int32(3)}, ValueError, "`local_window_size` must be None, an int, .* got"),
    # Arrays per head, batch entry and row
    (DENSE, {"alibi_slopes": ones(3)}, ValueError, r"`alibi_slopes` must have shape \[N\] or .*\[2, 4\], got \[3\]"),
    (DENSE, {"alibi_slopes": ones(3, 4)}, ValueError, r"`alibi_slopes` must have shape .*\[2, 4\], got \[3, 4\]"),
    (DENSE, {"alibi_slopes": [1, 2, 3, 4]}, ValueError, "`alibi_slopes` must be float32, got int32"),
    (DENSE, {"sinks": ones(2)}, ValueError, r"`sinks` must have shape \[N\] = \[4\], got \[2\]"),
    (DENSE, {"sinks": ones(4, dtype=jnp.bfloat16)}, ValueError, "`sinks` must be float32, got bfloat16"),
    (DENSE, {"query_seq_lengths": ones(2)}, ValueError, "`query_seq_lengths` must be int32, got float32"),
    (DENSE, {"query_seq_lengths": 3}, ValueError, r"`query_seq_lengths` must have shape .*\[2\], got \[\]"),
    (DENSE, {"key_value_seq_lengths": ones(2) > 0}, ValueError, "`key_value_seq_lengths` must be int32, got bool"),
    (DENSE, {"key_value_seq_lengths": ints(1, 2, 3)}, ValueError, r"`key_value_seq_lengths` .*\[2\], got \[3\]"),
    (DENSE, {"query_segment_ids": ones(2, 6, dtype=I32)}, ValueError, "`key_value_segment_ids` must be given together"),
    (
        DENSE,
        {"query_segment_ids": ones(2, 6, dtype=I32), "key_value_segment_ids": ones(2, 6, dtype=I32)},
        ValueError,
        r"`key_value_segment_ids` must have shape .*\[2, 7\], got \[2, 6\]",
    ),
    (
        DENSE,
        {"query_segment_ids": ones(2, 6), "key_value_segment_ids": ones(2, 7)},
        ValueError,
        "`query_segment_ids` must be int32, got float32",
    ),
    # Dropout
    (DENSE, {"dropout_rate": 1.0}, ValueError, r"`dropout_rate` must be in \[0, 1\), got 1.0"),
    (DENSE, {"dropout_rate": -0.1}, ValueError, r"`dropout_rate` must be in \[0, 1\), got -0.1"),
    (DENSE, {"dropout_rate": NAN}, ValueError, r"`dropout_rate` must be in \[0, 1\), got nan"),
    (DENSE, {"dropout_rate": None}, ValueError, "`dropout_rate` must be a Python number .* got NoneType"),
    (DENSE, {"dropout_rate": jnp.float32(0.1)}, ValueError, "`dropout_rate` must be a Python number known when"),
    (DENSE, {"dropout_rate": 0.1}, ValueError, "`dropout_key` is needed with dropout_rate = 0.1: .*jax.random.key"),
    (DENSE, {"dropout_rate": 0.1, "dropout_key": 0}, ValueError, r"`dropout_key` .* got int32 of shape \[\]"),
    (DENSE, {"dropout_rate": 0.1, "dropout_key": "x"}, ValueError, "`dropout_key` must be an array, got 'x'"),
    (
        DENSE,
        {"dropout_rate": 0.1, "dropout_key": jax.random.split(KEY, 3)},
        ValueError,
        r"`dropout_key` must be one key .* got key<fry> of shape \[3\]",
    ),
    (
        DENSE,
        {"dropout_rate": 0.1, "dropout_key": ones(3, 2, dtype=jnp.uint32)},
        ValueError,
        r"`dropout_key` must be one key .* got uint32 of shape \[3, 2\]",
    ),
    (DENSE, {"dropout_rate": 0.1, "dropout_key": ints(1, 2)}, ValueError, r"`dropout_key` .* got int32 of shape \[2\]"),
    # dot_product_attention
    (JAX_NN, {"implementation": "xla"}, NotImplementedError, "`implementation` must be None, got 'xla'"),
    (JAX_NN, {"query": None}, ValueError, "`query` must be an array, got None"),
    (JAX_NN, {"query": ones(4, 8)}, ValueError, "`query` must have at least 3 axes"),
    (JAX_NN, {"bias": ones(3, 7)}, ValueError, r"`bias` must have shape .*\[2, 4, 6, 7\].* got .*3, 7\]"),
    (JAX_NN, {"bias": ones(2, 2, 4, 6, 7)}, ValueError, r"`bias` must have shape .* got \[2, 2, 4, 6, 7\]"),
    (JAX_NN, {"mask": ones(6, 7)}, ValueError, "`mask` must be bool"),
    (JAX_NN, {"mask": True}, ValueError, "`mask` must be an array, got True"),
    (JAX_NN, {"return_residual": 1}, ValueError, "`return_residual` must be True or False"),
    # flash_attention_varlen
    (VARLEN, {"query": Q}, ValueError, r"`query` must have shape \[total, heads, head_dim\].* got \[2, 6, 4, 8\]"),
    (VARLEN, {"key": KV, "value": KV}, ValueError, r"`key` .*\[total, heads, head_dim\].* got \[2, 7, 2, 8\]"),
    (VARLEN, {"cu_seqlens_q": OFFSETS_Q * 1.0}, ValueError, "`cu_seqlens_q` must be int32, got float32"),
    (VARLEN, {"cu_seqlens_q": OFFSETS_Q[None]}, ValueError, r"`cu_seqlens_q` .* shape \[B \+ 1\].* got \[1, 3\]"),
    (VARLEN, {"cu_seqlens_q": ints()}, ValueError, r"`cu_seqlens_q` must hold at least one offset .* got shape \[0\]"),
    (VARLEN, {"cu_seqlens_q": None}, ValueError, "`cu_seqlens_q` must be an array, got None"),
    (VARLEN, {"cu_seqlens_kv": ints(0, 5)}, ValueError, r"`cu_seqlens_kv` .*\[B \+ 1\] = \[3\], got \[2\]"),
    (VARLEN, {"max_seqlen_q": None}, ValueError, "`max_seqlen_q` must be a Python int from 0 .* got None"),
    (VARLEN, {"max_seqlen_q": jnp.int32(6)}, ValueError, "`max_seqlen_q` must be a Python int .* known when tracing"),
    (VARLEN, {"max_seqlen_kv": -1}, ValueError, "`max_seqlen_kv` must be a Python int from 0 .* got -1"),
    (VARLEN, {"max_seqlen_kv": 7.0}, ValueError, "`max_seqlen_kv` must be a Python int .* got float: 7.0"),
    (VARLEN, {"max_seqlen_kv": True}, ValueError, "`max_seqlen_kv` must be a Python int .* got bool: True"),
    (VARLEN, {"seqused_kv": OFFSETS_Q}, ValueError, r"`seqused_kv` must have shape \[B\] = \[2\], got \[3\]"),
    (VARLEN, {"alibi_slopes": ones(3, 4)}, ValueError, r"`alibi_slopes` must have shape .*\[2, 4\], got \[3, 4\]"),
    # paged_attention
    (PAGED, dict.fromkeys(_KV_PAGES, PACKED_KV), ValueError, r"`key_pages` .*page_size, K, H\].* \[12, 2, 8\]"),
    (PAGED, dict.fromkeys(_KV_PAGES, ones(5, 0, 2, 8)), ValueError, "`key_pages` .* page size of at least 1"),
    (PAGED, {"value_pages": PAGES[1:]}, ValueError, "key_pages and value_pages must agree"),
    (PAGED, {"query": PACKED_Q}, ValueError, r"`query` .*\[B, T, N, H\] \(without cu_seqlens_q\).* got \[10, 4, 8\]"),
    (PAGED, {"cu_seqlens_q": OFFSETS_Q, "max_seqlen_q": 6}, ValueError, r"`query` .*\[total_q, N, H\] \(with cu_"),
    (PAGED, {"query": PACKED_Q, "cu_seqlens_q": OFFSETS_Q}, ValueError, "`max_seqlen_q` .* Python int .* got None"),
    (PAGED, {"max_seqlen_q": 6}, ValueError, "`max_seqlen_q` goes with `cu_seqlens_q`"),
    (PAGED, {"page_table": TABLE * 1.0}, ValueError, "`page_table` must be int32, got float32"),
    (PAGED, {"page_table": TABLE[:1]}, ValueError, r"`page_table` must have shape \[B, max_pages\] = .* got \[1, 3\]"),
    (PAGED, {"key_value_seq_lengths": ints(1)}, ValueError, r"`key_value_seq_lengths` .*\[B\] = \[2\], got \[1\]"),
    (PAGED, {"num_splits": 0}, ValueError, "`num_splits` must be a Python int from 1 .* got 0"),
    # flash_api, in its own names
    (FWD, {"q": None}, ValueError, "`q` must be an array, got None"),
    (FWD, dict.fromkeys("qkv", ones(6, 4, 8)), ValueError, r"`q` must have shape \[B, T, N, H\].* got \[6, 4, 8\]"),
    (FWD, {"v": KV.astype(jnp.float16)}, ValueError, "q, k and v must have one dtype"),
    (FWD, {"softcap": -1.0}, ValueError, "`softcap` must be positive.* got -1"),
    (FWD, {"softcap": jnp.float32(3)}, ValueError, "`softcap` must be a Python number known when tracing"),
    (FWD, {"softcap": ""}, ValueError, "`softcap` must be a Python number .* got str"),
    (FWD, {"softmax_scale": NAN}, ValueError, "`softmax_scale` must be finite.* got nan"),
    (FWD, {"window_size_left": -2}, ValueError, "`window_size_left` must be .* got -2"),
    (FWD, {"window_size_right": 1.5}, ValueError, "`window_size_right` must be .* got float: 1.5"),
    (FWD, {"p_dropout": 1.0}, ValueError, r"`p_dropout` must be in \[0, 1\), got 1.0"),
    (FWD, {"p_dropout": 0.1}, ValueError, "`dropout_key` is needed with p_dropout = 0.1"),
    (FWD, {"p_dropout": 0.1, "philox_seed": uints(1, 2)}, ValueError, "`philox_offset` must be given together"),
    (FWD, {"philox_seed": uints(1, 2), "philox_offset": uints(1)[0], "dropout_key": KEY}, ValueError, "not both"),
    (FWD, {"philox_seed": uints(1), "philox_offset": uints(1)[0]}, ValueError, r"`philox_seed` .*\[2\], got \[1\]"),
    (FWD, {"philox_seed": ints(1, 2), "philox_offset": uints(1)[0]}, ValueError, "`philox_seed` .* uint32, got int32"),
    (FWD, {"philox_seed": uints(1, 2), "philox_offset": 0}, ValueError, "`philox_offset` must be uint32, got int32"),
    (FWD, {"philox_seed": uints(1, 2), "philox_offset": uints(0)}, ValueError, r"`philox_offset` .*\[\], got \[1\]"),
    (FWD, {"return_softmax": 1}, ValueError, "`return_softmax` must be True or False"),
    (VARLEN_FWD, {"q": Q}, ValueError, r"`q` must have shape \[total_q, N, H\]"),
    (VARLEN_FWD, {"k": PAGES, "v": PAGES}, ValueError, r"`k` must have shape .*\(without block_table\)"),
    (VARLEN_FWD, {"block_table": TABLE}, ValueError, r"`k` must have shape .*\(with block_table\)"),
    (VARLEN_FWD, {**_PAGED, "block_table": TABLE * 1.0}, ValueError, "`block_table` must be int32, got float32"),
    (VARLEN_FWD, {**_PAGED, "cu_seqlens_k": None}, ValueError, "one of `seqused_k` and `cu_seqlens_k` is needed"),
    (VARLEN_FWD, {**_PAGED, "k": ones(5, 0, 2, 8), "v": ones(5, 0, 2, 8)}, ValueError, "`k` .* at least 1"),
    (VARLEN_FWD, {"cu_seqlens_k": None}, ValueError, "`cu_seqlens_k` is needed"),
    (VARLEN_FWD, {"cu_seqlens_k": ints(0, 1)}, ValueError, r"`cu_seqlens_k` must have shape .*\[3\], got \[2\]"),
    (VARLEN_FWD, {"seqused_k": OFFSETS_Q}, ValueError, r"`seqused_k` must have shape \[B\] = \[2\], got \[3\]"),
    (VARLEN_FWD, {"max_seqlen_q": None}, ValueError, "`max_seqlen_q` must be a Python int"),
    (VARLEN_FWD, {"max_seqlen_k": None}, ValueError, "`max_seqlen_k` must be a Python int"),
    (BWD, {"dout": Q[:1]}, ValueError, r"`dout` must have shape .*\[2, 6, 4, 8\], got \[1, 6, 4, 8\]"),
    (BWD, {"out": Q.astype(jnp.float16)}, ValueError, "`out` must be float32, got float16"),
    (BWD, {"softmax_lse": ones(2, 6, 4)}, ValueError, r"`softmax_lse` must have shape .*\[2, 4, 6\], got \[2, 6, 4\]"),
    (BWD, {"softmax_lse": ones(2, 4, 6, dtype=jnp.float16)}, ValueError, "`softmax_lse` must be float32, got float16"),
    (BWD, {"deterministic": 1}, ValueError, "`deterministic` must be True or False"),
    (BWD, {"p_dropout": 0.1}, ValueError, "`philox_seed` .*needed with p_dropout = 0.1"),  # it takes no dropout_key
    (VARLEN_BWD, {"cu_seqlens_k": None}, ValueError, "`cu_seqlens_k` "),
    (VARLEN_BWD, {"softmax_lse": ones(10, 4)}, ValueError, r"`softmax_lse` must have shape .*\[4, 10\], got \[10, 4\]"),
    (VARLEN_BWD, {"p_dropout": 0.1}, ValueError, "`philox_seed` .*needed with p_dropout = 0.1"),
]  # fmt: skip


def call(function, arguments, jit: bool):
    """``function(**arguments)``; with ``jit`` all arrays among the arguments are traced."""
    is_array = {n: isinstance(x, (jax.Array, np.ndarray)) for n, x in arguments.items()}
    arrays = {n: x for n, x in arguments.items() if is_array[n]}
    rest = {n: x for n, x in arguments.items() if not is_array[n]}
    return (jax.jit if jit else lambda f: f)(lambda arrays: function(**arrays, **rest))(arrays)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("function, arguments", FUNCTIONS, ids=lambda x: getattr(x, "__name__", ""))
def test_the_unchanged_arguments_are_right(function, arguments, jit):
    jax.block_until_ready(call(function, arguments, jit))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "function, changes, error, message", WRONG, ids=[f"{c[0][0].__name__}-{'-'.join(c[1])}" for c in WRONG]
)
def test_wrong_arguments(function, changes, error, message, jit):
    function, right = function
    with pytest.raises(error, match=message) as raised:
        call(function, {**right, **changes}, jit)
    assert type(raised.value) is error


RIGHT = [
    (DENSE, {n: np.asarray(x) for n, x in DENSE[1].items()}),
    (DENSE, {n: np.asarray(x).tolist() for n, x in DENSE[1].items()}),
    (DENSE, {"scale": 1}),
    (DENSE, {"scale": np.float64(0.5)}),
    (DENSE, {"scale": fractions.Fraction(1, 3)}),
    (DENSE, {"local_window_size": np.int64(2)}),
    (DENSE, {"local_window_size": [np.int32(2), None]}),
    (DENSE, {"is_causal": np.bool_(True)}),
    (DENSE, {"key_value_seq_lengths": [3, -4]}),
    (DENSE, {"dropout_rate": np.float32(0.1), "dropout_key": KEY}),
    (DENSE, {"dropout_rate": 0.1, "dropout_key": jax.random.PRNGKey(0)}),
    (DENSE, {"dropout_rate": 0.1, "dropout_key": jax.random.key(0, impl="rbg")}),
    (JAX_NN, {n: np.asarray(x).tolist() for n, x in JAX_NN[1].items()}),
    (JAX_NN, {"query": Q[0], "key": KV[0], "value": KV[0], "key_value_seq_lengths": ints(3)}),  # as jax.nn has it
    (VARLEN, {"cu_seqlens_q": [0, 4, 10], "max_seqlen_q": np.int64(6)}),
    (FWD, {"softcap": 0, "window_size_left": np.int32(3)}),
]


@pytest.mark.parametrize("function, changes", RIGHT, ids=[f"{c[0][0].__name__}-{'-'.join(c[1])}" for c in RIGHT])
def test_unusual_arguments_that_are_right(function, changes):
    function, right = function
    jax.block_until_ready(function(**{**right, **changes}))


def test_max_seqlen_must_be_given():
    with pytest.raises(TypeError, match="'max_seqlen_q' and 'max_seqlen_kv'"):
        flash_attention_varlen(PACKED_Q, PACKED_KV, PACKED_KV, OFFSETS_Q, OFFSETS_KV)


def test_float64_and_int64(rng):
    """With JAX's 64-bit mode on, what comes from Python and NumPy has 64 bits."""
    with jax.enable_x64(True):
        with pytest.raises(NotImplementedError, match=r"`query` has dtype float64; supported are float32.*Cast"):
            flash_attention(*(np.zeros((4, 2, 8)),) * 3)
        with pytest.raises(ValueError, match="`key_value_seq_lengths` must be int32, got int64"):
            flash_attention(Q, KV, KV, key_value_seq_lengths=np.array([3, 4]))


# ---- derivatives that do not exist (tests/test_transforms.py has them in every context) ----

FORWARD_MODE = "forward-mode .* not implemented .* use reverse mode"
TWICE = "differentiable once"
PAGED_GRADIENT = "paged attention .* has no gradient.* flash_attention_varlen"


def jvp(function, x):
    return jax.jvp(function, (x,), (x,))


def grad(function, x):
    return jax.grad(function)(x)


def grad_of_grad(function, x):
    return grad(lambda x: grad(function, x).sum(), x)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "differentiate, function, argument, message",
    [
        (jvp, DENSE, {"query": Q}, FORWARD_MODE),
        (jvp, DENSE, {"bias": ones(1, 1, 6, 7)}, FORWARD_MODE),
        (jvp, DENSE, {"sinks": ones(4)}, FORWARD_MODE),
        (jvp, DENSE, {"alibi_slopes": ones(4)}, FORWARD_MODE),
        (jvp, JAX_NN, {"key": KV}, FORWARD_MODE),
        (jvp, VARLEN, {"value": PACKED_KV}, FORWARD_MODE),
        (jvp, FWD, {"q": Q}, FORWARD_MODE),
        (jvp, PAGED, {"query": Q}, PAGED_GRADIENT),
        (grad, PAGED, {"key_pages": PAGES}, PAGED_GRADIENT),
        (grad, (flash_api.mha_varlen_fwd, {**_PACKED, **_PAGED}), {"q": PACKED_Q}, PAGED_GRADIENT),
        (grad, BWD, {"q": Q}, TWICE),
        (grad, VARLEN_BWD, {"dout": PACKED_Q}, TWICE),
        (grad_of_grad, DENSE, {"query": Q}, TWICE),
        (grad_of_grad, VARLEN, {"query": PACKED_Q}, TWICE),
    ],
)
def test_missing_derivatives(differentiate, function, argument, message, jit):
    function, right = function
    ((name, x),) = argument.items()

    def total(x):
        return jax.tree.leaves(function(**{**right, name: x}))[0].sum()

    with pytest.raises(NotImplementedError, match=message):
        (jax.jit if jit else lambda f: f)(lambda x: differentiate(total, x))(x)
