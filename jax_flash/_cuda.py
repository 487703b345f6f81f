"""Where Python packages keep NVRTC, CUDA's run-time compiler: ``jax[cuda13]`` and ``jax[cuda12]`` bring it along."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def nvrtc_directories() -> list[str]:
    """Folders that hold libnvrtc, found without importing anything."""
    try:
        spec = importlib.util.find_spec("nvidia")
    except ValueError:  # a module of that name without a spec
        return []
    roots = (spec.submodule_search_locations if spec else None) or []
    return sorted({str(path.parent) for root in roots for path in Path(root).glob("*/lib/libnvrtc.so.*")})
