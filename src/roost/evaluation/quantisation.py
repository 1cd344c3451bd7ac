"""What rounding the weights costs: another form of a model against its exact one, on real text.

    KL = mean over tokens of sum_v p(v) (ln p(v) - ln q(v)),  p exact, q rounded, both having read the same text

Owns: these figures. Perplexity alone hides damage: KL and the share of tokens whose first choice stays the same do not.
Refuses to know: how weights are rounded, files, speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from roost.checks import integers, whole
from roost.models.native import LanguageModel
from roost.state import State


@dataclass(frozen=True)
class Quality:
    """How far a model is from its exact form.

    kl            mean Kullback-Leibler divergence per token, in nats; 0 is the same distribution
    kl_99         its 99th percentile over the tokens: the worst places
    top1          share of tokens with the same most probable next token
    bits, exact_bits   that the text costs: sum of -log2 of the probabilities given to its tokens
    tokens        predicted
    """

    kl: float
    kl_99: float
    top1: float
    bits: float
    exact_bits: float
    tokens: int


@torch.no_grad()
def compare(
    exact: LanguageModel,
    rounded: LanguageModel,
    tokens: Sequence[int],
    *,
    chunk: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> Quality:
    """Let both models read a document (token 0 first) and compare what they expect at every place, in fp64.

    Memory ~ chunk * vocab. Raises ValueError for an empty text and for models with different vocabularies.
    """
    ids, chunk = integers("tokens", tokens), whole("chunk", chunk, 1)
    if not ids:
        raise ValueError("the text is empty: there is nothing to compare")
    if exact.config.vocab_size != rounded.config.vocab_size:
        raise ValueError(
            f"vocabularies of {exact.config.vocab_size} and {rounded.config.vocab_size} cannot be compared"
        )
    inputs = [0, *ids[:-1]]
    states: list[State | None] = [None, None]
    divergences: list[torch.Tensor] = []
    same, bits = 0, [0.0, 0.0]
    for start in range(0, len(ids), chunk):
        piece, wanted = torch.tensor([inputs[start : start + chunk]]), torch.tensor(ids[start : start + chunk])
        log_p: list[torch.Tensor] = []
        for i, model in enumerate((exact, rounded)):
            logits, states[i] = model(piece.to(model.device), states[i])
            log_p.append(F.log_softmax(logits[0].double().cpu(), -1))
            bits[i] -= float(log_p[i].gather(1, wanted[:, None]).sum()) / math.log(2)
        p, q = log_p
        divergences.append((p.exp() * (p - q)).sum(-1))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        if progress:
            progress(min(start + chunk, len(ids)), len(ids))
    kl = torch.cat(divergences)
    worst = float(kl.sort().values[(99 * (len(kl) - 1) + 50) // 100])
    return Quality(float(kl.mean()), worst, same / len(ids), bits[1], bits[0], len(ids))
