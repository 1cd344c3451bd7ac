"""A batch and its shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from roost.data.batch import Batch, samples


def test_rows_are_shared_out() -> None:
    inputs = torch.arange(12).view(6, 2)
    parts = Batch(inputs, inputs + 1).split(3)
    assert torch.equal(torch.cat([part.inputs for part in parts]), inputs)
    assert torch.equal(parts[1].targets, inputs[2:4] + 1)
    assert [part.cu_seqlens for part in parts] == [None] * 3


def test_a_packed_row_is_cut_between_sequences() -> None:
    inputs = torch.arange(8)[None]
    one, two = Batch(inputs, inputs + 1, (0, 1, 4, 6, 8)).split(2)
    assert one.cu_seqlens == (0, 1, 4) and two.cu_seqlens == (0, 2, 4)
    assert two.inputs.tolist() == [[4, 5, 6, 7]] and two.targets.tolist() == [[5, 6, 7, 8]]


@pytest.mark.parametrize(
    ("cu_seqlens", "parts", "message"),
    [
        (None, 4, "6 rows cannot be cut in 4 equal shares"),
        (None, 0, "6 rows cannot be cut in 0"),
        ((0, 5, 6), 4, "6 tokens cannot be cut in 4"),
        ((0, 5, 6), 2, "a sequence lies across token 3"),
    ],
)
def test_unequal_shares_are_refused(cu_seqlens: tuple[int, ...] | None, parts: int, message: str) -> None:
    inputs = torch.zeros(6, 1, dtype=torch.int64) if cu_seqlens is None else torch.zeros(1, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        Batch(inputs, inputs, cu_seqlens).split(parts)


def test_the_samples_of_a_step_are_counted_over_the_run() -> None:
    assert samples(6, 2, 0, 1) == range(12, 18)
    assert [samples(6, 2, part, 3) for part in range(3)] == [range(12, 14), range(14, 16), range(16, 18)]


@pytest.mark.parametrize(
    ("step", "part", "parts", "message"),
    [
        (-1, 0, 1, "step is -1"),
        (1.0, 0, 1, "step is 1.0; it must be a whole number"),
        (0, 0, 4, "6 pairs cannot be cut in 4"),
        (0, 0, 2.0, "parts is 2.0; it must be a whole number"),
        (0, 2, 2, "part is 2"),
        (0, True, 2, "part is True; it must be a whole number"),
    ],
)
def test_samples_that_do_not_exist_are_refused(step: Any, part: Any, parts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        samples(6, step, part, parts, "pairs")


def test_to_moves_everything() -> None:
    moved = Batch(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64), (0, 2)).to("meta")
    assert moved.inputs.is_meta and moved.targets.is_meta and moved.cu_seqlens == (0, 2)
