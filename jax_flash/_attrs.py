"""What a call is made of: the static half (``Attrs``) and the names, order and axes of its array operands.

``Attrs`` and ``OPERANDS`` mirror ``cpp/ffi/attrs.h`` (tests/test_attrs.py). Whatever may change from step to step, such
as lengths or the dropout key, is an operand, so that it never causes a recompilation.
"""

from __future__ import annotations

import dataclasses

import numpy as np

NO_DROPOUT = 256
MAX_HEAD_DIM = 256
MAX_BATCH_AXES = 8
# Where a bias has one row for all queries, or one column for all keys, the call that forms its gradient sums over
# blocks of so many, and leaves it to JAX to sum over the blocks: kBiasBlock in C++.
BIAS_BLOCK = 64

# Axes of each operand behind its batch axes, which the query has in front of [T, N, H]:
#   T, S query and key rows; N, K query and key heads; H, D head dims of key and value;
#   B sequences of a packed batch, C = B + 1; M pages of a table row; P pages, R rows of a page; W four words.
# Axes in lower case may have size 1 and are then broadcast, as may all batch axes but the query's. Where packed and
# paged calls differ is in `operand_axes`.
OPERANDS = {
    "query": "TNH",
    "key": "SKH",
    "value": "SKD",
    "bias": "nts",
    "mask": "nts",
    "alibi_slopes": "N",
    "sinks": "N",
    "query_seq_lengths": "",
    "key_value_seq_lengths": "",
    "query_segment_ids": "T",
    "key_value_segment_ids": "S",
    "cu_seqlens_q": "C",
    "cu_seqlens_kv": "C",
    "page_table": "M",
    "dropout_stream": "NW",
    # Of the backward call, and all but `out` and `d_lse` of the bias gradient's:
    "out": "TND",
    "lse": "NT",
    "d_out": "TND",
    "d_lse": "NT",
    # Of the bias gradient's call only:
    "delta": "NT",
}


@dataclasses.dataclass(frozen=True)
class Attrs:
    """The static half of a call; every field selects code or is a number compiled into it.

    Attributes:
      scale: factor of the scores.
      logits_soft_cap: the cap, 0 for none.
      window_left: keys visible to the left of the diagonal, -1 for all.
      window_right: likewise to the right; causal is 0.
      bottom_right: the diagonal ends at the last query and key; otherwise it starts at the first ones.
      keep_threshold: an element is kept iff its random byte is below this; 256 for no dropout.
      deterministic: the backward pass must be bitwise reproducible.
      return_softmax: the forward pass also returns the probabilities.
      max_seqlen_q: static bound on the length of a packed query sequence; 0 if not packed.
      max_seqlen_kv: likewise for keys.
      num_splits: parts of the keys that a paged call treats in parallel; 0 leaves the choice to the implementation.
    """

    scale: float
    logits_soft_cap: float = 0.0
    window_left: int = -1
    window_right: int = -1
    bottom_right: bool = True
    keep_threshold: int = NO_DROPOUT
    deterministic: bool = False
    return_softmax: bool = False
    max_seqlen_q: int = 0
    max_seqlen_kv: int = 0
    num_splits: int = 0


def ffi_attributes(attrs: Attrs, operands: tuple[str, ...]) -> dict[str, np.generic | bool]:
    """Attributes of the custom call, of the exact types that ``cpp/ffi/attrs.h`` decodes."""
    to_ffi = {"float": np.float32, "int": np.int32, "bool": bool}
    names = list(OPERANDS)
    present = sum(1 << names.index(name) for name in operands)
    return {
        "operands": np.int32(present),
        **{f.name: to_ffi[str(f.type)](getattr(attrs, f.name)) for f in dataclasses.fields(attrs)},
    }


def operand_axes(name: str, operands: tuple[str, ...]) -> str:
    """Axes of operand ``name`` behind the batch axes, in a call that has ``operands``."""
    packed, paged = "cu_seqlens_q" in operands, "page_table" in operands
    if paged and name in ("key", "value"):
        return "PR" + OPERANDS[name][1:]
    if packed and name in ("query_seq_lengths", "key_value_seq_lengths", "page_table"):
        return "B" + OPERANDS[name]
    if packed and name == "alibi_slopes":
        return "bN"
    return OPERANDS[name]


def forward_axes(attrs: Attrs, operands: tuple[str, ...]) -> dict[str, str]:
    """Results of the forward call and their axes."""
    results = {"out": "TND", "lse": "NT"}
    if attrs.return_softmax:
        results["probs"] = "BNXY" if "cu_seqlens_q" in operands else "NTS"  # X, Y: max_seqlen_q, max_seqlen_kv
    return results


def forward_scratch_axes() -> dict[str, str]:
    """Scratch arrays of the forward call's CUDA kernels, behind its results; FwdProblem in C++ has their meaning."""
    return {"next_unit": ""}


def backward_axes() -> dict[str, str]:
    """Results of the backward call and their axes."""
    return {"query": "TNH", "key": "SKH", "value": "SKD", "delta": "NT"}


def backward_scratch_axes(attrs: Attrs) -> dict[str, str]:
    """Likewise of the backward call.

    U is the number of 16-row blocks of dq_accum, F that of floats in one; G and E likewise those of the blocks of 128
    rows of statistics.
    """
    tickets = {"tickets": "NT"} if attrs.deterministic else {}
    return {"dq_accum": "NUF", "statistics": "NGE", "next_unit": "", **tickets}


def bias_gradient_axes() -> dict[str, str]:
    """Result of the bias gradient's call: the bias's own axes, of which I and J may be blocks of rows and columns."""
    return {"bias": "nIJ"}


def bias_gradient_type(bias: tuple[int, ...], dtype: np.dtype, scores: tuple[int, int]) -> tuple[tuple, np.dtype]:
    """Its shape and dtype: the bias's own, or float32 sums over blocks where it has one row or column for all.

    Args:
      bias: the shape of the bias.
      dtype: its dtype.
      scores: numbers of queries and keys.
    """
    shape = tuple(-(-n // BIAS_BLOCK) if size == 1 else size for size, n in zip(bias[-2:], scores, strict=True))
    return (*bias[:-2], *shape), np.dtype(np.float32) if 1 in bias[-2:] else dtype
