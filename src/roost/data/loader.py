"""Training batches from a token file.

Owns: what a row is. TokenLoader reads the stream as one sequence: window i is tokens [i ctx, i ctx + ctx], so
neighbours share one token and every token but the first is a target exactly once; a 0 closes each document, and the
state is not reset there, as in RWKV-LM. PackedLoader reads documents: nothing passes from one to another. Sample k =
step batch + row lies at position k of an order (roost.data.order), a function of (seed, k) alone: the position of a
run is the integer `step`, and nothing else need be saved to resume it.
Refuses to know: models, devices, ranks.
"""

from __future__ import annotations

import hashlib
import os
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from roost.checks import choice, whole
from roost.data.batch import Batch, samples
from roost.data.binidx import TokenFile
from roost.data.order import Order, magic, magic_prime, sequential, shuffled
from roost.data.packing import pack

NO_LOSS = -100
"""The target of what is not a target."""


class TokenLoader:
    """Batches of windows from a token file, as a function of the step.

    path   the file (see TokenFile)
    ctx    tokens a row
    batch  rows a batch
    seed   of the order, 0 <= seed < 2**64; "shuffle" alone asks for it
    order  "shuffle" (every epoch in its own order), "sequential", or "magic" (RWKV-LM's)

    `windows` is the number of windows, visited once an epoch; with "magic" those below its prime. A shuffled epoch's
    order is held in memory (8 bytes a window). Raises ValueError when a number is out of range, the file has fewer than
    ctx + 1 tokens, or there is no prime.
    """

    def __init__(
        self, path: str | os.PathLike[str], ctx: int, batch: int, *, seed: int = 0, order: Order = "shuffle"
    ) -> None:
        choice("order", order, get_args(Order))
        self.ctx, self.batch, self.order = whole("ctx", ctx, 1), whole("batch", batch, 1), order
        self.seed = whole("seed", seed, 0, 2**64 - 1)
        self.file = TokenFile(path)
        self.windows = (len(self.file) - 1) // self.ctx
        if self.windows < 1:
            raise ValueError(f"{path} has {len(self.file)} tokens; ctx {ctx} needs at least {ctx + 1}: choose less")
        if order == "magic":
            self.windows = magic_prime(len(self.file) // self.ctx)

    @property
    def identity(self) -> dict[str, int | str]:
        """What decides the batches: the stream (its size, a digest of 65,536 spread tokens), ctx, batch and order."""
        order = {"order": self.order, **({"data_seed": self.seed} if self.order == "shuffle" else {})}
        return {**_digest(self.file), "ctx": self.ctx, "batch": self.batch, **order}

    def batch_at(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """Share `part` of `parts` of one step's batch: rows of ctx tokens; targets are inputs moved on by one token.

        Raises ValueError when step is negative, `batch` rows have no such share, or the file is not as it was opened.
        """
        self.file.check_unchanged()
        starts = [self._window(k) * self.ctx for k in samples(self.batch, step, part, parts)]
        rows = np.stack([self.file.tokens[start : start + self.ctx + 1] for start in starts]).astype(np.int64)
        tokens = torch.as_tensor(rows)
        return Batch(tokens[:, :-1], tokens[:, 1:])

    def _window(self, sample: int) -> int:
        if self.order == "sequential":
            return sequential(sample, self.windows)
        return magic(sample, self.windows) if self.order == "magic" else shuffled(sample, self.windows, self.seed)


class PackedLoader:
    """Batches of whole documents packed into rows, as a function of the step. Nothing leaks from one to another.

    path   the file (see TokenFile)
    ctx    tokens a row; a longer document is cut into pieces of ctx tokens, the last one shorter, and each piece begins
           anew: the state is not carried from one piece to the next
    batch  rows a step; they lie one behind the other in one row of batch ctx tokens, with cu_seqlens at every border
    seed   of the packing and of the order of rows, 0 <= seed < 2**64

    The input of a document is 0 and the document without its last token, that of a later piece begins with the last
    token of the piece before; so every token of the file is a target exactly once an epoch. What a row has left over is
    a sequence of its own without targets. The plan is made once, from the sizes of the documents (24 bytes a piece).
    `windows` is the number of rows, visited once an epoch, in an order of its own each.
    Raises ValueError when a number is out of range or the file holds no tokens.
    """

    def __init__(self, path: str | os.PathLike[str], ctx: int, batch: int, *, seed: int = 0) -> None:
        self.ctx, self.batch = whole("ctx", ctx, 1), whole("batch", batch, 1)
        self.seed = whole("seed", seed, 0, 2**64 - 1)
        self.file = TokenFile(path)
        if not len(self.file):
            raise ValueError(f"{path} has 0 tokens: there is nothing to pack")
        self._starts, self._ends, self._first = _pieces(self.file.borders, self.ctx)
        self._packed = pack(self._ends - self._starts, self.ctx, self.seed)
        self.windows = self._packed.rows

    @property
    def identity(self) -> dict[str, int | str]:
        """What decides the batches: the stream, the borders of its documents, ctx, batch and seed."""
        borders = hashlib.sha256(np.ascontiguousarray(self.file.borders).tobytes()).hexdigest()[:16]
        packing = {"packing": "documents", "documents_digest": borders}
        return {**_digest(self.file), **packing, "ctx": self.ctx, "batch": self.batch, "data_seed": self.seed}

    @property
    def filled(self) -> float:
        """The share of all places that hold a target."""
        return len(self.file) / (self.windows * self.ctx)

    def batch_at(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """Share `part` of `parts` of one step's batch: one row of batch / parts rows of the plan, and its borders.

        Raises ValueError when step is negative, `batch` rows have no such share, or the file is not as it was opened.
        """
        self.file.check_unchanged()
        chosen = samples(self.batch, step, part, parts)
        inputs = np.zeros((1, len(chosen) * self.ctx), np.int64)
        targets = np.full_like(inputs, NO_LOSS)
        borders = [0]
        for place, sample in enumerate(chosen):
            at = place * self.ctx
            for piece in self._packed.row(shuffled(sample, self.windows, self.seed)).tolist():
                start, end = int(self._starts[piece]), int(self._ends[piece])
                tokens = self.file.tokens[start:end]
                inputs[0, at] = 0 if self._first[piece] else self.file.tokens[start - 1]
                inputs[0, at + 1 : at + end - start] = tokens[:-1]
                targets[0, at : at + end - start] = tokens
                at += end - start
                borders.append(at)
            if at < (place + 1) * self.ctx:
                borders.append((place + 1) * self.ctx)
        return Batch(torch.as_tensor(inputs), torch.as_tensor(targets), tuple(borders))


def _digest(file: TokenFile) -> dict[str, int | str]:
    spread = np.ascontiguousarray(file.tokens[:: max(1, len(file) // 65536)])
    return {"data_tokens": len(file), "data_digest": hashlib.sha256(spread.tobytes()).hexdigest()[:16]}


def _pieces(borders: NDArray[np.int64], ctx: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Where the pieces of all documents start and end, and which of them begin a document."""
    sizes = np.diff(borders)
    counts = -(-sizes // ctx)
    document = np.repeat(np.arange(len(sizes)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = borders[:-1][document] + number * ctx
    return starts, np.minimum(starts + ctx, borders[1:][document]), number == 0
