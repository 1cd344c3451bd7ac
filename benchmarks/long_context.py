"""Claim: the memory of a training step through segments grows by a sixth from 2k to 64k tokens, in one piece with T.

One row of T tokens, Finch L4 D256 over bytes, forward and backward in a process of its own; its peak resident memory,
and of segments also what they took. The gradients of both ways are compared where both fit.

    python benchmarks/long_context.py [--quick] [--out FILE] [--plot FILE] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import write

from roost.config import ModelConfig
from roost.data.batch import Batch
from roost.models.rwkv import RWKV
from roost.training.heap import keep_freed_memory
from roost.training.loss import next_token_sums
from roost.training.segments import segmented_sums

SEGMENT = 1024
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)
WHOLE = 8192  # the longest row that is also read in one piece


def measure(way: str, tokens: int, segment: int, size: tuple[int, int]) -> dict[str, Any]:
    """One step in this process: peak memory in MiB, seconds, and the norm of all gradients."""
    layers, width = size
    model = RWKV(ModelConfig("finch", n_layer=layers, n_embd=width, vocab_size=256))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():  # fresh output matrices are zero
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.3 / parameter.shape[-1] ** 0.5)
    ids = torch.randint(0, 256, (1, tokens + 1), generator=random)
    batch = Batch(ids[:, :-1], ids[:, 1:])
    start = time.perf_counter()
    sums = next_token_sums(model, batch) if way == "whole" else segmented_sums(model, batch, segment)
    (sums.loss / sums.count).backward()
    seconds = time.perf_counter() - start
    norm = float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"way": way, "tokens": tokens, "peak_mib": round(peak, 1), "seconds": round(seconds, 2), "norm": norm}


def child(way: str, tokens: int, segment: int, size: tuple[int, int], threads: int) -> dict[str, Any]:
    """`measure` in a fresh process."""
    given = [way, str(tokens), str(segment), *map(str, size), str(threads)]
    done = subprocess.run([sys.executable, __file__, "--child", *given], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Peak memory over the length of the row, both axes logarithmic."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.2), dpi=110)
    for way, label in (("segments", f"segments of {SEGMENT}"), ("whole", "in one piece")):
        points = [(row["tokens"], row["peak_mib"]) for row in rows if row["way"] == way]
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0)
    axes.set_xlabel("tokens in the row")
    axes.set_ylabel("peak memory of a step, MiB")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Measure, compare and write."""
    if sys.argv[1:2] == ["--child"]:
        way, tokens, segment, layers, width, threads = sys.argv[2:]
        torch.set_num_threads(int(threads))
        keep_freed_memory()  # as `roost train` does
        json.dump(measure(way, int(tokens), int(segment), (int(layers), int(width))), sys.stdout)
        return
    parser = argparse.ArgumentParser(description="memory of long rows in segments and in one piece")
    parser.add_argument("--quick", action="store_true", help="L1 D64, up to 512 tokens: does it run")
    parser.add_argument("--out", help="JSON file; standard output without it")
    parser.add_argument("--plot", help="PNG file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lengths, whole, segment, size = (
        ((256, 512), 256, 64, (1, 64)) if options.quick else (LENGTHS, WHOLE, SEGMENT, (4, 256))
    )
    rows = [child("segments", tokens, segment, size, options.threads) for tokens in lengths]
    for row in [row for row in rows if row["tokens"] <= whole]:
        other = child("whole", row["tokens"], segment, size, options.threads)
        if not abs(row["norm"] / other["norm"] - 1) < 1e-4:
            raise SystemExit(f"gradients differ at {row['tokens']} tokens: {row['norm']} and {other['norm']}")
        rows.append(other)
    flat = [row["peak_mib"] for row in rows if row["way"] == "segments"]
    growth = {"way": "segments", "longest_over_shortest": round(flat[-1] / flat[0], 3)}
    if options.plot:
        plot(rows, str(Path(options.plot)))
    write("long_context", [*rows, {**growth, "segment": segment, "layers": size[0], "width": size[1]}], options.out)


if __name__ == "__main__":
    main()
