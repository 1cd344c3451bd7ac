"""Packing: which pieces of text share a row.

Owns: best-fit decreasing. The longest piece goes first, each into the fullest row that still has room for it. It works
on the histogram of lengths, so that time follows the number of different lengths, not of pieces (Krell et al. 2021,
arXiv:2107.02027, pack histograms too).
Refuses to know: tokens, files, the order in which rows are read.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


class Packed(NamedTuple):
    """Row i holds the pieces `pieces[borders[i] : borders[i + 1]]`, in that order.

    pieces   (N,) int64, every piece once, by its position in `lengths`
    borders  (rows + 1,) int64, from 0 to N
    """

    pieces: Integers
    borders: Integers

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.borders) - 1

    def row(self, i: int) -> Integers:
        """The pieces of row `i`."""
        return self.pieces[self.borders[i] : self.borders[i + 1]]


def pack(lengths: NDArray[Any], capacity: int, seed: int = 0) -> Packed:
    """Rows of at most `capacity` tokens from pieces of `lengths` (N,) tokens, the same for the same arguments.

    seed  which of several pieces of one length goes where, and the order of the pieces in a row; 0 <= seed < 2**64

    Raises ValueError when a piece is empty or longer than a row.
    """
    lengths = np.asarray(lengths, np.int64)
    if capacity < 1:
        raise ValueError(f"capacity is {capacity}; it must be at least 1")
    wrong = (lengths < 1) | (lengths > capacity)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ValueError(f"piece {first} has {lengths[first]} tokens; a row holds 1 to {capacity}: cut or drop it")
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64)))
    shuffled = generator.permutation(len(lengths))
    by_length = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    row_of = _rows(lengths[by_length], capacity)
    shuffled = generator.permutation(len(lengths))
    grouped = shuffled[np.argsort(row_of[shuffled], kind="stable")]
    counts = np.bincount(row_of) if len(row_of) else np.empty(0, np.int64)
    return Packed(by_length[grouped], np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]).astype(np.int64))


def _rows(lengths: Integers, capacity: int) -> Integers:
    """The row of each piece; `lengths` fall."""
    row_of = np.empty(len(lengths), np.int64)
    room: dict[int, list[Integers]] = {}  # free tokens: the rows that have so many
    free: list[int] = []  # the keys of `room`, climbing
    rows, start = 0, 0

    def put_back(left: int, some: Integers) -> None:
        if left and len(some):
            if left not in room:
                insort(free, left)
            room.setdefault(left, []).append(some)

    ends = np.append(np.flatnonzero(np.diff(lengths)) + 1, len(lengths))
    for end in ends.tolist():
        while start < end:
            length, wanted = int(lengths[start]), end - start
            place = bisect_left(free, length)
            if place < len(free):
                here = free.pop(place)
                some = np.concatenate(room.pop(here))
            else:
                here, some = capacity, np.arange(rows, rows + -(-wanted // (capacity // length)))
                rows += len(some)
            each = here // length  # the fullest row that has room stays the fullest until it has none
            used, rest = divmod(min(wanted, each * len(some)), each)
            row_of[start : start + used * each] = np.repeat(some[:used], each)
            row_of[start + used * each : start + used * each + rest] = some[used : used + 1].repeat(rest)
            start += used * each + rest
            put_back(here - each * length, some[:used])
            if rest:
                put_back(here - rest * length, some[used : used + 1])
            put_back(here, some[used + bool(rest) :])
    return row_of
