"""What tests of training share: a small text as tokens, a run of seconds, and its log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from roost import TrainConfig
from roost.data.binidx import write_tokens

TEXT = ("In the beginning was the word, and the word was short. " * 80).encode()


def corpus_in(directory: Path) -> Path:
    """The text as three documents over single bytes, (path of the .bin/.idx pair)."""
    write_tokens(directory / "corpus", [[b + 1 for b in TEXT]] * 3, vocab_size=257)
    return directory / "corpus"


def config(out: Path, **numbers: object) -> TrainConfig:
    return TrainConfig(**{"steps": 12, "out": str(out), "lr": 3e-3, "save_every": 4, "log_every": 1, **numbers})


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in log(out) if "lr" in line]


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Bit for bit."""
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


RECIPE = """model = "finch-tiny"
data = "{data}"
valid = ["{data}"]
ctx = 32
batch = 4
steps = 60
lr = 3e-3
save_every = 3
keep = 1
validate_every = 0
log_every = 1
out = "{out}"
"""
