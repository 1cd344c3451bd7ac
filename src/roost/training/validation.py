"""Held-out loss during training: the tokens of a stream predicted one by one, with the state carried along.

Owns: nats per token and bits per byte of a token stream. Refuses to know: where the tokens come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, inf, isfinite, log
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from roost.models.rwkv import RWKV


class Held(NamedTuple):
    """One validation stream: token ids (N,), the bytes each id of the vocabulary stands for (V,), what it is."""

    tokens: Tensor
    byte_lengths: Tensor
    domain: str = ""
    language: str = ""


class Figures(NamedTuple):
    """Sums over a stream: nats, targets, bytes of the targets."""

    nats: float
    tokens: int
    bytes: int

    def line(self, name: str) -> dict[str, Any]:
        """Loss in nats per token, perplexity and bits per byte (None where no token has known bytes), as a log line."""
        loss = self.nats / max(self.tokens, 1)
        perplexity = exp(loss) if loss < 700 else inf
        numbers = {
            "loss": loss,
            "perplexity": perplexity,
            "bits_per_byte": self.nats / log(2) / self.bytes if self.bytes else inf,
        }
        finite = {key: value if isfinite(value) else None for key, value in numbers.items()}
        return {"validation": name, **finite, "tokens": self.tokens}


def validate_all(model: RWKV, streams: Mapping[str, Held]) -> list[dict[str, Any]]:
    """One log line per stream, then one per domain and per language that any stream names: all its tokens together."""
    found = {name: (held, measure(model, held)) for name, held in streams.items()}
    lines = [figures.line(name) for name, (_, figures) in found.items()]
    for kind in ("domain", "language"):
        groups: dict[str, list[Figures]] = {}
        for held, figures in found.values():
            if name := getattr(held, kind):
                groups.setdefault(name, []).append(figures)
        for name, several in groups.items():
            total = Figures(sum(f.nats for f in several), sum(f.tokens for f in several), sum(f.bytes for f in several))
            lines.append(total.line(f"{kind} {name}"))
    return lines


def validate(model: RWKV, held: Held, rows: int = 16, chunk: int = 512) -> tuple[float, float]:
    """(nats per token, bits per byte) of a stream; see `measure`."""
    found = measure(model, held, rows, chunk)
    return found.nats / found.tokens, found.nats / log(2) / max(found.bytes, 1)


@torch.no_grad()
def measure(model: RWKV, held: Held, rows: int = 16, chunk: int = 512) -> Figures:
    """The sums over a stream: it is cut into `rows` long rows, read in chunks with carried state.

    Every row begins from the initial state, so the figure is a little above that of one uninterrupted reading; the last
    tokens, fewer than `rows`, are left out. Chunks are shortened where the logits would take more than 256 MB.
    """
    rows = max(1, min(rows, len(held.tokens) // 64))
    length = (len(held.tokens) - 1) // rows
    if length < 1:
        raise ValueError(f"a validation stream needs at least 2 tokens; this one has {len(held.tokens)}")
    inputs = held.tokens[: rows * length].view(rows, length).to(model.device)
    targets = held.tokens[1 : rows * length + 1].view(rows, length).to(model.device)
    chunk = max(1, min(chunk, 2**26 // (rows * model.config.vocab_size)))
    nats, state = 0.0, None
    for start in range(0, length, chunk):
        logits, state = model(inputs[:, start : start + chunk], state)
        wanted = targets[:, start : start + chunk]
        nats += F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="sum").item()
    size = int(held.byte_lengths[targets.flatten().cpu()].sum())
    return Figures(nats, targets.numel(), size)
