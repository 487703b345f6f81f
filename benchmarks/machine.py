"""What a figure must be published with: the machine, the versions, the commit."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parents[1]

_PACKAGES = {"jax-flash", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "numpy", "torch"}
_PACKAGES |= {"nvidia-cudnn-cu12", "nvidia-cudnn-cu13"}


def usable_cores() -> int:
    """The processors that this process may run on, which a container can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """Date, commit, processors and versions as JSON values; None where something cannot be found out."""
    # Results of earlier runs may lie about uncommitted: they change nothing that is measured.
    changes = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    gpus = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    versions = {d.name: d.version for d in importlib.metadata.distributions() if d.name in _PACKAGES}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "backend": jax.default_backend(),
        "device": _cpu_model() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "gpus_and_drivers": gpus.splitlines() if gpus else [],
        "python": platform.python_version(),
        "versions": dict(sorted(versions.items())),
    }


def _output(*command: str) -> str | None:
    """What a command prints when run in this checkout; None when it fails or is not there."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_model() -> str:
    """The processor's name, which platform.processor() leaves out on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
