"""The CUDA functions that are declared by hand, against NVIDIA's headers."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


def include_directories() -> list[str]:
    spec = importlib.util.find_spec("nvidia")
    roots = (spec.submodule_search_locations if spec else None) or []
    return sorted(str(path) for root in roots for path in Path(root).glob("*/include"))


@pytest.mark.parametrize("mistake", ["", "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES 9"])
def test_declarations_are_nvidias(mistake):
    directories = include_directories()
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler or not all(any(Path(d, h).exists() for d in directories) for h in ("cuda.h", "nvrtc.h")):
        pytest.skip("needs a C++ compiler and the headers of nvidia-cuda-runtime and nvidia-cuda-nvrtc")
    flags = ["-std=c++20", "-fsyntax-only", "-I", str(TESTS.parent / "cpp")]
    flags += [f"-isystem{directory}" for directory in directories]
    # The second run shows that the first can fail: an enum of NVIDIA's gets another value.
    source = (TESTS / "abi.cc").read_text()
    if mistake:
        source = source.replace("#define SAME(", f"#define {mistake}\n#define SAME(", 1)
    done = subprocess.run(
        [*compiler.split(), *flags, "-x", "c++", "-"], input=source, capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) == (not mistake), done.stderr
