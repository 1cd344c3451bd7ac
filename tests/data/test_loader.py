"""Batches: every window once an epoch, a function of the step alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roost.data.binidx import write_tokens
from roost.data.loader import TokenLoader


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stream of 1000 tokens in which token i is i + 1, but for the closing 0."""
    path = tmp_path_factory.mktemp("tokens") / "counting"
    write_tokens(path, [range(1, 1000)])
    return path


def starts(loader: TokenLoader, samples: int) -> list[int]:
    """The window that each of the first samples reads, from its first token."""
    rows = [loader.batch_at(step).inputs for step in range(-(-samples // loader.batch))]
    return ((torch.cat(rows)[:samples, 0] - 1) // loader.ctx).tolist()


def test_inputs_and_targets_are_the_stream_moved_by_one(counting: Path) -> None:
    batch = TokenLoader(counting, 16, 4).batch_at(3)
    inputs, targets = batch.inputs, batch.targets
    assert batch.cu_seqlens is None
    assert inputs.shape == targets.shape == (4, 16)
    assert inputs.dtype == targets.dtype == torch.int64
    for row in range(4):
        first = int(inputs[row, 0])
        assert first % 16 == 1
        assert inputs[row].tolist() == list(range(first, first + 16))
        assert targets[row].tolist() == list(range(first + 1, first + 17))


@given(ctx=st.integers(1, 999), batch=st.integers(1, 40), seed=st.integers(0, 2**64 - 1))
def test_every_window_exactly_once_an_epoch(counting: Path, ctx: int, batch: int, seed: int) -> None:
    loader = TokenLoader(counting, ctx, batch, seed=seed)
    assert loader.windows == 999 // ctx
    order = starts(loader, 2 * loader.windows)
    assert sorted(order[: loader.windows]) == list(range(loader.windows))
    assert sorted(order[loader.windows :]) == list(range(loader.windows))


def test_every_token_but_the_first_is_a_target(counting: Path) -> None:
    loader = TokenLoader(counting, 27, 37)  # 37 windows of 27 tokens: 999 targets
    assert sorted(loader.batch_at(0).targets.flatten().tolist()) == [0, *range(2, 1000)]


def test_the_batch_is_a_function_of_the_step(counting: Path) -> None:
    loader = TokenLoader(counting, 10, 7, seed=5)
    wanted = [loader.batch_at(step) for step in range(40)]  # almost three epochs
    for step in (39, 0, 14, 13, 27, 14):
        fresh = TokenLoader(counting, 10, 7, seed=5)
        for source in (loader, fresh):
            found = source.batch_at(step)
            assert torch.equal(found.inputs, wanted[step].inputs)
            assert torch.equal(found.targets, wanted[step].targets)


def test_the_order_depends_on_seed_and_epoch_and_not_on_the_batch(counting: Path) -> None:
    order = starts(TokenLoader(counting, 10, 1), 198)
    assert order[:99] != order[99:]
    assert order == starts(TokenLoader(counting, 10, 66), 198)
    assert order != starts(TokenLoader(counting, 10, 1, seed=1), 198)
    assert order[:99] != list(range(99))
    assert starts(TokenLoader(counting, 10, 1, seed=2**64 - 1), 99) != starts(
        TokenLoader(counting, 10, 1, seed=2**64 - 2), 99
    )


def test_the_order_is_the_same_on_every_machine(counting: Path) -> None:
    assert starts(TokenLoader(counting, 100, 9, seed=3), 9) == [7, 6, 4, 1, 3, 8, 0, 5, 2]


def test_the_global_generator_is_left_alone(counting: Path) -> None:
    before = torch.random.get_rng_state()
    TokenLoader(counting, 10, 4).batch_at(0)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("ctx", "batch", "seed", "message"),
    [
        (0, 1, 0, "ctx is 0"),
        (1, 0, 0, "batch is 0"),
        (1, 1, -1, "seed is -1"),
        (1, 1, 2**64, "seed is 18446744073709551616"),
        (1000, 1, 0, "has 1000 tokens; ctx 1000 needs at least 1001"),
    ],
)
def test_bad_numbers_are_refused(counting: Path, ctx: int, batch: int, seed: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenLoader(counting, ctx, batch, seed=seed)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    write_tokens(tmp_path / "none", [])
    with pytest.raises(ValueError, match="has 0 tokens"):
        TokenLoader(tmp_path / "none", 1, 1)


def test_a_negative_step_is_refused(counting: Path) -> None:
    with pytest.raises(ValueError, match="step is -1"):
        TokenLoader(counting, 10, 1).batch_at(-1)
