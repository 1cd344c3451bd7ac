"""Best-fit decreasing: against the textbook's loop, and the promises of a packing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost.data.packing import pack


def textbook(lengths: list[int], capacity: int) -> list[int]:
    """The tokens in each row: every piece, longest first, goes where it leaves the least room (ties change nothing)."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        room = [row for row in rows if sum(row) + length <= capacity]
        if room:
            max(room, key=sum).append(length)
        else:
            rows.append([length])
    return sorted(map(sum, rows))


cases = st.integers(1, 30).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=60))
)


@given(cases, st.integers(0, 2**64 - 1))
def test_it_is_best_fit_decreasing(case: tuple[int, list[int]], seed: int) -> None:
    capacity, lengths = case
    packed = pack(np.array(lengths, np.int64), capacity, seed)
    assert sorted(packed.pieces.tolist()) == list(range(len(lengths)))
    rows = [packed.row(i).tolist() for i in range(packed.rows)]
    assert sorted(sum(lengths[piece] for piece in row) for row in rows) == textbook(lengths, capacity)


def test_the_seed_decides_and_nothing_else() -> None:
    lengths = np.array([3, 3, 3, 3, 5, 5, 7] * 20)
    one, same, other = pack(lengths, 10, 1), pack(lengths, 10, 1), pack(lengths, 10, 2)
    assert np.array_equal(one.pieces, same.pieces) and np.array_equal(one.borders, same.borders)
    assert not np.array_equal(one.pieces, other.pieces)


@pytest.mark.parametrize(
    ("lengths", "capacity", "message"),
    [([1, 5], 4, "piece 1 has 5 tokens; a row holds 1 to 4"), ([0], 4, "piece 0 has 0"), ([1], 0, "capacity is 0")],
)
def test_what_does_not_fit_is_refused(lengths: list[int], capacity: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(np.array(lengths), capacity)
