"""The GPU run time without a GPU: compiling, its cache, its errors, the command line.

Most tests run a copy of the extension beside tiny kernels of their own, each in a process of its own since environment
variables and libraries are looked up once. NVRTC is the one of PyPI; where a driver is needed, it is a fake.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jax_flash import _core, _cuda
from jax_flash.__main__ import main

pytestmark = pytest.mark.skipif(not _cuda.nvrtc_directories(), reason="needs nvidia-cuda-nvrtc")

FWD = "template <flash::KernelConfig c> __device__ void fwd(const flash::FwdProblem& p) { *(float*)p.lse.data = 1; }"
BWD = "template <flash::KernelConfig c> __device__ void {name}(const flash::BwdProblem& p) {{}}"
CONFIG = {"direction": 0, "dtype": 1, "head_dim": 64, "head_dim_v": 64, "num_warps": 4, "min_blocks": 1}
CONFIG |= {"block_q": 64, "block_kv": 64, "warps_d": 1, "num_stages": 1}

PRELUDE = """
import json, os, sys, threading
sys.path.insert(0, os.environ["ROOM"])
import _core
_core.set_nvrtc_directories(json.loads(os.environ["NVRTC_DIRECTORIES"]))
config = json.loads(os.environ["CONFIG"])
"""


@dataclasses.dataclass
class Room:
    """A folder with a copy of the extension, tiny kernels and a cache."""

    path: Path

    def __post_init__(self) -> None:
        extension = Path(_core.__file__)
        shutil.copy(extension, self.path)
        shutil.copytree(extension.parent / "cuda" / "common", self.path / "cuda" / "common")
        for name, namespace, body in (
            ("sm80/fwd.cuh", "flash::sm80", FWD),
            ("sm80/bwd.cuh", "flash::sm80", BWD.format(name="bwd")),
            ("bwd_preprocess.cuh", "flash", BWD.format(name="bwd_preprocess")),
            ("bwd_postprocess.cuh", "flash", BWD.format(name="bwd_postprocess")),
        ):
            self.write_kernel(name, f"namespace {namespace} {{\n{body}\n}}\n")

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    def write_kernel(self, name: str, body: str) -> None:
        path = self.path / "cuda" / "kernels" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#pragma once\n#include "common/config.h"\n#include "common/problem.h"\n{body}')

    def entries(self) -> list[Path]:
        return sorted(self.cache.glob("*"))

    def start(self, script: str, *, directories=None, **environment: str) -> subprocess.Popen:
        variables = {k: v for k, v in os.environ.items() if not k.startswith("JAX_FLASH_")}
        variables |= {
            "ROOM": str(self.path),
            "CONFIG": json.dumps(CONFIG),
            "NVRTC_DIRECTORIES": json.dumps(_cuda.nvrtc_directories() if directories is None else directories),
            "JAX_FLASH_CACHE_DIR": str(self.cache),
            "JAX_FLASH_VERBOSE": "1",
            "CUDA_CACHE_DISABLE": "1",
        }
        return subprocess.Popen(
            [sys.executable, "-c", PRELUDE + script],
            env=variables | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, **options) -> str:
        """What the script prints on stderr; it must succeed."""
        return finish(self.start(script, **options))

    def fail(self, script: str, **options) -> str:
        """What the RuntimeError says that the script ends with."""
        process = self.start(script, **options)
        lines = process.communicate()[1].splitlines()
        errors = [line for line in lines if line.startswith("RuntimeError: ")]
        assert process.returncode and errors, lines
        return errors[-1].removeprefix("RuntimeError: ")


def finish(process: subprocess.Popen) -> str:
    err = process.communicate()[1]
    assert process.returncode == 0, err
    return err


COMPILE = "_core.compile_kernel(config, 'sm_90')"
LOAD = "_core.load_kernel(config, 0)"


@pytest.fixture
def room(tmp_path) -> Room:
    return Room(tmp_path)


@pytest.fixture
def fake_driver(tmp_path) -> str:
    """A folder for LD_LIBRARY_PATH."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if not compiler:
        pytest.skip("needs a C compiler")
    folder = tmp_path / "driver"
    folder.mkdir()
    source = Path(__file__).with_name("fake_libcuda.c")
    subprocess.run(
        [*compiler.split(), "-shared", "-fPIC", "-w", "-std=gnu11", source, "-o", folder / "libcuda.so.1"], check=True
    )
    return str(folder)


# The cache on disk


def test_second_process_reads_what_the_first_compiled(room):
    assert "compiled fwd_bf16_64x64_sm_90a in" in room.run(COMPILE)
    (entry,) = room.entries()
    second = room.run(COMPILE)
    assert "read fwd_bf16_64x64_sm_90a from the cache" in second
    assert entry.stem in second and "compiled" not in second
    assert room.entries() == [entry]


def test_one_compilation_for_all_threads_of_a_process(room):
    script = f"""
threads = [threading.Thread(target=lambda: {COMPILE}) for _ in range(8)]
[t.start() for t in threads], [t.join() for t in threads]
"""
    assert room.run(script).count("compiled") == 1


def test_processes_race_for_one_entry(room):
    errors = [finish(process) for process in [room.start(COMPILE) for _ in range(6)]]
    assert all("compiled" in err or "read" in err for err in errors)
    (entry,) = room.entries()
    assert entry.suffix == ".cubin"
    assert "from the cache" in room.run(COMPILE)


@pytest.mark.parametrize("damage", ["empty", "header only", "truncated", "flipped", "longer", "foreign", "other key"])
def test_damaged_entries_are_compiled_again(room, damage):
    room.run(COMPILE)
    (entry,) = room.entries()
    whole = entry.read_bytes()
    half = len(whole) // 2
    start = whole.index(b"\x7fELF")
    entry.write_bytes(
        {
            "empty": b"",
            "header only": whole[:start],
            "truncated": whole[:half],
            "flipped": whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :],
            "longer": whole + b"\0",
            "foreign": b"not a kernel\n" * 1000,
            "other key": whole.replace(entry.stem.encode(), entry.stem[::-1].encode()),
        }[damage]
    )
    assert "compiled" in room.run(COMPILE)
    assert room.entries() == [entry]
    assert entry.read_bytes() == whole


def test_an_entry_is_readable_as_the_umask_says(room):
    room.run(f"os.umask(0o022); {COMPILE}")
    assert [oct(entry.stat().st_mode & 0o777) for entry in room.entries()] == ["0o644"]


def test_the_key_holds_everything_that_matters(room):
    seen = set()

    def is_new(script: str = COMPILE) -> bool:
        room.run(script)
        before = len(seen)
        seen.update(room.entries())
        return len(seen) == before + 1

    assert is_new()
    assert not is_new()
    assert is_new("_core.compile_kernel(config, 'sm_80')")
    assert is_new("_core.compile_kernel({**config, 'softcap': 1}, 'sm_90')")
    room.write_kernel("sm80/fwd.cuh", "// changed\nnamespace flash::sm80 {\n" + FWD + "\n}\n")
    assert is_new()
    room.write_kernel("tile/new.cuh", "")
    assert is_new()
    common = room.path / "cuda" / "common" / "types.h"
    common.write_text(common.read_text() + "// changed\n")
    assert is_new()
    (room.path / "cuda" / "kernels" / "README.md").write_text("no source")
    assert not is_new()


def test_an_unwritable_cache_is_no_error(room):
    room.cache.write_text("a file where the folder should be")
    for directory in (str(room.cache), "/proc/jax_flash", "/dev/null/cache"):
        err = room.run(f"{COMPILE}; {COMPILE}", JAX_FLASH_CACHE_DIR=directory)
        assert err.count("compiled fwd") == 1
        assert f"cannot write to {directory}" in err
        assert room.run(COMPILE, JAX_FLASH_CACHE_DIR=directory, JAX_FLASH_VERBOSE="0") == ""


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_is_read(room):
    room.run(COMPILE)
    room.cache.chmod(0o555)
    try:
        assert "from the cache" in room.run(COMPILE)
        assert "cannot write" in room.run("_core.compile_kernel(config, 'sm_80')")
    finally:
        room.cache.chmod(0o755)


def test_a_full_disk_is_no_error(room):
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))\n"
    err = room.run(limit + COMPILE)
    assert "compiled" in err and "cannot write" in err
    assert room.entries() == []


def test_the_cache_lies_in_the_users_cache_folder(room, tmp_path):
    script = "print(_core.cache_directory(), file=sys.stderr)"
    empty = {"JAX_FLASH_CACHE_DIR": ""}
    assert room.run(script).strip() == str(room.cache)
    assert room.run(script, **empty, XDG_CACHE_HOME="/x", HOME="/h").strip() == "/x/jax_flash"
    assert room.run(script, **empty, XDG_CACHE_HOME="", HOME="/h").strip() == "/h/.cache/jax_flash"
    assert room.run(f"{COMPILE}\n{script}", **empty, XDG_CACHE_HOME="", HOME="").endswith("\n\n")


def test_dump(room, tmp_path):
    room.run(COMPILE, JAX_FLASH_DUMP_DIR=str(tmp_path / "dump"))
    files = {path.suffix: path.read_bytes() for path in (tmp_path / "dump").iterdir()}
    assert files[".cubin"].startswith(b"\x7fELF")
    assert b"jax_flash_fwd" in files[".cu"]
    assert ".log" in files


# Sources


def test_source_of_a_kernel():
    source = _core.kernel_source({**CONFIG, "dropout": 1, "bias_dtype": 2})
    for line in (
        '#include "kernels/sm80/fwd.cuh"',
        "    .direction = flash::Direction::kFwd,",
        "    .dtype = flash::DType::kBF16,",
        "    .head_dim = 64,",
        "    .bias_dtype = flash::DType::kF16,",
        "    .dropout = true,",
        "    .paged = false,",
        "jax_flash_fwd(const __grid_constant__ flash::FwdProblem p) {",
    ):
        assert line in source.splitlines()
    assert _core.kernel_source({**CONFIG, "direction": 1}).count("__global__") == 3


def test_unknown_fields_are_errors():
    with pytest.raises(ValueError, match="unknown field"):
        _core.kernel_source({"head_dimension": 64})


def test_errors_in_a_kernel_are_shown(room):
    room.write_kernel("sm80/fwd.cuh", "surprise\n")
    process = room.start(COMPILE)
    err = process.communicate()[1]
    assert process.returncode and "kernels/sm80/fwd.cuh(4): error:" in err
    assert room.entries() == []
    # The next call tries again.
    assert "read" not in room.run(
        f"try: {COMPILE}\nexcept RuntimeError: pass\ntry: {COMPILE}\nexcept RuntimeError: pass"
    )


def test_missing_sources(room):
    shutil.rmtree(room.path / "cuda" / "kernels")
    assert room.fail(COMPILE) == f"the kernel sources are not in {room.path / 'cuda'}: reinstall jax_flash"


def test_nvrtc_compile_has_log_and_code(room):
    script = """
code, log = _core.nvrtc_compile('__global__ void f(int* p) { *p = 1; }', 'sm_80', ['--ptxas-options=-v', '--no-cache'])
assert code.startswith(b'\\x7fELF') and 'registers' in log, log
code, log = _core.nvrtc_compile('nonsense', 'sm_80')
assert code == b'' and 'error' in log, log
"""
    assert room.run(script) == ""


# Errors and devices


@pytest.mark.parametrize(
    "arch, sentence",
    [
        ("sm_75", "GPUs of compute capability 7.5 are not supported: the oldest is 8.0 (Ampere)"),
        ("gfx90", '"gfx90" is no GPU architecture: give its compute capability, as in sm_80 or sm_90'),
        ("sm_", '"sm_" is no GPU architecture: give its compute capability, as in sm_80 or sm_90'),
        ("sm_9999", '"sm_9999" is no GPU architecture: give its compute capability, as in sm_80 or sm_90'),
    ],
)
def test_names_that_are_no_architecture(room, arch, sentence):
    assert room.fail(f"_core.compile_kernel(config, '{arch}')") == sentence


def test_nvrtc_is_too_old(room):
    error = room.fail("_core.compile_kernel(config, 'sm_199')")
    assert (
        error.startswith("NVRTC 1") and " cannot compile for sm_199a: upgrade it with `pip install --upgrade " in error
    )


def test_no_nvrtc(room):
    for name in ("libnvrtc.so.12", "libnvrtc.so.13"):
        if "OSError" not in room.start(f"import ctypes; ctypes.CDLL('{name}')").communicate()[1]:
            pytest.skip("the system has an NVRTC of its own")
    error = room.fail(COMPILE, directories=["/nonexistent"])
    assert error.startswith(
        'NVRTC, CUDA\'s run-time compiler, was not found: install it with `pip install "jax[cuda13]"`'
    )


def has_driver() -> bool:
    try:
        return bool(_core.driver_version())
    except RuntimeError:
        return False


@pytest.mark.skipif(has_driver(), reason="the machine has a driver")
def test_no_driver(room):
    assert room.run("assert _core.visible_archs() == []") == ""
    sentence = "the CUDA driver (libcuda.so.1) was not found: install NVIDIA's driver"
    assert room.fail(LOAD).startswith(sentence)
    assert room.fail("_core.driver_version()").startswith(sentence)


def test_a_driver_that_is_no_driver(room, tmp_path):
    nvrtc = next(Path(_cuda.nvrtc_directories()[0]).glob("libnvrtc.so.*"))
    (tmp_path / "libcuda.so.1").symlink_to(nvrtc)
    error = room.fail("_core.driver_version()", LD_LIBRARY_PATH=str(tmp_path))
    assert error == "the CUDA driver lacks cuInit: upgrade it to one of CUDA 12.0 or later"


def test_devices(room, fake_driver):
    fake = {"LD_LIBRARY_PATH": fake_driver}
    assert room.run("assert _core.driver_version() == '13.0'", **fake) == ""
    assert room.run("assert _core.visible_archs() == []", **fake) == ""
    assert room.run("assert _core.visible_archs() == ['sm_90a', 'sm_80']", FAKE_SMS="75,90,80,90", **fake) == ""
    old = "GPUs of compute capability 7.5 are not supported: the oldest is 8.0 (Ampere)"
    assert room.fail("_core.visible_archs()", FAKE_SMS="75", **fake) == old
    assert room.fail(LOAD, FAKE_SMS="75,90", **fake) == old
    assert room.fail("_core.load_kernel(config, 2)", FAKE_SMS="75,90", **fake) == "there is no GPU 2"


def test_load(room, fake_driver):
    fake = {"LD_LIBRARY_PATH": fake_driver, "FAKE_SMS": "90,90,80"}
    script = """
def load():
    for device in range(3):
        _core.load_kernel(config, device)
        _core.load_kernel({**config, 'direction': 1}, device)
threads = [threading.Thread(target=load) for _ in range(4)]
[t.start() for t in threads], [t.join() for t in threads]
"""
    err = room.run(script, **fake)
    assert err.count("fake: loaded") == 6
    assert err.count("compiled") == 4
    assert err.count("fake: attribute 8 = ") == 6  # dynamic shared memory, of main entries only


def test_the_driver_refuses_what_the_cache_holds(room, fake_driver):
    fake = {"LD_LIBRARY_PATH": fake_driver, "FAKE_SMS": "90"}
    room.run(COMPILE)
    err = room.run(LOAD, FAKE_REFUSALS="1", **fake)
    assert "from the cache" in err and "refuses: cuLibraryLoadData failed with CUDA_ERROR_INVALID_IMAGE" in err
    assert err.count("compiled") == 1 and err.count("fake: loaded") == 1
    sentence = "cuLibraryLoadData failed with CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid"
    assert room.fail(LOAD, FAKE_REFUSALS="2", **fake) == sentence


# The command line


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "jax_flash", *arguments],
        env=os.environ | environment,
        cwd="/",  # not a checkout, whose sources Python would take for the package
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_without_arguments_shows_what_it_found():
    done = command()
    assert done.returncode == 0, done.stderr
    assert f"NVRTC        {_core.nvrtc_version()}" in done.stdout
    assert "usage: python -m jax_flash" in done.stdout


def test_command_cache(tmp_path):
    cache = {"JAX_FLASH_CACHE_DIR": str(tmp_path / "cache")}
    assert command("cache", **cache).stdout == f"{tmp_path / 'cache'}: 0 kernels, 0.0 MiB\n"
    done = command("cache", "--precompile", "--arch", "sm_80", "--head-dim", "64", "--dtype", "bfloat16", **cache)
    assert done.returncode == 0, done.stderr
    assert "sm_80 forward bfloat16 head_dim 64" in done.stdout
    assert "sm_80 backward bfloat16 head_dim 64" in done.stdout
    assert ": 2 kernels, " in done.stdout
    (tmp_path / "cache" / f"{'0' * 32}.{'1' * 32}.tmp").touch()
    (tmp_path / "cache" / "something else").touch()
    assert command("cache", "--clear", **cache).stdout == f"{tmp_path / 'cache'}: 3 files removed\n"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["something else"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--precompile", "--arch", "sm_70"], "compute capability 7.0 are not supported"),
        (["--precompile", "--arch", "hopper"], "is no GPU architecture"),
        (["--precompile", "--arch", "sm_90", "--head-dim", "512"], "'512' is not in 1..256"),
        (["--arch", "sm_90"], "--arch is for --precompile"),
        (["--clear", "--precompile"], "not allowed with"),
    ],
)
def test_command_errors(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(_core, "cache_directory", lambda: str(tmp_path))
    try:
        code = main(["cache", *arguments])
    except SystemExit as exit:  # argparse
        code = exit.code
    assert code != 0
    assert words in capsys.readouterr().err


def test_command_needs_a_cache_that_can_be_written(monkeypatch, capsys):
    for directory, words in (("/dev/null/cache", "/dev/null/cache"), ("", "there is no folder for the cache")):
        monkeypatch.setattr(_core, "cache_directory", lambda directory=directory: directory)
        assert main(["cache", "--precompile", "--arch", "sm_90"]) == 1
        err = capsys.readouterr().err
        assert err.startswith("jax_flash: ") and words in err


@pytest.mark.skipif(has_driver(), reason="the machine has a driver")
def test_command_needs_an_architecture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_core, "cache_directory", lambda: str(tmp_path))
    assert main(["cache", "--precompile"]) == 1
    assert capsys.readouterr().err == "jax_flash: no GPU was found: say for which to compile, as in --arch sm_90a\n"
