"""Training batches from a token file.

Owns: the order of windows. The stream is read as one sequence; window i is tokens [i ctx, i ctx + ctx], so
neighbours share one token and every token but the first is a target exactly once. Sample k = step batch + row lies
in epoch k // windows, at place k % windows of that epoch's permutation, which is a function of (seed, epoch) alone:
the position of a run is the integer `step`, and nothing else need be saved to resume it.
Refuses to know: documents (a 0 closes each, the state is not reset there, as in RWKV-LM), models, devices.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np
import torch
from numpy.typing import NDArray

from roost.data.batch import Batch, check_parts
from roost.data.binidx import TokenFile


class TokenLoader:
    """Batches of windows from a token file, as a function of the step.

    path   the file (see TokenFile)
    ctx    tokens a row
    batch  rows a batch
    seed   of the order, 0 <= seed < 2**64

    `windows` is the number of windows, visited once an epoch. An epoch's order is held in memory (8 bytes a window).
    Raises ValueError when a number is out of range or the file has fewer than ctx + 1 tokens.
    """

    def __init__(self, path: str | os.PathLike[str], ctx: int, batch: int, *, seed: int = 0) -> None:
        if ctx < 1 or batch < 1:
            raise ValueError(f"ctx is {ctx} and batch is {batch}; both must be at least 1")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}; it must be at least 0 and below 2**64")
        self.file = TokenFile(path)
        self.ctx, self.batch, self.seed = ctx, batch, seed
        self.windows = (len(self.file) - 1) // ctx
        if self.windows < 1:
            raise ValueError(f"{path} has {len(self.file)} tokens; ctx {ctx} needs at least {ctx + 1}: choose less")
        self._orders: dict[int, NDArray[np.int64]] = {}

    @property
    def identity(self) -> dict[str, int | str]:
        """What decides the batches: the stream (its size and a digest of 65,536 spread tokens), ctx, batch and seed."""
        spread = np.ascontiguousarray(self.file.tokens[:: max(1, len(self.file) // 65536)])
        digest = hashlib.sha256(spread.tobytes()).hexdigest()[:16]
        size = {"tokens": len(self.file), "tokens_digest": digest}
        return {**size, "ctx": self.ctx, "batch": self.batch, "data_seed": self.seed}

    def batch_at(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """Share `part` of `parts` of one step's batch: rows of ctx tokens; targets are inputs moved on by one token.

        Raises ValueError when step is negative or `batch` rows have no such share.
        """
        if step < 0:
            raise ValueError(f"step is {step}; it must be at least 0")
        check_parts("rows", self.batch, parts, part)
        share = self.batch // parts
        first = step * self.batch + part * share
        starts = [self._window(k) * self.ctx for k in range(first, first + share)]
        rows = np.stack([self.file.tokens[start : start + self.ctx + 1] for start in starts]).astype(np.int64)
        tokens = torch.as_tensor(rows)
        return Batch(tokens[:, :-1], tokens[:, 1:])

    def _window(self, sample: int) -> int:
        epoch, place = divmod(sample, self.windows)
        if epoch not in self._orders:
            key = np.array([self.seed, epoch], np.uint64)  # a list with a large seed would pass through float64
            generator = np.random.Generator(np.random.Philox(key=key))
            # a batch touches one border between epochs unless the file is tiny; older orders are dropped
            self._orders = {epoch: generator.permutation(self.windows)}
        return int(self._orders[epoch][place])
