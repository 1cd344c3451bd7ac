"""How well a model predicts a text: exact bits per byte.

    bits = - sum_t log2 p(token_t | token 0, tokens before t)

Owns: that every token is predicted, the first from the document boundary (id 0), and that the whole text before it is
context, carried by the state from chunk to chunk; so the figure does not depend on the chunk size.
Refuses to know: tasks, files, other compressors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from roost.checks import instance, whole
from roost.models.native import LanguageModel
from roost.state import State
from roost.tokenizer import WorldTokenizer


@dataclass(frozen=True)
class Score:
    """The cost of a text: `bits` for `bytes` bytes in `tokens` tokens, and the state that has read all of them."""

    bits: float
    bytes: int
    tokens: int
    state: State

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers and with compressors; 8 is knowing nothing about bytes."""
        return self.bits / self.bytes


@torch.no_grad()
def bits_per_byte(
    model: LanguageModel,
    tokenizer: WorldTokenizer,
    text: str | bytes,
    state: State | None = None,
    *,
    chunk: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Score `text` as a document of its own; `state` is what was read before its boundary. Memory ~ chunk * vocab.

    Raises ValueError for an empty text.
    """
    instance("tokenizer", tokenizer, WorldTokenizer, "roost.load gives None for a model without a World vocabulary")
    chunk = whole("chunk", chunk, 1)
    data = text.encode() if isinstance(text, str) else text
    if not data:
        raise ValueError("the text is empty: there is nothing to score")
    targets = tokenizer.encode(data)
    inputs = [tokenizer.eod, *targets]
    nats = 0.0
    for start in range(0, len(inputs), chunk):
        piece = torch.tensor([inputs[start : start + chunk]], dtype=torch.int64, device=model.device)
        logits, state = model(piece, state)
        wanted = torch.tensor(targets[start : start + chunk], dtype=torch.int64, device=model.device)
        found = logits[0, : len(wanted)]  # the last token of the text is read, but predicts nothing
        losses = F.cross_entropy(found if found.dtype == torch.float64 else found.float(), wanted, reduction="none")
        nats += losses.double().sum().item()
        if progress:
            progress(min(start + chunk, len(targets)), len(targets))
    assert state is not None
    return Score(nats / math.log(2), len(data), len(targets), state)
