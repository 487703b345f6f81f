"""Every row of the heuristics table, compiled for every architecture by the NVRTC of PyPI: no GPU is needed.

Fails on errors, on warnings, on shared memory that an architecture does not have, and where more
registers are spilled than a table says.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from jax_flash import _core


def why_no_nvrtc() -> str | None:
    try:
        _core.nvrtc_version()
    except RuntimeError as error:
        return str(error)
    return None


pytestmark = pytest.mark.skipif(why_no_nvrtc() is not None, reason=f"needs nvidia-cuda-nvrtc: {why_no_nvrtc()}")

FORWARD, BACKWARD, DBIAS = 0, 1, 2
F32, BF16, F16 = 0, 1, 2
PORTABLE, HOPPER = 0, 1
DIRECTIONS = {FORWARD: "forward", BACKWARD: "backward"}
NAMES = DIRECTIONS | {DBIAS: "gradient of the bias"}
DTYPES = {BF16: "bfloat16", F16: "float16"}

# Bytes of shared memory that a thread block may ask for: the CUDA C++ Programming Guide's table of technical
# specifications per compute capability.
SHARED_LIMITS = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90a": 227 * 1024,
    "sm_100a": 227 * 1024,
    "sm_120a": 99 * 1024,
}

CLASSES = (32, 64, 96, 128, 192, 256)  # of head dims, as tiled

BIAS = {"bias": 1, "bias_dtype": BF16, "paired": 1, "bias_tiled": 1}
FEATURES: dict[str, dict[str, int]] = {
    "softcap": {"softcap": 1},
    "alibi": {"alibi": 1},
    "bias": BIAS,
    "bias float32": {"bias": 1, "bias_dtype": F32, "paired": 1, "bias_tiled": 0},
    "bias of queries": {"bias": 1, "bias_dtype": F16, "bias_tiled": 0},  # one for all keys
    "mask": {"mask": 1, "mask_wide": 1, "paired": 1},
    "mask of odd rows": {"mask": 1},
    "segments": {"segments": 1},
    "dropout": {"dropout": 1},
    "scale below 0, two batch axes": {"positive_scale": 0, "num_batch_axes": 2},
    "unaligned": {"aligned": 0},
    "paged": {"paged": 1},
    "return_softmax": {"return_softmax": 1, "dropout": 1},
    "deterministic": {"deterministic": 1},
    "large blocks": {"large_blocks": 1},
    "all": {"softcap": 1, "alibi": 1, "bias": 1, "mask": 1, "segments": 1, "dropout": 1, "num_batch_axes": 2},
}
ONLY = {"paged": FORWARD, "return_softmax": FORWARD, "large blocks": FORWARD, "deterministic": BACKWARD}


class Case(NamedTuple):
    arch: str
    direction: int
    head_dim: int
    head_dim_v: int
    feature: str | None = None
    dtype: int = BF16
    family: int = PORTABLE

    def __str__(self) -> str:
        dims = f"{self.head_dim}x{self.head_dim_v}"
        family = " hopper" if self.family == HOPPER else ""
        return f"{self.arch}{family} {NAMES[self.direction]} {DTYPES[self.dtype]} {dims} {self.feature or 'plain'}"

    def config(self) -> dict[str, int]:
        facts = {
            "direction": self.direction,
            "dtype": self.dtype,
            "head_dim": self.head_dim,
            "head_dim_v": self.head_dim_v,
            "num_batch_axes": 1,
            "positive_scale": 1,
            "aligned": int(self.head_dim % 8 == 0 and self.head_dim_v % 8 == 0),
        }
        if self.direction == DBIAS:
            facts |= BIAS
        facts |= FEATURES.get(self.feature or "", {})
        if self.family == HOPPER:
            facts["num_batch_axes"] = 1
        _core.override_config({"family": self.family})
        try:
            return _core.configure(facts, self.arch)
        finally:
            _core.override_config({})


def features(direction: int) -> list[str]:
    return [name for name in FEATURES if ONLY.get(name, direction) == direction]


CASES = [Case(arch, d, dim, dim) for arch in SHARED_LIMITS for dim in CLASSES for d in DIRECTIONS]
# Unequal head dims, and rows that do not start on 16 bytes.
CASES += [Case(arch, d, *dims) for arch in ("sm_80", "sm_90a") for dims in ((192, 128), (111, 111)) for d in DIRECTIONS]
CASES += [Case("sm_80", d, 64, 64, dtype=F16) for d in DIRECTIONS]
# All features once, and with the least shared memory what takes the most of it, or of registers.
HEAVY = ("bias", "dropout", "deterministic", "paged", "all")
CASES += [
    Case(arch, d, dim, dim, feature)
    for arch, dim in (("sm_80", 128), ("sm_86", 128), ("sm_86", 256))
    for d in DIRECTIONS
    for feature in features(d)
    if feature in HEAVY or ((arch, dim) == ("sm_80", 128) and feature != "large blocks")
]

# What Hopper's own kernels leave to these.
PORTABLE_ONLY = ("unaligned", "paged", "return_softmax", "scale below 0, two batch axes")
CASES += [
    Case("sm_90a", d, 128, 128, feature) for d in DIRECTIONS for feature in features(d) if feature in PORTABLE_ONLY
]
CASES += [Case("sm_90a", FORWARD, dim, dim, "paged") for dim in (64, 256)]

# The portable gradient of a bias.
CASES += [Case(arch, DBIAS, dim, dim) for arch in ("sm_80", "sm_86", "sm_90a") for dim in CLASSES]
DBIAS_FEATURES = [f for f in features(BACKWARD) if f not in ("bias", "deterministic")]
CASES += [Case("sm_90a", DBIAS, 128, 128, feature) for feature in DBIAS_FEATURES]
CASES += [Case(arch, DBIAS, 256, 256, "all") for arch in ("sm_86", "sm_90a")]
CASES += [Case("sm_80", DBIAS, *dims, dtype=F16) for dims in ((192, 128), (111, 111))]

# Hopper's own kernels.
HOPPER_CASES = [
    Case("sm_90a", d, dim, dim_v, family=HOPPER)
    for dim, dim_v in ((32, 32), (64, 64), (96, 96), (128, 128), (192, 192), (192, 128), (256, 256))
    for d in DIRECTIONS
]
HOPPER_CASES += [
    Case("sm_90a", d, 128, 128, feature, family=HOPPER)
    for d in DIRECTIONS
    for feature in features(d)
    if feature not in PORTABLE_ONLY and feature not in ("bias of queries", "large blocks")
]
HOPPER_CASES += [Case("sm_90a", d, 64, 64, "dropout", F16, HOPPER) for d in DIRECTIONS]
HOPPER_CASES += [Case("sm_90a", d, 64, 64, "bias", family=HOPPER) for d in DIRECTIONS]
# The backward with the fewest registers to spare.
HOPPER_CASES += [Case("sm_90a", BACKWARD, 64, 64, "deterministic", family=HOPPER)]
HOPPER_CASES += [Case("sm_90a", BACKWARD, 64, 40, None, F16, HOPPER)]
LARGE = ((64, 64), (96, 96), (128, 128), (64, 128))
HOPPER_CASES += [Case("sm_90a", FORWARD, *dims, "large blocks", family=HOPPER) for dims in LARGE]
# As many keys a block as beside 128 columns of Q, and a bias that has tiles.
HOPPER_CASES += [Case("sm_90a", FORWARD, 192, 128, f, family=HOPPER) for f in ("segments", "dropout", "all")]
HOPPER_CASES += [Case("sm_90a", FORWARD, 192, 32, "bias", family=HOPPER)]
# Blocks of keys of which a bias has no tiles, though there would be room; and pairs of thread blocks.
HOPPER_CASES += [Case("sm_90a", FORWARD, 256, 128, "bias", family=HOPPER)]
HOPPER_CASES += [Case("sm_90a", BACKWARD, 192, 192, "bias", family=HOPPER)]
HOPPER_CASES += [
    Case("sm_90a", BACKWARD, 256, 256, feature, family=HOPPER)
    for feature in ("softcap", "segments", "dropout", "deterministic", "all")
]
HOPPER_CASES += [Case("sm_90a", BACKWARD, *dims, None, F16, HOPPER) for dims in ((32, 256), (256, 32), (96, 192))]
# The gradient of a bias whose tiles may be copied.
HOPPER_CASES += [Case("sm_90a", DBIAS, *dims, family=HOPPER) for dims in ((32, 32), (64, 64), (96, 40), (128, 128))]
HOPPER_CASES += [
    Case("sm_90a", DBIAS, 128, 128, feature, family=HOPPER)
    for feature in DBIAS_FEATURES
    if feature not in PORTABLE_ONLY and feature not in ("bias float32", "bias of queries")
]
HOPPER_CASES += [Case("sm_90a", DBIAS, 64, 64, "dropout", F16, HOPPER)]


# A thread has 255 registers. What does not fit is to be scalars outside of the main loops (pointers, strides, lengths
# for the epilogue), and a few inside whose latency the products hide. Bytes of loads or stores in all of a kernel, by
# feature, as measured with NVRTC 13.5 and with some slack, as compilers differ:
SPILLED_BYTES = {
    "all": 1400,  # the most pointers and strides
    # Addresses and elements of many scores are at hand at once.
    "bias float32": 600,
    "bias of queries": 600,
    "mask": 600,
}
OTHER_SPILLED_BYTES = 520  # 456, most of it loads in front of the main loop
# Of the instructions in a step of the main loop, those that load or store what was spilled: 2.6 % with all operands at
# once, mostly below 1 %.
SHARE_IN_STEP = 0.03


def product_instructions(c: dict[str, int]) -> int:
    """Of a warp's step of the main loop: block_q queries by block_kv keys, in pieces of 16 x 8 x 16."""
    dims = 3 * c["head_dim"] + 2 * c["head_dim_v"] if c["direction"] == BACKWARD else c["head_dim"] + c["head_dim_v"]
    return c["block_q"] * c["block_kv"] * dims // (16 * 8 * 16 * c["num_warps"])


def section_of(elf: bytes, name: bytes) -> bytes:
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    # Of each: name (in the section of names), type, flags, address, offset, size.
    sections = [struct.unpack_from("<IIQQQQ", elf, table + size * i) for i in range(count)]
    for section in sections:
        start = sections[names][4] + section[0]
        if elf[start : elf.index(b"\0", start)] == name:
            return elf[section[4] : section[4] + section[5]]
    raise AssertionError(f"no section {name!r}")


# From sm_80 to sm_120 an instruction takes 16 bytes and has its operation in the lowest 12 bits (nvdisasm prints both).
HMMA, STORE_LOCAL, LOAD_LOCAL = 0x23C, 0x387, 0x983
HGMMA = 0x1F0  # in the lowest 10
LOAD_SHARED, STORE_MATRIX = 0x984, 0x844
STORE_GLOBAL, STORED_BYTES = 0x986, (1, 1, 2, 2, 4, 8, 16)
ENTRIES = {FORWARD: b"jax_flash_fwd", BACKWARD: b"jax_flash_bwd", DBIAS: b"jax_flash_dbias"}


def share_of_local_memory(cubin: bytes, c: dict[str, int]) -> float:
    """Of the main loop's steps, between their first and last product, in the one with the least.

    There are two steps in the code, or one: with the positional mask, and without it, which is the one that counts.
    """
    code = section_of(cubin, b".text." + ENTRIES[c["direction"]])
    operations = [word & 0xFFF for word, _ in struct.iter_unpack("<QQ", code)]
    products = [i for i, operation in enumerate(operations) if operation == HMMA]
    size = product_instructions(c)
    assert len(products) in (size, 2 * size), "a loop that should be unrolled is not, or is not one any more"
    shares = []
    for first in range(0, len(products), size):
        step = operations[products[first] : products[first + size - 1] + 1]
        shares.append((step.count(STORE_LOCAL) + step.count(LOAD_LOCAL)) / len(step))
    return min(shares)


def stored_bytes(cubin: bytes, entry: bytes) -> set[int]:
    """How many a thread writes to global memory at a time."""
    words = struct.iter_unpack("<QQ", section_of(cubin, b".text." + entry))
    return {STORED_BYTES[upper >> 9 & 7] for lower, upper in words if lower & 0xFFF == STORE_GLOBAL}


def assert_dq_is_stored_16_bytes_at_a_time(cubin: bytes) -> None:
    """Compilers like to split vectors. Rows of no sequence are zeroed element by element."""
    assert stored_bytes(cubin, b"jax_flash_bwd_postprocess") == {16, 2}


# The limits below are this compiler's.
LIMITS_HOLD = why_no_nvrtc() is None and _core.nvrtc_version().startswith("13.")


def compiled(config: dict[str, int], arch: str) -> tuple[bytes, str, list[int]]:
    """Machine code, log, and bytes of spilled stores and loads of all entry points; fails on errors and warnings."""
    bound = f"static_assert(flash::shared_bytes(kConfig) <= {SHARED_LIMITS[arch]});\n"
    cubin, log = _core.nvrtc_compile(_core.kernel_source(config) + bound, arch, ["--ptxas-options=-v", "--no-cache"])
    assert cubin, log
    assert not re.search(r"\bwarning\b", log, re.IGNORECASE), log
    return cubin, log, [int(x) for x in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(case):
    config = case.config()
    cubin, log, spills = compiled(config, case.arch)
    if not LIMITS_HOLD:
        return
    assert len(spills) == (6 if case.direction == BACKWARD else 2), log
    assert max(spills) <= SPILLED_BYTES.get(case.feature or "", OTHER_SPILLED_BYTES)
    if case.direction == BACKWARD and config["aligned"]:
        assert_dq_is_stored_16_bytes_at_a_time(cubin)
    if case.feature != "return_softmax":  # a testing aid, which takes the scores a second time
        assert share_of_local_memory(cubin, config) <= SHARE_IN_STEP


# Bytes as above. Warps that copy have 24 registers in the backward, and spill most of them.
HOPPER_SPILLED_BYTES = {"all": 2400, "segments": 900, "softcap": 600}
OTHER_HOPPER_SPILLED_BYTES = 500
# Pairs of thread blocks have these warps twice.
PAIRED_HOPPER_SPILLED_BYTES = HOPPER_SPILLED_BYTES | {"deterministic": 700}
# The gradient of a bias spills 16 to 52, with ALiBi 196 and with all operands 244: what it knows of its block.
HOPPER_DBIAS_SPILLED_BYTES = {"all": 300, "alibi": 220}
OTHER_HOPPER_DBIAS_SPILLED_BYTES = 120
# Of the instructions between the first and the last product, those that load or store what was spilled: none at all
# without features, but for the forward of 192 and 256.
HOPPER_SHARE = {"all": 0.17, "softcap": 0.065, "dropout": 0.02}
OTHER_HOPPER_SHARE = 0.012
# In a pair, weights are at hand in 16 bits with and without those dropped.
PAIRED_HOPPER_SHARE = HOPPER_SHARE | {"dropout": 0.045}


def hopper_share_of_local_memory(cubin: bytes, c: dict[str, int]) -> float:
    code = section_of(cubin, b".text." + ENTRIES[c["direction"]])
    operations = [word & 0xFFF for word, _ in struct.iter_unpack("<QQ", code)]
    products = [i for i, operation in enumerate(operations) if operation & 0x3FF == HGMMA]
    loops = [products]
    if is_in_pairs(c):  # a loop for each of both thread blocks, far apart
        gap = max(range(1, len(products)), key=lambda i: products[i] - products[i - 1])
        loops = [products[:gap], products[gap:]]
        dq = c["block_kv"] // 16  # in the loop and once behind it, and likewise dK where Q is
        products_of_q = c["head_dim"] // 16 + 2 * (dq + c["block_q"] // 16)
        products_of_do = c["head_dim_v"] // 16 + c["block_q"] // 16 + 2 * dq
        assert sorted(map(len, loops)) == sorted([products_of_q, products_of_do])
    shares = []
    for loop in loops:
        between = operations[loop[0] : loop[-1]]
        shares.append((between.count(STORE_LOCAL) + between.count(LOAD_LOCAL)) / len(between))
    return max(shares)


def is_in_pairs(c: dict[str, int]) -> bool:
    return c["direction"] == BACKWARD and max(c["head_dim"], c["head_dim_v"]) > 128


WAIT_FOR_PRODUCTS, EXPONENTIAL, PACK = 0x9C5, 0x308, 0x23E


def operations_and_waits(cubin: bytes, direction: int) -> Iterator[tuple[int, int | None]]:
    """Operations of the main kernel, and of each wait for products how many groups of them may go on."""
    for lower, upper in struct.iter_unpack("<QQ", section_of(cubin, b".text." + ENTRIES[direction])):
        operation = lower & 0xFFF
        is_wait = operation == WAIT_FOR_PRODUCTS and upper >> 16 & 1  # else it is the fence in front of products
        yield operation, upper >> 8 & 0xFF if is_wait else None


def exponentials_beside_products(cubin: bytes, direction: int) -> list[int]:
    """How many stand between each wait for all products but the last one and the next wait, where some are to run
    beside that product: compilers like to move them behind it."""
    counts, pending = [], None
    for operation, waits in operations_and_waits(cubin, direction):
        if waits is not None:
            pending = waits
            if pending == 1:
                counts.append(0)
        elif operation == EXPONENTIAL and pending == 1:
            counts[-1] += 1
    return counts


def packs_beside_exponentials(cubin: bytes) -> list[tuple[int, int]]:
    """Between a wait for all products and the next product: how many exponentials there are, and how many times two
    weights are packed in front of the last of them."""
    counts: list[tuple[int, int]] = []
    waited, packs = False, 0
    for operation, waits in operations_and_waits(cubin, FORWARD):
        if waits is not None:
            waited, packs = waits == 0, 0
            if waited:
                counts.append((0, 0))
        elif operation & 0x3FF == HGMMA:
            waited = False
        elif waited:
            packs += operation == PACK
            if operation == EXPONENTIAL:
                counts[-1] = (counts[-1][0] + 1, packs)
    return counts


def exponentials_between_halves(cubin: bytes, c: dict[str, int]) -> list[int]:
    """The same where a step of the forward has P V in two halves: between the beginnings of both."""
    code = section_of(cubin, b".text." + ENTRIES[FORWARD])
    operations = [word & 0xFFF for word, _ in struct.iter_unpack("<QQ", code)]
    products = [i for i, operation in enumerate(operations) if operation & 0x3FF == HGMMA]
    qk, pv = c["head_dim"] // 16, c["block_kv"] // 16
    assert len(products) % (qk + pv) == 0
    steps = [products[i : i + qk + pv] for i in range(0, len(products), qk + pv)]
    return [operations[step[qk] : step[qk + pv // 2]].count(EXPONENTIAL) for step in steps]


def queued_behind_products(cubin: bytes) -> tuple[int, int]:
    """What the backward reads from shared memory while any product may be under way, and what it writes between a
    product and the next wait: both take place when those products have begun."""
    reads, writes, pending, issued = 0, 0, False, False
    for operation, waits in operations_and_waits(cubin, BACKWARD):
        is_product = operation & 0x3FF == HGMMA
        pending = waits != 0 and (pending or is_product)
        issued = waits is None and (issued or is_product)
        reads += pending and operation == LOAD_SHARED
        writes += issued and operation == STORE_MATRIX
    return reads, writes


@pytest.mark.parametrize("case", HOPPER_CASES, ids=str)
def test_hopper_kernel(case):
    """Products that ptxas runs one after the other (C7510 and its like) or registers that it does not hand over
    (C7508) cost half of the speed, and it only says so. What is to run beside products must stand beside them."""
    config = case.config()
    assert config["family"] == HOPPER
    cubin, log, spills = compiled(config, case.arch)
    assert not re.search(r"C75\d\d", log), log
    if not LIMITS_HOLD:
        return
    if case.direction == DBIAS:
        assert max(spills) <= HOPPER_DBIAS_SPILLED_BYTES.get(case.feature or "", OTHER_HOPPER_DBIAS_SPILLED_BYTES)
    else:
        if case.direction == BACKWARD:
            assert_dq_is_stored_16_bytes_at_a_time(cubin)
        bounds = PAIRED_HOPPER_SPILLED_BYTES if is_in_pairs(config) else HOPPER_SPILLED_BYTES
        assert max(spills) <= bounds.get(case.feature or "", OTHER_HOPPER_SPILLED_BYTES)
    if case.direction == FORWARD:  # the three steps: a unit's first, and with and without the positional mask
        if config["num_warps"] == 12 and max(config["head_dim"], config["head_dim_v"]) > 64:
            counts = exponentials_between_halves(cubin, config)
            assert len(counts) == 3 and min(counts) >= config["block_kv"] / 8
        else:
            of_steps = [packs for exps, packs in packs_beside_exponentials(cubin) if exps >= config["block_kv"] / 2]
            assert len(of_steps) == 3
            # What dropout takes from the weights lies between; of the first step the results of the last unit may.
            assert config["dropout"] or min(of_steps[1:]) >= config["block_kv"] / 4 * 3 / 4
    elif not is_in_pairs(config):
        counts = exponentials_beside_products(cubin, case.direction)
        # Beside dP^T, but for some of a second half of the queries: beside dV of the first. In pairs of thread blocks
        # they run beside the other warpgroup's products.
        assert counts[0] >= config["block_q"] / 4 and sum(counts) >= config["block_q"] / 2
        if case.direction == BACKWARD and not case.feature:
            # There are registers for the lse of 64 queries, which is read in front.
            assert queued_behind_products(cubin) == (config["block_q"] // 8 - 8, 0)
    shares = PAIRED_HOPPER_SHARE if is_in_pairs(config) else HOPPER_SHARE
    assert hopper_share_of_local_memory(cubin, config) <= shares.get(case.feature or "", OTHER_HOPPER_SHARE)


@pytest.mark.parametrize("override", [{"family": PORTABLE}, {"family": HOPPER}, {}], ids=str)
@pytest.mark.parametrize(
    "facts, arch, is_for_hopper",
    [
        ({}, "sm_90a", True),
        ({}, "sm_80", False),
        ({}, "sm_100a", False),
        ({"paged": 1}, "sm_90a", False),
        ({"return_softmax": 1}, "sm_90a", False),
        ({"num_batch_axes": 2}, "sm_90a", False),
        ({"aligned": 0}, "sm_90a", False),
        ({"head_dim_v": 0}, "sm_90a", False),
        ({"direction": DBIAS} | BIAS, "sm_90a", True),
        ({"direction": DBIAS} | BIAS, "sm_80", False),
        ({"direction": DBIAS} | BIAS | {"bias_tiled": 0}, "sm_90a", False),
        ({"direction": DBIAS} | BIAS | {"head_dim_v": 136}, "sm_90a", False),
    ],
)
def test_what_hopper_leaves_to_the_portable_kernels(facts, arch, is_for_hopper, override):
    facts = {"dtype": BF16, "head_dim": 64, "head_dim_v": 64, "num_batch_axes": 1, "aligned": 1} | facts
    _core.override_config(override | {"min_blocks": 7})
    try:
        config = _core.configure(facts, arch)
    finally:
        _core.override_config({})
    assert config["family"] == (HOPPER if is_for_hopper and override != {"family": PORTABLE} else PORTABLE)
    assert config["min_blocks"] == 7 and _core.configure(facts, arch)["min_blocks"] != 7


def test_no_override_of_what_is_no_field():
    with pytest.raises(ValueError, match="an unknown field of KernelConfig"):
        _core.override_config({"colour": 1})


TILING = ("block_q", "block_kv", "num_warps", "warps_d", "num_stages", "min_blocks", "head_dim", "head_dim_v")


def test_every_head_dim_has_a_tiling_of_those_compiled():
    """Of calls without features, and with one head dim for all."""
    plain = [case for case in CASES if case.feature is None and case.head_dim == case.head_dim_v]
    for arch, direction in itertools.product(SHARED_LIMITS, DIRECTIONS):
        known = [case.config() for case in plain if (case.arch, case.direction) == (arch, direction)]
        compiled = {tuple(c[name] for name in TILING) for c in known}
        for dim in range(1, 257):
            c = Case(arch, direction, dim, dim, None if dim % 8 == 0 else "unaligned").config()
            if c["aligned"]:
                assert tuple(c[name] for name in TILING) in compiled
            assert c["head_dim"] in CLASSES and c["head_dim"] >= dim
            assert c["exact"] == (c["head_dim"] == dim)


def test_shared_memory_suffices_for_all_head_dims_and_features():
    """Also for pairs of head dims that no test compiles; the kernels themselves hold their storage to shared_bytes."""
    asserts = set()
    families = [(arch, PORTABLE) for arch in SHARED_LIMITS] + [("sm_90a", HOPPER)]
    for (arch, family), direction, dim, dim_v in itertools.product(families, NAMES, CLASSES, CLASSES):
        for feature in (None, *features(direction)):
            config = Case(arch, direction, dim, dim_v, feature, family=family).config()
            assert not config["bias_tiled"] or config["block_kv"] % 32 == 0
            source = _core.kernel_source(config)
            fields = re.search(r"kConfig(\{.*?\});", source, re.DOTALL)[1]
            fields = re.sub(r"\s*\.(num_batch_axes|positive_scale|exact|softcap|alibi|dropout) = \w+,", "", fields)
            asserts.add((SHARED_LIMITS[arch], fields))
    lines = [f"static_assert(flash::shared_bytes(flash::KernelConfig{c}) <= {limit});" for limit, c in asserts]
    cubin, log = _core.nvrtc_compile("\n".join(['#include "common/config.h"', *sorted(lines)]), "sm_80")
    assert cubin, log[:2000]


@pytest.mark.parametrize(
    "facts, arch, sentence",
    [
        ({"dtype": BF16}, "sm_75", "compute capability 7.5 are not supported: the oldest is 8.0"),
        ({"dtype": BF16}, "hopper", "is no GPU architecture: give its compute capability, as in sm_80"),
        ({"dtype": F32}, "sm_90", "float32 attention is not supported on GPUs: cast query, key and value to"),
    ],
)
def test_what_has_no_kernel(facts, arch, sentence):
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        _core.configure({"head_dim": 64, "head_dim_v": 64} | facts, arch)
