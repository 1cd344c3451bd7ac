"""Greedy longest match in Python: the specification of the native one, and what runs where that is missing.

Owns: the law that makes encoding local. Two bytes that are adjacent inside no token are a *hard boundary*, and what
lies left of one is encoded independently of what lies right of it. Text is cut at every hard boundary into short units,
and the ids of a unit are remembered. And the law of an open end: an id is final as soon as no token begins with all of
the text from the id's first byte on and goes on behind it.
Refuses to know: text that is not bytes, decoding, threads.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from functools import cached_property
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

_WINDOW = 1 << 16  # bytes cut at a time: bounds memory, stays in cache
_PREFIX = 4  # bytes that decide which lengths can match; 4 makes text in many scripts fastest
_SHORT = (3, 2, 1)  # lengths below it, always possible
_UNITS_KEPT = 1 << 16
_UNIT_LENGTH_KEPT = 32  # longer units are rare and seldom come twice


class PythonMatcher:
    """Longest match over `tokens` (position is the id, empty ones are no tokens); all 256 bytes must be tokens."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._ids = {token: id for id, token in enumerate(tokens) if token}
        self._hard = hard_pairs(self._ids)
        self.units = _Units(self._ids)
        """The ids of short units already seen."""

    def encode(self, data: bytes) -> list[int]:
        """The ids of `data`."""
        ids: list[int] = []
        start, window = 0, _WINDOW
        while start < len(data):
            piece = data[start : start + window]
            cuts = [0, *self._cuts(piece).tolist()]
            if start + window >= len(data):
                cuts.append(len(piece))
            elif len(cuts) == 1:  # one unit fills the window and may go on behind it
                window *= 2
                continue
            units = [piece[left:right] for left, right in pairwise(cuts)]
            ids.extend(chain.from_iterable(map(self.units.__getitem__, units)))
            start += cuts[-1]
            window = _WINDOW
        return ids

    def encode_open(self, data: bytes) -> tuple[list[int], int]:
        """The ids that no continuation of `data` can change, and how many bytes they are."""
        cuts = self._cuts(data)
        start = int(cuts[-1]) if len(cuts) else 0
        ids = self.encode(data[:start])
        while start < len(data) and not self._begins_longer(data[start:]):
            id, length = self.units.first(data, start)
            ids.append(id)
            start += length
        return ids, start

    def _cuts(self, data: bytes) -> NDArray[np.intp]:
        """The positions of all hard boundaries."""
        array = np.frombuffer(data, np.uint8)
        return np.flatnonzero(self._hard[array[:-1].astype(np.uint16) << 8 | array[1:]]) + 1

    def _begins_longer(self, rest: bytes) -> bool:
        """Whether a token begins with `rest` and goes on."""
        after = bisect_right(self._sorted, rest)
        return after < len(self._sorted) and self._sorted[after].startswith(rest)

    @cached_property
    def _sorted(self) -> list[bytes]:
        return sorted(self._ids)


class _Units(dict[bytes, tuple[int, ...]]):
    """The ids of short units already seen; looking up another one matches it. Bounded: it starts afresh when full."""

    def __init__(self, ids: dict[bytes, int]) -> None:
        super().__init__()
        self.ids = ids
        found: dict[bytes, set[int]] = {}
        for token in ids:
            if len(token) >= _PREFIX:
                found.setdefault(token[:_PREFIX], set()).add(len(token))
        self._lengths = {prefix: (*sorted(lengths, reverse=True), *_SHORT) for prefix, lengths in found.items()}

    def __missing__(self, unit: bytes) -> tuple[int, ...]:
        matched: list[int] = []
        start = 0
        while start < len(unit):
            id, length = self.first(unit, start)
            matched.append(id)
            start += length
        if len(unit) <= _UNIT_LENGTH_KEPT:
            if len(self) >= _UNITS_KEPT:
                self.clear()
            self[unit] = tuple(matched)
        return tuple(matched)

    def first(self, data: bytes, start: int) -> tuple[int, int]:
        """Id and length of the longest match at `start`: tries the lengths of tokens with these first four bytes."""
        for length in self._lengths.get(data[start : start + _PREFIX], _SHORT):
            stop = start + length
            if stop <= len(data) and (id := self.ids.get(data[start:stop])) is not None:
                return id, length
        raise AssertionError(f"no token for the byte {data[start]}")


def hard_pairs(tokens: Collection[bytes]) -> NDArray[np.bool_]:
    """(65536,) indexed by 256 * left + right: True when they are adjacent inside no token (none may be empty)."""
    data = np.frombuffer(b"".join(tokens), np.uint8).astype(np.uint16)
    inside = np.ones(len(data), np.bool_)
    inside[np.cumsum([len(token) for token in tokens]) - 1] = False  # the last byte of a token has no right neighbour
    hard = np.ones(65536, np.bool_)
    hard[(data[:-1] << 8 | data[1:])[inside[:-1]]] = False
    return hard
