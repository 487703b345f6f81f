"""Speed and memory of jax_flash beside its peers; start at `run.py`."""

import sys
from pathlib import Path

# `python -m benchmarks.run` puts the repository first on the path, where the source tree of jax_flash would hide the
# installed package, which is the one that has the compiled extension.
_ROOT = str(Path(__file__).resolve().parents[1])
if _ROOT in sys.path:
    sys.path.remove(_ROOT)
    sys.path.append(_ROOT)
