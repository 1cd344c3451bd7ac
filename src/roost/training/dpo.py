"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, equation 7; label smoothing as cDPO).

    log p(answer | prompt)   sum of the log-probabilities of the answer's tokens, its end of turn included
    margin = beta ((log p - log p_ref)(chosen) - (log p - log p_ref)(rejected))
    loss   = -(1 - e) log sigmoid(margin) - e log sigmoid(-margin)         e: label smoothing; a mean over pairs

Length-normalised: all four log-probabilities are means over the tokens of their answer.

Owns: this loss as sums over pairs (the loop divides by pairs, not tokens, so that accumulation is exact), and the
reference's log-probabilities: computed once, kept in a file, and stale when the weights, the pairs, the precision or
the normalisation are others.
Refuses to know: files of pairs, optimisers, the loop.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from roost.data.batch import Batch
from roost.data.pairs import PairBatch, Reference
from roost.data.sft import Documents, packed_batch
from roost.files import disk_errors, replacing
from roost.models.rwkv import RWKV, fingerprint_of
from roost.training.loss import LARGEST_LOGITS, Sums

KIND = "roost dpo reference 1"
"""What the metadata of a reference file say it is."""


def answer_logprobs(
    model: RWKV, batch: Batch, *, normalise: bool = False, largest: int = LARGEST_LOGITS
) -> Float[Tensor, " sequences"]:
    """Log-probability of the targets >= 0 of every sequence of a packed row: their sum (`normalise`: mean), fp32.

    Only these positions reach the head; logits beyond `largest` elements are made in pieces, again in the backward
    pass. fp64 for a model in fp64. Raises ValueError for a batch that is not packed, or a sequence without targets.
    """
    if batch.cu_seqlens is None:
        raise ValueError("the batch has no cu_seqlens: give one that holds packed sequences")
    features, _ = model(batch.inputs, cu_seqlens=batch.cu_seqlens, head=False)
    kept = batch.targets[0] >= 0
    here = kept.cpu()
    counts = [int(here[a:b].sum()) for a, b in pairwise(batch.cu_seqlens)]
    if 0 in counts:
        raise ValueError(f"sequence {counts.index(0)} has no target: an answer must have at least one token")
    x, wanted = features[0][kept], batch.targets[0][kept]
    rows = max(1, largest // model.config.vocab_size)
    if len(x) <= rows:
        logprobs = _logprobs(model.head, x, wanted)
    else:
        pieces = zip(x.split(rows), wanted.split(rows), strict=True)
        logprobs = torch.cat(
            [cast(Tensor, checkpoint(_logprobs, model.head, a, b, use_reentrant=False)) for a, b in pieces]
        )
    return torch.stack([some.mean() if normalise else some.sum() for some in logprobs.split(counts)])


def _logprobs(head: Callable[[Tensor], Tensor], x: Tensor, wanted: Tensor) -> Tensor:
    logits = head(x)
    return -F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), wanted, reduction="none")


def reference_logprobs(
    model: RWKV,
    documents: Documents,
    path: str | os.PathLike[str] | None = None,
    *,
    precision: str = "fp32",
    normalise: bool = False,
    tokens: int = 8192,
) -> Reference:
    """Log-probabilities of all answers of `read_pairs` under `model` as it is now: the reference of a run.

    path       the file that keeps them: read when it holds these very values, else written; None = keep nothing
    precision  of the products, "fp32", "bf16" or "fp16": that of the run, so that policy and reference begin equal
    tokens     positions read at a time, at least one answer

    Call it before training changes the weights, a resumed run before its checkpoint is loaded. Two sets of weights
    count as one when their fingerprints agree (`fingerprint_of`). In a process group every rank calls it, with the same
    whole model: each computes a share, and the main one writes. Raises ValueError when the file is something else,
    OSError when it cannot be written.
    """
    joined = dist.is_available() and dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    fingerprint = fingerprint_of(model.config, model.state_dict())
    digest = str(documents.identity["data_digest"])
    about = {"kind": KIND, "model": fingerprint, "data": digest, "precision": precision, "normalise": str(normalise)}
    stored = None if path is None else _stored(Path(path), about, len(documents))
    held = torch.tensor(stored is not None, dtype=torch.int32, device=model.device)
    if joined:
        dist.all_reduce(held)
    if stored is not None and int(held) == ranks:
        return Reference(stored, fingerprint)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    found = torch.zeros(len(documents), device=model.device)
    training, device = model.training, model.device
    model.eval()  # no dropout
    try:
        with torch.no_grad(), torch.autocast(device.type, dtypes[precision], enabled=precision != "fp32"):
            for numbers in _by_size(documents.lengths.tolist(), tokens)[rank::ranks]:
                batch = packed_batch(documents, numbers).to(device)
                found[numbers] = answer_logprobs(model, batch, normalise=normalise).float()
    finally:
        model.train(training)
    if joined:
        dist.all_reduce(found)  # every place is zero but on one rank
    values: NDArray[np.float32] = found.cpu().numpy()
    if path is not None and rank == 0:
        with replacing(path) as temporary, disk_errors(path):
            save_file({"logprobs": values}, temporary, about)
    return Reference(values, fingerprint)


def _by_size(lengths: list[int], most: int) -> list[list[int]]:
    """The numbers 0 .. n - 1 in groups of at most `most` positions, or of one."""
    groups: list[list[int]] = []
    size = most
    for number, length in enumerate(lengths):
        if size + length > most:
            groups.append([])
            size = 0
        groups[-1].append(number)
        size += length
    return groups


def _stored(path: Path, about: dict[str, str], count: int) -> NDArray[np.float32] | None:
    """The values in a file, None when it is missing or stale. Raises ValueError when it is no reference file."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "numpy") as opened:
            file: Any = opened  # safetensors leaves it untyped
            found: dict[str, str] = file.metadata() or {}
            if found.get("kind") != KIND:
                raise ValueError(f"{path} is no reference file of roost, and is left as it is: choose another name")
            if found != about:
                return None
            values: NDArray[np.float32] = file.get_tensor("logprobs")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or no reference file: delete it or choose another name ({error})"
        ) from None
    return values if values.shape == (count,) and bool(np.isfinite(values).all()) else None


def pair_losses(
    policy: Float[Tensor, " answers"], reference: Float[Tensor, " answers"], beta: float, label_smoothing: float = 0.0
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """(loss, margin) of each pair, from log-probabilities (2 n,) in the order chosen, rejected, chosen ..."""
    gained = (policy - reference).view(-1, 2)
    margin = beta * (gained[:, 0] - gained[:, 1])
    e = label_smoothing
    return -(1 - e) * F.logsigmoid(margin) - e * F.logsigmoid(-margin), margin


@dataclass
class Dpo:
    """The objective: sums over the pairs of a `PairBatch`.

    beta             how strongly the policy is held to the reference; the smaller, the farther it may go
    label_smoothing  the share of pairs that are believed to be the wrong way round, 0 <= e < 0.5
    normalise        log-probabilities are means over an answer's tokens; the reference must be made the same way

    Raises ValueError when a number is out of range.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    normalise: bool = False
    largest: int = field(default=LARGEST_LOGITS, repr=False)
    _totals: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_numbers(self.beta, self.label_smoothing)

    def count(self, batch: Batch) -> int:
        """What the loop divides by: pairs."""
        return len(batch.cu_seqlens or (0,)) // 2

    def __call__(self, model: RWKV, batch: Batch) -> Sums:
        """Sums over the pairs: the loss, the same detached, and how many pairs there are.

        Raises ValueError for a batch that does not come from a `PairLoader`.
        """
        if not isinstance(batch, PairBatch) or batch.reference is None:
            raise ValueError(f"the batch is a {type(batch).__name__}; DPO needs those of a PairLoader")
        policy = answer_logprobs(model, batch, normalise=self.normalise, largest=self.largest)
        losses, margin = pair_losses(policy, batch.reference.to(policy.dtype), self.beta, self.label_smoothing)
        loss, pairs = losses.sum(), self.count(batch)
        won = (margin.detach() > 0).sum()
        found = torch.stack([margin.detach().sum(), won.to(margin.dtype), margin.new_tensor(pairs)])
        self._totals = found if self._totals is None else self._totals + found
        return Sums(loss, loss.detach(), torch.tensor(pairs))

    def figures(self, total: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Means over the pairs seen since the last call: reward margin (in nats, times beta), and accuracy.

        Accuracy is the share of pairs whose margin is above 0. Empty when no pair was seen. `total` adds up a tensor
        over the ranks of a run, so that the means are over the pairs of all; None: those of this process.
        """
        if self._totals is None:
            return {}
        margin, won, pairs = (total(self._totals) if total else self._totals).tolist()
        self._totals = None
        return {"reward_margin": margin / pairs, "reward_accuracy": won / pairs}


def check_numbers(beta: float, label_smoothing: float) -> None:
    """Raise ValueError unless 0 < beta < infinity and 0 <= label_smoothing < 0.5."""
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta is {beta!r}; it must be a positive number, usually 0.01 to 0.5")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing!r}; it must be at least 0 and below 0.5")
