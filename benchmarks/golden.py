"""Claim: a Finch L6 D256 over bytes learns along the stored curve: ten losses, in nats per token.

The corpus ships in the package: the Universal Declaration of Human Rights in 102 languages, one document a language,
byte b as id b + 1. Each of the ten numbers is the mean training loss over a tenth of the run.

    short  20 steps, run by the tests (tests/training/golden/short.json), within 0.003: fp32 and fp64 differ by 3e-5,
           initial matrices made with another number of threads (their QR rounds differently) by 5e-4
    long   400 steps (benchmarks/golden/long.json), within 0.01: what only many steps show

Everything else is TrainConfig's default.

    python benchmarks/golden.py [long|short] [--out FILE] [--threads N] [--store FILE]

Exits with 1 when a loss is farther away. --store writes a new curve in place of comparing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from common import stamp, write

from roost.config import ModelConfig
from roost.data.binidx import write_tokens
from roost.data.loader import TokenLoader
from roost.models.rwkv import RWKV
from roost.training.config import TrainConfig
from roost.training.loop import train

ROOT = Path(__file__).parents[1]
STORED = {"short": ROOT / "tests/training/golden/short.json", "long": ROOT / "benchmarks/golden/long.json"}
MODEL = ModelConfig("finch", 6, 256, vocab_size=257)
RUNS: dict[str, dict[str, Any]] = {
    "short": {"ctx": 128, "batch": 4, "steps": 20, "lr": 6e-4, "lr_final": 6e-5, "within": 0.003},
    "long": {"ctx": 256, "batch": 4, "steps": 400, "lr": 6e-4, "lr_final": 6e-6, "within": 0.01},
}


def corpus() -> Iterator[list[int]]:
    """The declaration, one document a language, as ids."""
    lines = (files("roost") / "assets" / "udhr_subset.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines:
        yield [byte + 1 for byte in "\n".join(json.loads(line)["articles"]).encode()]


def curve(run: str, folder: Path) -> dict[str, Any]:
    """Train once in `folder`; what was trained, and the mean loss of each tenth of the run in nats per token."""
    settings = RUNS[run]
    write_tokens(folder / "declaration", corpus(), vocab_size=MODEL.vocab_size)
    data = TokenLoader(folder / "declaration", settings["ctx"], settings["batch"], seed=0)
    steps, lr, final = settings["steps"], settings["lr"], settings["lr_final"]
    config = TrainConfig(
        steps=steps, lr=lr, lr_final=final, out=str(folder / "run"), save_every=steps, log_every=1,
        peak_flops=1.0,
    )  # fmt: skip
    model = RWKV(MODEL, seed=0)
    train(model, data, config)
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "lr" in line]
    tenth = steps // 10
    means = [round(sum(losses[i : i + tenth]) / tenth, 5) for i in range(0, steps, tenth)]
    digest = hashlib.sha256((folder / "declaration.bin").read_bytes()).hexdigest()
    return {"run": run, **settings, "parameters": MODEL.parameters, "corpus_sha256": digest, "losses": means}


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description="the golden curve")
    parser.add_argument("run", nargs="?", default="long", choices=tuple(RUNS), help="which curve")
    parser.add_argument("--out", help="JSON file; standard output without it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--store", help="write the curve to this file instead of comparing with the stored one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        row = curve(options.run, Path(folder))
    seconds = round(time.perf_counter() - start, 1)
    if options.store:
        Path(options.store).write_text(json.dumps({**row, "stamp": stamp()}, indent=1) + "\n", encoding="utf-8")
        return
    stored = json.loads(STORED[options.run].read_text(encoding="utf-8"))
    changed = [key for key in row if key != "losses" and row[key] != stored[key]]
    if changed:
        raise SystemExit(f"{STORED[options.run]} is the curve of another run: {', '.join(changed)} differ")
    farthest = max(abs(a - b) for a, b in zip(row["losses"], stored["losses"], strict=True))
    write(
        "golden", [{**row, "stored": stored["losses"], "farthest": round(farthest, 5), "seconds": seconds}], options.out
    )
    if not farthest <= row["within"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
