"""_attrs.py and cpp/ffi/attrs.h are mirror images."""

from __future__ import annotations

import dataclasses
import pathlib
import re

from jax_flash._attrs import BIAS_BLOCK, OPERANDS, Attrs, ffi_attributes

CPP = pathlib.Path(__file__).parent.parent / "cpp" / "ffi"
HEADER = (CPP / "attrs.h").read_text()


def test_fields():
    struct = re.search(r"struct Attrs \{(.*?)\};", HEADER, re.S)[1]
    cpp = re.findall(r"^\s*(float|int32_t|bool) (\w+);", struct, re.M)
    names = {"float": "float", "int": "int32_t", "bool": "bool"}
    python = [("int32_t", "operands")] + [(names[f.type], f.name) for f in dataclasses.fields(Attrs)]
    assert cpp == python
    registered = re.findall(r"StructMember<(\w+)>\(\"(\w+)\"\)", HEADER)
    assert registered == cpp
    assert list(ffi_attributes(Attrs(scale=1.0), ("query",))) == [name for _, name in cpp]


def test_operands():
    enum = re.search(r"enum class Operand .*?\{(.*?)\};", HEADER, re.S)[1]
    cpp = [name for name in re.findall(r"k(\w+)", enum) if name != "Count"]
    assert cpp == ["".join(part.capitalize() for part in name.split("_")) for name in OPERANDS]
    names = re.search(r"kOperandNames\[\] = \{(.*?)\};", (CPP / "decode.cc").read_text(), re.S)[1]
    assert re.findall(r'"(\w+)"', names) == list(OPERANDS)


def test_blocks_of_the_bias_gradient():
    problem = (CPP.parent / "common" / "problem.h").read_text()
    assert f"kBiasBlock = {BIAS_BLOCK};" in problem


def test_operand_bits():
    """Bit i of `operands` stands for operand i of the enumeration."""
    names = list(OPERANDS)
    for i, name in enumerate(names):
        assert ffi_attributes(Attrs(scale=1.0), (name,))["operands"] == 1 << i
