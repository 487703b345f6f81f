"""Who may import whom: the table of the house rules, enforced on the source tree by reading imports and includes.

A file that no row names fails here: add it to the row where it belongs, or argue for a new row. So does an import that
its row does not list: that is either a mistake, or a change of the design to be made in this table for all to see.
"""

import ast
import fnmatch
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "jax_flash"

# Modules of jax_flash -> what they may import. A name without a dot in front is a third-party package ("jax.ffi" is not
# part of "jax" here, since only one module may use it), ".name" is a module of ours, "." the package's own public
# names. The standard library and numpy are free to all.
PUBLIC = {".attention", ".varlen", ".paged", ".ring_attention", ".flash_api"}
PYTHON_TABLE: dict[tuple[str, ...], set[str]] = {
    ("__init__",): PUBLIC | {"._ffi"},  # DISABLED_CHECKS names the custom calls, which only _ffi knows
    ("nnx",): {"jax", "flax", "."} | PUBLIC,
    ("linen",): {"jax", "flax", ".", ".nnx"} | PUBLIC,
    ("attention", "varlen", "paged", "flash_api", "ring_attention"): {"jax", "._attrs", "._checks", "._autodiff"},
    ("_autodiff",): {"jax", "._attrs", "._ffi", "._partitioning", ".compat"},
    ("_ffi",): {"jax", "jax.ffi", "._attrs", "._cuda", "._partitioning", "._core", ".compat"},
    ("__main__",): {"jax", "._attrs", "._core"},
    ("_cuda",): set(),
    ("_checks", "_partitioning"): {"jax", "._attrs", ".compat"},
    ("_attrs",): {"jax", ".compat"},
    ("_reference", "compat"): {"jax"},
}

# Files under cpp/ -> what they may include. A path ending in "/" is a folder under cpp/; "<...>" is the C and C++
# standard library; anything else is a shell pattern for the include as it is written, with its brackets if it has them.
CPP_TABLE: dict[tuple[str, ...], set[str]] = {
    ("module.cc",): {"<...>", "<nanobind/*>", "xla/ffi/api/*", "ffi/", "cpu/", "cuda/"},
    ("ffi/*",): {"<...>", "xla/ffi/api/*", "common/problem.h", "ffi/", "cpu/*.h", "cuda/*.h"},
    ("cpu/*",): {"<...>", "common/", "cpu/"},
    ("cuda/*",): {"<...>", "<dlfcn.h>", "common/", "cuda/"},
    ("kernels/*",): {"common/", "kernels/"},
    ("common/*",): {"common/"},
}
NOT_SOURCES = {".md", ".txt"}
C_HEADERS = {"assert", "errno", "float", "limits", "math", "stddef", "stdint", "stdio", "stdlib", "string", "time"}

ENVIRONMENT = {"JAX_FLASH_CACHE_DIR", "JAX_FLASH_VERBOSE", "JAX_FLASH_DUMP_DIR"}
CUDA_KEYWORDS = r"\b__(device|global|host|shared|constant|managed|grid_constant|launch_bounds|forceinline)__\b"


# Python


def python_imports(source: str, modules: set[str]) -> Iterator[tuple[int, str]]:
    """Line and name, as the table spells it, of everything that a module of the package imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, spelled(alias.name, None, modules)
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, "the package has no subpackages"
            origin = ".".join(filter(None, [PACKAGE if node.level else None, node.module]))
            for alias in node.names:
                yield node.lineno, spelled(origin, alias.name, modules)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "jax.ffi":
            yield node.lineno, "jax.ffi"


def spelled(origin: str, name: str | None, modules: set[str]) -> str:
    """The table's spelling of `from origin import name`, or of `import origin` where name is None."""
    first, *rest = origin.split(".")
    second = rest[0] if rest else name
    if first != PACKAGE:
        return "jax.ffi" if (first, second) == ("jax", "ffi") else first
    # Of `from jax_flash import name`, only the tree says whether name is a module.
    is_module = second is not None and (bool(rest) or second in modules or second.startswith("_"))
    return f".{second}" if is_module else "."


def python_violations(module: str, source: str, modules: set[str]) -> list[str]:
    row = next((allowed for names, allowed in PYTHON_TABLE.items() if module in names), None)
    if row is None:
        return [f"{PACKAGE}/{module}.py is in no row of PYTHON_TABLE: add it where it belongs"]
    free = sys.stdlib_module_names | {"numpy"}
    return [
        f"{PACKAGE}/{module}.py:{line} imports {name}; it may import {sorted(row)}"
        for line, name in python_imports(source, modules)
        if name not in row | free
    ]


def python_modules() -> dict[str, Path]:
    package = ROOT / PACKAGE
    return {path.relative_to(package).with_suffix("").as_posix(): path for path in sorted(package.rglob("*.py"))}


def test_python_imports_follow_the_table():
    paths = python_modules()
    assert paths, f"no modules under {ROOT / PACKAGE}"
    known = {name for names in PYTHON_TABLE for name in names} | paths.keys()
    assert [v for module, path in paths.items() for v in python_violations(module, path.read_text(), known)] == []


@pytest.mark.parametrize(
    "module, source, caught",
    [
        ("attention", "import jax.numpy as jnp\nfrom . import _checks\nfrom ._autodiff import attention", False),
        ("attention", "from . import _ffi", True),
        ("attention", "import jax_flash._ffi", True),
        ("attention", "from jax_flash import _core", True),
        ("attention", "import jax.ffi", True),
        ("attention", "from jax import ffi", True),
        ("attention", "import jax\ncall = jax.ffi.ffi_call", True),
        ("attention", "def later():\n    from ._core import handlers", True),
        ("_ffi", "import jax\nfrom jax import ffi\nfrom ._core import handlers\ncall = jax.ffi.ffi_call", False),
        ("_ffi", "from . import _checks", True),
        ("_cuda", "from jax_flash import _core", True),
        ("__main__", "import jax\nfrom jax_flash import _core", False),
        ("__main__", "from jax_flash import _ffi", True),
        ("_checks", "from ._partitioning import rule", True),
        ("compat", "from ._attrs import Attrs", True),
        ("__init__", "from .attention import flash_attention as flash_attention", False),
        ("__init__", "from . import nnx", True),
        ("__init__", "from jax_flash.unheard_of import name", True),
        ("nnx", "import jax_flash", False),
        ("nnx", "import jax_flash.unheard_of", True),
        ("linen", "import flax.linen as nn\nfrom jax_flash import flash_attention", False),
        ("linen", "from ._checks import check", True),
        ("linen", "from .nnx import attention_fn", False),
        ("nnx", "from .linen import attention_fn", True),
        ("attention", "import flax", True),
        ("helpers", "", True),
        ("ops/kernel", "", True),
    ],
)
def test_python_rules_catch(module, source, caught):
    modules = {name for names in PYTHON_TABLE for name in names}
    assert bool(python_violations(module, source, modules)) == caught


# C++


def without_comments(source: str, strings: bool = True) -> str:
    """The code of a C++ file, each comment a space; `strings=False` blanks string literals too."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"'

    def replacement(match: re.Match) -> str:
        return match[0] if match[0].startswith('"') and strings else " " + "\n" * match[0].count("\n")

    return re.sub(pattern, replacement, source, flags=re.DOTALL)


def may_include(include: str, allowed: set[str]) -> bool:
    standard = re.fullmatch(r"<(\w+)(\.h)?>", include)
    if standard and "<...>" in allowed and (not standard[2] or standard[1] in C_HEADERS):
        return True
    return any(
        include.startswith(entry) and ".." not in include if entry.endswith("/") else fnmatch.fnmatch(include, entry)
        for entry in allowed
    )


def cpp_violations(path: str, source: str) -> list[str]:
    """What is wrong with a file; `path` is relative to cpp/."""
    row = next((allowed for names, allowed in CPP_TABLE.items() if any(fnmatch.fnmatch(path, n) for n in names)), None)
    if row is None:
        return [f"cpp/{path} is in no row of CPP_TABLE: add it where it belongs"]
    violations = []
    for match in re.finditer(r"^\s*#\s*include\s*(.*?)\s*$", without_comments(source), re.MULTILINE):
        include = match[1] if match[1].startswith("<") else match[1].strip('"')
        if not may_include(include, row):
            violations.append(f"cpp/{path} includes {include}; it may include {sorted(row)}")
    code = without_comments(source, strings=False)
    if not path.startswith("kernels/ptx/") and re.search(r"\b(asm|__asm|__asm__)\b", code):
        violations.append(f"cpp/{path} has asm, which belongs in cpp/kernels/ptx")
    if path.startswith("common/") and (keyword := re.search(CUDA_KEYWORDS, code)):
        violations.append(f"cpp/{path} has {keyword[0]}: common/ is plain C++ that every compiler takes")
    return violations


def cpp_sources() -> dict[str, Path]:
    files = (path for path in sorted((ROOT / "cpp").rglob("*")) if path.is_file() and path.suffix not in NOT_SOURCES)
    return {path.relative_to(ROOT / "cpp").as_posix(): path for path in files}


def test_cpp_includes_follow_the_table():
    paths = cpp_sources()
    assert paths, f"no sources under {ROOT / 'cpp'}"
    assert [v for path, file in paths.items() for v in cpp_violations(path, file.read_text())] == []


@pytest.mark.parametrize(
    "path, source, caught",
    [
        ("common/mask.h", '#include "common/types.h"\nconstexpr int kOne = 1;  // not __device__', False),
        ("common/mask.h", "#include <cstdint>", True),
        ("common/mask.h", '#include "cuda/driver.h"', True),
        ("common/mask.h", '#include "common/../problem.h"', True),
        ("common/mask.h", "__device__ int one();", True),
        ("common/mask.h", "__global__ void one();", True),
        ("cpu/attention_fwd.cc", '#include <vector>\n#include <string.h>\n#include "cpu/tile.h"', False),
        ("cpu/attention_fwd.cc", '  #  include "xla/ffi/api/ffi.h"', True),
        ("cpu/attention_fwd.cc", "#include <nanobind/nanobind.h>", True),
        ("cpu/attention_fwd.cc", '#include "cuda/driver.h"', True),
        ("cpu/attention_fwd.cc", '/* #include "cuda/driver.h" */\n// #include "xla/ffi/api/ffi.h"', False),
        ("cpu/attention_fwd.cc", '#include "tile.h"', True),
        ("cpu/attention_fwd.cc", "#include HEADER", True),
        ("cpu/parallel.h", 'void pause() { __asm__("pause"); }', True),
        ("ffi/handlers_cpu.cc", '#include "xla/ffi/api/ffi.h"\n#include "cpu/attention.h"\n#include <utility>', False),
        ("ffi/handlers_cuda.cc", "#include <cuda.h>", True),
        ("cuda/driver.cc", "#include <dlfcn.h>", False),
        ("cuda/driver.cc", "#include <cuda.h>", True),
        ("cuda/launch_fwd.cc", '#include "cpu/attention.h"', True),
        ("cuda/launch_fwd.cc", '#include "kernels/sm80/fwd.cuh"', True),
        ("kernels/sm80/fwd.cuh", '#include "kernels/ptx/mma.cuh"\n#include "common/params.h"', False),
        ("kernels/sm80/fwd.cuh", "#include <cuda_fp16.h>", True),
        ("kernels/sm80/fwd.cuh", 'asm volatile("nop;");', True),
        ("kernels/ptx/mma.cuh", 'asm volatile("nop;");', False),
        ("kernels/tile/mask.cuh", 'const char* kText = "asm";  // asm lives elsewhere', False),
        ("kernel.cu", "", True),
    ],
)
def test_cpp_rules_catch(path, source, caught):
    assert bool(cpp_violations(path, source)) == caught


# Both


def test_environment_variables_are_the_three():
    """A variable is read by its quoted name; prose and macros name it without quotes."""
    texts = [path.read_text() for path in python_modules().values()]
    texts += [without_comments(path.read_text()) for path in cpp_sources().values()]
    found = {name for text in texts for name in re.findall(r"""["'](JAX_FLASH_[A-Z0-9_]*)["']""", text)}
    assert found <= ENVIRONMENT
