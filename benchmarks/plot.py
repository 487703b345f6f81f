"""A bar chart of a report of `run.py`; also by hand: python -m benchmarks.plot REPORT.json FILE.png."""

import json
import sys
from pathlib import Path
from typing import Any

# Fixed, so that an implementation has the same colour in every figure.
_COLOURS = {
    "jax_flash": "#d62728",
    "xla": "#7f7f7f",
    "cudnn": "#2ca02c",
    "mosaic": "#1f77b4",
    "torch": "#ff7f0e",
    "fa4": "#9467bd",
}


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes one panel for each pass, with one group of bars for each workload."""
    import matplotlib.figure

    measured = [result for result in report["results"] if "ms" in result]
    if not measured:
        return
    names = list(dict.fromkeys(result["workload"] for result in measured))
    passes = list(dict.fromkeys(result["pass"] for result in measured))
    implementations = [name for name in _COLOURS if any(r["implementation"] == name for r in measured)]
    unit, factor = ("GFLOP/s", 1e3) if report["backend"] == "cpu" else ("TFLOP/s", 1.0)
    thickness = 0.8 / len(implementations)
    size = (6.5 * len(passes), 1.5 + (0.2 * len(implementations) + 0.15) * len(names))
    figure = matplotlib.figure.Figure(size, layout="constrained")
    panels = figure.subplots(1, len(passes), sharey=True, squeeze=False)[0]
    for panel, pass_ in zip(panels, passes, strict=True):
        for i, implementation in enumerate(implementations):
            rows = [r for r in measured if (r["pass"], r["implementation"]) == (pass_, implementation)]
            positions = [names.index(r["workload"]) - 0.4 + (i + 0.5) * thickness for r in rows]
            rates = [r["tflops"] * factor for r in rows]
            bars = panel.barh(positions, rates, thickness, color=_COLOURS[implementation], label=implementation)
            panel.bar_label(bars, fmt="%.0f", padding=3, fontsize=7)
        panel.set_title(pass_.replace("_", " + "))
        panel.set_xlabel(f"{unit}, median; higher is better")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    panels[0].legend(fontsize=8)
    versions = [f"{name} {report['versions'][name]}" for name in ("jax", "torch") if name in report["versions"]]
    commit = (report["commit"] or "unknown")[:10] + (" modified" if report["dirty"] else "")
    figure.suptitle(
        ", ".join([report["device"], f"{report['cores']} cores", *versions, f"commit {commit}"]), fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
