"""The one place where a run on several devices differs from a run on one.

Owns: the names of the collective steps. A gradient is a sum over ranks: every rank has divided by the count of all.
Refuses to know: process groups (see distributed.py) and how a step is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from roost.data.batch import Batches
from roost.training.config import TrainConfig
from roost.training.resume import Position, Settings, Trained, restore, save


class Reducer(Protocol):
    """What the loop asks of all ranks together; every rank calls the same methods in the same order."""

    @property
    def rank(self) -> int:
        """This process, 0..ranks - 1: it reads shares rank * accumulate .. of every batch."""
        ...

    @property
    def ranks(self) -> int:
        """How many processes share every batch."""
        ...

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs, checkpoints and the model."""
        ...

    def shares(self, data: Batches, config: TrainConfig) -> Batches:
        """What the loop takes this rank's `accumulate` shares of `ranks * accumulate` from: `data`, or a cut of it.

        Raises ValueError for a run that these ranks cannot make.
        """
        ...

    def sum_counts(self, count: int) -> int:
        """The sum over ranks."""
        ...

    def max_counts(self, count: int) -> int:
        """The largest over ranks."""
        ...

    def sum_values(self, values: Tensor) -> Tensor:
        """The elementwise sum over ranks of a small tensor."""
        ...

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over ranks."""
        ...

    def barrier(self) -> None:
        """Wait until every rank is here."""
        ...

    def save(self, out: Path, position: Position, trained: Trained, settings: Settings, keep: int) -> Path:
        """Write a checkpoint of all ranks, as `resume.save`. Raises OSError, on every rank, when a disk is full."""
        ...

    def restore(self, out: Path, trained: Trained, settings: Settings) -> Position:
        """Go on from the newest checkpoint, as `resume.restore`."""
        ...

    def export(self, write: Callable[[], Path]) -> Path:
        """Call `write` on the main rank while the model's parameters are whole there; its answer, on every rank."""
        ...


class Alone:
    """One process: nothing to add up."""

    rank, ranks, is_main = 0, 1, True

    def shares(self, data: Batches, config: TrainConfig) -> Batches:
        """The data."""
        return data

    def sum_counts(self, count: int) -> int:
        """The count."""
        return count

    def max_counts(self, count: int) -> int:
        """The count."""
        return count

    def sum_values(self, values: Tensor) -> Tensor:
        """The values."""
        return values

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Nothing."""

    def barrier(self) -> None:
        """Nothing."""

    def save(self, out: Path, position: Position, trained: Trained, settings: Settings, keep: int) -> Path:
        """`resume.save`."""
        return save(out, position, trained, settings, keep)

    def restore(self, out: Path, trained: Trained, settings: Settings) -> Position:
        """`resume.restore`."""
        return restore(out, trained, settings)

    def export(self, write: Callable[[], Path]) -> Path:
        """Write."""
        return write()
