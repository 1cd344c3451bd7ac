"""Batches: every window once an epoch, a function of the step alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roost import PRESETS
from roost.data.batch import Batches
from roost.data.binidx import write_tokens
from roost.data.loader import NO_LOSS, PackedLoader, TokenLoader
from roost.data.order import magic
from roost.models.rwkv import RWKV


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
        (16.0, 1, 0, "ctx is 16.0; it must be a whole number"),
        (16, True, 0, "batch is True; it must be a whole number"),
        (16, 1, 0.5, "seed is 0.5; it must be a whole number"),
        (1000, 1, 0, "has 1000 tokens; ctx 1000 needs at least 1001"),
    ],
)
def test_bad_numbers_are_refused(counting: Path, ctx: Any, batch: Any, seed: Any, message: str) -> None:
    for kind in (TokenLoader, PackedLoader)[: 1 if "needs at least" in message else 2]:
        with pytest.raises(ValueError, match=message):
            kind(counting, ctx, batch, seed=seed)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    write_tokens(tmp_path / "none", [])
    with pytest.raises(ValueError, match="has 0 tokens"):
        TokenLoader(tmp_path / "none", 1, 1)


def test_a_negative_step_is_refused(counting: Path) -> None:
    with pytest.raises(ValueError, match="step is -1"):
        TokenLoader(counting, 10, 1).batch_at(-1)


def test_the_shares_of_a_step_are_its_rows(counting: Path) -> None:
    """Whatever the ranks and micro-batches: the same data in the same order."""
    for loader in (TokenLoader(counting, 10, 12, seed=5), PackedLoader(counting, 10, 12, seed=5)):
        assert isinstance(loader, Batches)
        for step in (0, 7, 8):  # across the border of an epoch
            whole = loader.batch_at(step)
            for parts in (1, 2, 3, 12):
                shares = [loader.batch_at(step, part, parts) for part in range(parts)]
                for share, wanted in zip(shares, whole.split(parts), strict=True):
                    assert torch.equal(share.inputs, wanted.inputs) and torch.equal(share.targets, wanted.targets)
                    assert share.cu_seqlens == wanted.cu_seqlens
        with pytest.raises(ValueError, match="12 rows cannot be cut in 5"):
            loader.batch_at(0, 0, 5)
        with pytest.raises(ValueError, match="part is 2"):
            loader.batch_at(0, 2, 2)


def test_the_file_in_its_order_and_in_that_of_rwkv_lm(counting: Path) -> None:
    assert starts(TokenLoader(counting, 100, 2, order="sequential"), 12) == [*range(9), 0, 1, 2]
    loader = TokenLoader(counting, 9, 3, order="magic")
    assert loader.windows == 107  # the largest prime that is 2 mod 3 below 1000 // 9 = 111
    assert starts(loader, 120) == [magic(k, 107) for k in range(120)]
    with pytest.raises(ValueError, match="order is 'majic'; did you mean 'magic'"):
        TokenLoader(counting, 10, 3, order="majic")  # pyright: ignore[reportArgumentType]


def test_the_identity_names_all_that_decides(counting: Path, tmp_path: Path) -> None:
    write_tokens(tmp_path / "other", [range(1, 500), range(501, 1000)])
    write_tokens(tmp_path / "cut", [range(1, 400), [*range(401, 1000)]])
    loaders = [
        TokenLoader(counting, 10, 4),
        TokenLoader(counting, 11, 4),
        TokenLoader(counting, 10, 5),
        TokenLoader(counting, 10, 4, seed=1),
        TokenLoader(counting, 10, 4, order="sequential"),
        TokenLoader(tmp_path / "other", 10, 4),
        PackedLoader(counting, 10, 4),
        PackedLoader(counting, 10, 4, seed=1),
        PackedLoader(tmp_path / "other", 10, 4),
        PackedLoader(tmp_path / "cut", 10, 4),
    ]
    identities = [loader.identity for loader in loaders]
    assert all(identities.count(identity) == 1 for identity in identities)
    magic_order = [TokenLoader(counting, 9, 4, seed=seed, order="magic").identity for seed in (0, 1)]
    assert magic_order[0] == magic_order[1]  # the seed decides nothing there


DOCUMENTS = [[11, 12, 13], [], [21], [31, 32, 33, 34, 35, 36, 37, 38, 39], [41, 42, 43, 44, 45], [51, 52]]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 4, 1, 2, 10, 6 and 3 tokens, the closing 0 included."""
    path = tmp_path_factory.mktemp("packed") / "several"
    write_tokens(path, DOCUMENTS)
    return path


@given(ctx=st.integers(1, 12), batch=st.integers(1, 5), seed=st.integers(0, 2**64 - 1))
def test_packed_documents(several: Path, ctx: int, batch: int, seed: int) -> None:
    """Each piece of a document is a sequence of its own; every token is a target once an epoch, padding never."""
    loader = PackedLoader(several, ctx, batch, seed=seed)
    wanted: list[tuple[list[int], list[int]]] = []
    for document in DOCUMENTS:
        inputs, targets = [0, *document], [*document, 0]
        wanted += [(inputs[i : i + ctx], targets[i : i + ctx]) for i in range(0, len(inputs), ctx)]
    for epoch in range(2):
        found: list[tuple[list[int], list[int]]] = []
        for sample in range(epoch * loader.windows, (epoch + 1) * loader.windows):
            step, row = divmod(sample, batch)
            one = loader.batch_at(step, row, batch)
            assert one.inputs.shape == one.targets.shape == (1, ctx) and one.cu_seqlens
            assert one.cu_seqlens[0] == 0 and one.cu_seqlens[-1] == ctx
            for start, end in zip(one.cu_seqlens[:-1], one.cu_seqlens[1:], strict=True):
                assert start < end
                inputs, targets = one.inputs[0, start:end].tolist(), one.targets[0, start:end].tolist()
                if set(targets) == {NO_LOSS}:
                    assert set(inputs) == {0}
                else:
                    found.append((inputs, targets))
        assert sorted(found) == sorted(wanted)
    assert loader.filled == 26 / (loader.windows * ctx)


@pytest.mark.parametrize("preset", ["finch-tiny", "eagle-tiny"])
def test_nothing_leaks_between_packed_documents(several: Path, preset: str) -> None:
    """The logits of a piece are those of the piece alone, and a changed token changes its own piece only."""
    model = RWKV(PRESETS[preset], dtype=torch.float64)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(weight.numel()))
    batch = PackedLoader(several, 6, 5).batch_at(0)
    assert batch.cu_seqlens and len(batch.cu_seqlens) > 7
    with torch.no_grad():
        together, _ = model(batch.inputs, cu_seqlens=batch.cu_seqlens)
        for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            alone, _ = model(batch.inputs[:, start:end])
            torch.testing.assert_close(together[:, start:end], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [TokenLoader, PackedLoader])
@pytest.mark.parametrize("change", ["cut short", "written over", "replaced", "gone"])
def test_a_file_that_changes_is_noticed(
    tmp_path: Path, kind: type[TokenLoader] | type[PackedLoader], change: str
) -> None:
    write_tokens(tmp_path / "x", [range(1, 500)])
    loader, file = kind(tmp_path / "x", 10, 2), tmp_path / "x.bin"
    before = loader.batch_at(0)
    if change == "cut short":
        os.truncate(file, 100)
    elif change == "written over":
        file.write_bytes(file.read_bytes()[::-1])
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))  # clocks of file systems are coarse
    elif change == "replaced":
        (tmp_path / "y").write_bytes(file.read_bytes())
        shutil.copystat(file, tmp_path / "y")
        (tmp_path / "y").replace(file)
    else:
        file.unlink()
    with pytest.raises(ValueError, match=r"x\.bin changed or vanished during the run: put back what it was"):
        loader.batch_at(0)
    write_tokens(tmp_path / "x", [range(1, 500)])
    assert torch.equal(kind(tmp_path / "x", 10, 2).batch_at(0).inputs, before.inputs)


def test_packing_is_refused_without_tokens(tmp_path: Path) -> None:
    write_tokens(tmp_path / "none", [])
    with pytest.raises(ValueError, match="has 0 tokens"):
        PackedLoader(tmp_path / "none", 1, 1)
