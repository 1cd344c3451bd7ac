"""Curves of one or more runs as a picture.

Owns: which lines of a log become which curve. Refuses to know: how a run is made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any, cast

from roost.files import replacing

PANELS = {
    "loss": "loss (nats per token)",
    "bits_per_byte": "validation (bits per byte)",
    "gradient_norm": "gradient norm",
    "tokens_per_second": "tokens/s",
}


def read_log(run: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's log; `run` is its directory or the file. A last line that is being written is left out.

    Raises ValueError when there is no log, or a line in it is none of a log.
    """
    path = Path(run)
    path = path / "log.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{run} holds no run: there is no {path}")
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is not a log of a run: line {number} is not JSON ({error})") from error
        if not isinstance(line, dict) or type(cast("dict[str, Any]", line).get("step")) is not int:
            raise ValueError(f"{path} is not a log of a run: line {number} has no step")
        lines.append(cast("dict[str, Any]", line))
    return lines


def curves(runs: Sequence[str | os.PathLike[str]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """panel -> curve -> (step, value): training lines under the run's name, validation under "run: stream"."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {panel: {} for panel in PANELS}
    names = [Path(run).name for run in runs]
    for run in runs:
        name = Path(run).name if names.count(Path(run).name) == 1 else str(run)
        for line in read_log(run):
            stream = line.get("validation")
            for panel in ("bits_per_byte",) if stream else ("loss", "gradient_norm", "tokens_per_second"):
                value = line.get(panel)
                if isinstance(value, (int, float)) and isfinite(value) and "warning" not in line:
                    found[panel].setdefault(f"{name}: {stream}" if stream else name, []).append((line["step"], value))
    return {panel: of_panel for panel, of_panel in found.items() if of_panel}


def plot(runs: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> None:
    """Write the curves of all runs to a PNG. Raises ValueError without matplotlib, without a log, without a line."""
    found = curves(runs)
    if not found:
        raise ValueError(f"there is nothing to draw yet in {', '.join(map(str, runs))}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a plot needs matplotlib: pip install 'roost[plot]'") from error
    figure = Figure(figsize=(6.4 * min(2, len(found)), 4.0 * ((len(found) + 1) // 2)), layout="constrained")
    for number, (panel, of_panel) in enumerate(found.items()):
        axes = figure.add_subplot((len(found) + 1) // 2, min(2, len(found)), number + 1)
        for name, points in of_panel.items():
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1, marker="." if len(points) < 20 else None)
        axes.set(xlabel="step", ylabel=PANELS[panel])
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    with replacing(path) as temporary, temporary.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file)
