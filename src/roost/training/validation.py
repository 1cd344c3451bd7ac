"""Held-out loss during training: the tokens of a stream predicted one by one, with the state carried along.

Owns: nats per token and bits per byte of a token stream. Refuses to know: where the tokens come from.
"""

from __future__ import annotations

from math import log
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from roost.models.rwkv import RWKV


class Held(NamedTuple):
    """One validation stream: token ids (N,) and the bytes each id of the vocabulary stands for (V,)."""

    tokens: Tensor
    byte_lengths: Tensor


@torch.no_grad()
def validate(model: RWKV, held: Held, rows: int = 16, chunk: int = 512) -> tuple[float, float]:
    """(nats per token, bits per byte): the stream is cut into `rows` long rows, read in chunks with carried state.

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
    return nats / targets.numel(), nats / log(2) / max(size, 1)
