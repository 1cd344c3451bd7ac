"""Does a younger generation learn more from the same bytes? Dove, Eagle and Finch of equal size, over several seeds.

    python recipes/generations.py [--jobs 2] [--seeds 1 2 3] [--out runs/generations] [--report FILE] [--plot FILE]

Every run is recipes/generations.toml with another model and seed, on one thread; with the same seed all three read the
same windows in the same order. A finished run is taken as it is, so that the script can be stopped and started again.
Writes a JSON of all curves and a picture, and prints the table of docs/nestling.md: bits per byte of held-out texts at
the end, each seed, and how often the order of the paper (Finch <= Eagle < RWKV-4) held.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from roost.training.plot import read_log
from roost.training.recipe import run_recipe

RECIPE = Path(__file__).with_suffix(".toml")
MODELS = {"Dove": "nestling-dove", "Eagle": "nestling-eagle", "Finch": "nestling"}
Curves = dict[str, dict[int, list[dict[str, Any]]]]


def train(generation: str, seed: int, out: Path) -> None:
    """One run, unless it is there."""
    if (out / "final.safetensors").exists():
        return
    torch.set_num_threads(1)
    run_recipe(RECIPE, {"model": MODELS[generation], "seed": seed, "out": str(out)}, resume=True)


def final(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Bits per byte at the last validation, by text."""
    return {line["validation"]: line["bits_per_byte"] for line in lines if "validation" in line}


def table(curves: Curves) -> str:
    """Markdown: a row per text and generation; then how often the paper's order held."""
    texts = list(final(next(iter(curves["Finch"].values()))))
    seeds = list(curves["Finch"])
    rows = [
        f"| text | model | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |",
        "|---" * (len(seeds) + 3) + "|",
    ]
    for text, generation in product(texts, curves):
        bits = [final(curves[generation][seed])[text] for seed in seeds]
        spread = f" ± {stdev(bits):.3f}" if len(bits) > 1 else ""
        rows.append(
            f"| {text} | {generation} | {' | '.join(f'{b:.3f}' for b in bits)} | **{mean(bits):.3f}**{spread} |"
        )
    cases = [{g: final(curves[g][seed])[text] for g in curves} for text in texts for seed in seeds]
    orders = {
        "Finch <= Eagle": sum(case["Finch"] <= case["Eagle"] for case in cases),
        "Eagle < Dove": sum(case["Eagle"] < case["Dove"] for case in cases),
        "Finch < Dove": sum(case["Finch"] < case["Dove"] for case in cases),
    }
    return "\n".join([*rows, "", *(f"{name}: in {count} of {len(cases)}" for name, count in orders.items())])


def plot(curves: Curves, path: Path) -> None:
    """Training loss (mean of neighbouring lines) and held-out bits per byte, a thin line for every seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    texts = list(final(next(iter(curves["Finch"].values()))))
    figure = Figure(figsize=(5 * (1 + len(texts)), 4), layout="constrained")
    places = figure.subplots(1, 1 + len(texts))
    for number, (generation, runs) in enumerate(curves.items()):
        for i, lines in enumerate(runs.values()):
            style: dict[str, Any] = {"color": f"C{number}", "linewidth": 1, "label": None if i else generation}
            points = [(line["step"], line["loss"]) for line in lines if "lr" in line]
            smooth = [(points[i][0], mean(y for _, y in points[max(0, i - 4) : i + 1])) for i in range(4, len(points))]
            places[0].plot(*zip(*smooth, strict=True), **style)
            for text, axes in zip(texts, places[1:], strict=True):
                held = [(line["step"], line["bits_per_byte"]) for line in lines if line.get("validation") == text]
                axes.plot(*zip(*held, strict=True), marker=".", **style)
    for axes, name in zip(
        places, ["training loss (nats per byte)", *(f"{t} (bits per byte)" for t in texts)], strict=True
    ):
        axes.set(xlabel="step", title=name)
        axes.grid(alpha=0.3)
        axes.legend()
    with path.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file)


def main() -> None:
    """Train what is missing, then compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, each on one thread")
    parser.add_argument("--out", type=Path, default=Path("runs/generations"))
    parser.add_argument("--report", type=Path, default=Path("runs/generations.json"))
    parser.add_argument("--plot", type=Path, default=Path("runs/generations.png"))
    o = parser.parse_args()
    runs = {(g, seed): o.out / f"{MODELS[g]}-{seed}" for seed in o.seeds for g in MODELS}
    with ProcessPoolExecutor(o.jobs, mp_context=get_context("spawn")) as pool:
        for job in [pool.submit(train, g, seed, place) for (g, seed), place in runs.items()]:
            job.result()
    curves: Curves = {g: {seed: read_log(runs[g, seed]) for seed in o.seeds} for g in MODELS}
    o.report.write_text(json.dumps(curves))
    plot(curves, o.plot)
    print(table(curves))


if __name__ == "__main__":
    main()
