"""Figures of the README: prefill and decoding on a CPU in fp32, beside the `rwkv` package on the same weights.

Random weights of official shapes; both read the same tokens, and their logits are compared before anything is timed.

    python benchmarks/generate.py [--quick] [--out FILE] [--threads N] [--rounds N]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import alternate, write

import roost
from roost import PRESETS, RWKV

PROMPT, STEPS = 512, 16


def peer(path: Path) -> Any:
    """The `rwkv` package's model, or None where it is not installed."""
    os.environ.update(RWKV_JIT_ON="1", RWKV_CUDA_ON="0")  # it reads them at import
    try:
        from rwkv.model import RWKV as Peer
    except ImportError:
        return None
    return Peer(model=str(path.with_suffix("")), strategy="cpu fp32", verbose=False)


def random_file(preset: str, path: Path) -> None:
    """Fresh weights, moved so that no matrix is zero."""
    model = RWKV(PRESETS[preset])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    model.save(path)


@torch.no_grad()
def measure(preset: str, rounds: int) -> list[dict[str, Any]]:
    """One row for reading 512 tokens, one for writing 16 more."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.pth"
        random_file(preset, path)
        model, _ = roost.load(path)
        other = peer(path)
        generator = torch.Generator().manual_seed(2)
        tokens = torch.randint(0, model.config.vocab_size, (1, PROMPT), generator=generator)
        logits, state = model(tokens, last_only=True)

        def roost_decode() -> None:
            current = state
            for _ in range(STEPS):
                _, current = model(tokens[:, :1], current)

        prefill = {"roost": lambda: model(tokens, last_only=True)}
        decode = {"roost": roost_decode}
        error = None
        if other is not None:
            ids = tokens[0].tolist()
            theirs, their_state = other.forward(ids, None)
            error = float((logits[0, 0] - theirs).abs().max() / theirs.std())

            def their_decode() -> None:
                current = [part.clone() for part in their_state]  # it changes what it is given
                for _ in range(STEPS):
                    _, current = other.forward(ids[:1], current)

            prefill["rwkv"] = lambda: other.forward(ids, None)
            decode["rwkv"] = their_decode
        rows: list[dict[str, Any]] = []
        for what, variants, count in (("prefill", prefill, PROMPT), ("decode", decode, STEPS)):
            taken = alternate(variants, rounds=rounds)
            row = {"model": preset, "what": what, "tokens": count, "max_error_over_std": error, "seconds": taken}
            row["tokens_per_second"] = {name: round(count / t["median_s"], 1) for name, t in taken.items()}
            if other is not None:
                row["roost_over_rwkv"] = round(taken["rwkv"]["median_s"] / taken["roost"]["median_s"], 2)
            row["state_bytes"] = state.nbytes
            rows.append(row)
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny model, one round: only to see that it runs")
    parser.add_argument("--out", help="write JSON here instead of standard output")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    presets = ["nestling"] if options.quick else ["nestling", "eagle-0.1b", "finch-0.1b"]
    rows = [row for preset in presets for row in measure(preset, 1 if options.quick else options.rounds)]
    write("generate", rows, options.out)


if __name__ == "__main__":
    main()
