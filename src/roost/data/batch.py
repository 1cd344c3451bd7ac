"""What the training loop needs of data: batches as a pure function of the step.

Owns: the form of a batch, its samples, and its cut into equal shares. A batch belongs to an optimiser step; ranks and
micro-batches read shares of it, so that the same data are seen for any number of them.
Refuses to know: files, orders, losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor

from roost.checks import whole


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what should follow each token.

    inputs      (B, T) int64, the ids that are read
    targets     (B, T) int64, the id that follows each; below 0 = no loss there
    cu_seqlens  None: every row is one sequence. Otherwise B = 1 and the row holds several, sequence i being
                [cu_seqlens[i], cu_seqlens[i + 1]); the first offset is 0, the last T, and nothing passes a border.
    """

    inputs: Int64[Tensor, "B T"]
    targets: Int64[Tensor, "B T"]
    cu_seqlens: tuple[int, ...] | None = None

    def split(self, parts: int) -> list[Batch]:
        """Equal shares, in order: of the rows, or of the one row of packed sequences, cut where a sequence ends.

        Raises ValueError when the batch has no such shares.
        """
        rows, length = self.inputs.shape
        if self.cu_seqlens is None:
            check_parts("rows", rows, parts)
            pieces = zip(self.inputs.chunk(parts), self.targets.chunk(parts), strict=True)
            return [Batch(inputs, targets) for inputs, targets in pieces]
        check_parts("tokens", length, parts)
        share, borders, shares = length // parts, set(self.cu_seqlens), []
        for start in range(0, length, share):
            if start not in borders:
                raise ValueError(f"a sequence lies across token {start}: this batch cannot be cut in {parts} shares")
            inside = [at - start for at in self.cu_seqlens if start <= at <= start + share]
            part = slice(start, start + share)
            shares.append(Batch(self.inputs[:, part], self.targets[:, part], tuple(inside)))
        return shares

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return Batch(self.inputs.to(device), self.targets.to(device), self.cu_seqlens)


@runtime_checkable
class Batches(Protocol):
    """Anything that yields batches as a pure function of the step: the position of a run is one integer.

    Some data know more, by these attributes; a run whose length is given in epochs needs the first two:

    windows          samples of an epoch, each read once (windows, rows of packed sequences, pairs)
    batch            samples of a step, so that an epoch has windows / batch steps
    tokens_per_step  a mean, where steps differ; without it the first batch is counted
    """

    @property
    def identity(self) -> Mapping[str, int | str]:
        """What decides the batches, by name; a resumed run must have the same."""
        ...

    def batch_at(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """Share `part` of `parts` of the batch of one step, the same every time; the shares in order are the batch."""
        ...


def check_parts(what: str, count: int, parts: int, part: int = 0) -> None:
    """Raise ValueError unless `count` rows (or tokens) have `parts` equal shares, the share `part` among them."""
    if whole("parts", parts) < 1 or count % parts:
        raise ValueError(f"{count} {what} cannot be cut in {parts} equal shares: choose a divisor of {count}")
    if not 0 <= whole("part", part) < parts:
        raise ValueError(f"part is {part}; the shares are numbered 0..{parts - 1}")


def samples(batch: int, step: int, part: int, parts: int, what: str = "rows") -> range:
    """The samples of share `part` of `parts` of one step, counted from 0 over the run; `what` they are, for errors.

    Raises ValueError when step is negative or `batch` samples have no such share.
    """
    step = whole("step", step, 0)
    check_parts(what, batch, parts, part)
    share = batch // parts
    first = step * batch + part * share
    return range(first, first + share)
