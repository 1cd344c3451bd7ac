"""The state: a value that can be saved, forked, batched and moved, and is never changed."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roost import PRESETS, State
from roost.state import LayerState


def filled(batch: int = 2, seed: int = 0, fingerprint: str = "f" * 64) -> State:
    g = torch.Generator().manual_seed(seed)
    zeros = State.zeros(PRESETS["finch-tiny"], batch)
    layers = tuple(LayerState(*(torch.randn(t.shape, generator=g) for t in layer)) for layer in zeros.layers)
    return State(layers, tuple(range(10, 10 + batch)), fingerprint)


def same(a: State, b: State) -> bool:
    pairs = [(x, y) for p, q in zip(a.layers, b.layers, strict=True) for x, y in zip(p, q, strict=True)]
    return a[1:] == b[1:] and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_file_keeps_every_bit(tmp_path: Path, batch: int) -> None:
    state = filled(batch)
    state.save(tmp_path / "s.state")
    assert same(State.load(tmp_path / "s.state"), state)
    (tmp_path / "plain").touch()  # others may read the one where they may read the other
    assert (tmp_path / "s.state").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_bf16_shift_and_no_alias(tmp_path: Path) -> None:
    zeros = State.zeros(PRESETS["finch-tiny"], dtype=torch.bfloat16)
    assert zeros.layers[0].att_shift.dtype == torch.bfloat16 and zeros.layers[0].wkv.dtype == torch.float32
    assert zeros.layers[0].att_shift.data_ptr() != zeros.layers[0].ffn_shift.data_ptr()
    zeros.save(tmp_path / "s")
    assert same(State.load(tmp_path / "s"), zeros)


@settings(max_examples=60)
@given(position=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(tmp_path_factory: pytest.TempPathFactory, position: int, bit: int) -> None:
    path = tmp_path_factory.mktemp("flip") / "s.state"
    state = filled(1)
    state.save(path)
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(data)
    try:
        loaded = State.load(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:  # white space of the header may change without a change of meaning
        assert same(loaded, state)


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "s.state"
    with pytest.raises(ValueError, match="no state file"):
        State.load(path)
    filled().save(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-8], b"hello" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"s\.state"):
            State.load(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not a roost state"):
        State.load(path)


def test_old_file_survives_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "s.state"
    filled(seed=1).save(path)
    with (
        mock.patch("safetensors.torch.save_file", side_effect=OSError(28, "No space left on device")),
        pytest.raises(OSError, match="No space"),
    ):
        filled(seed=2).save(path)
    assert same(State.load(path), filled(seed=1))
    assert list(tmp_path.iterdir()) == [path]


def test_rows() -> None:
    state = filled(3)
    fork = state.select([2, 0, 2])
    assert fork.tokens == (12, 10, 12) and fork.batch == 3
    assert torch.equal(fork.layers[1].wkv[0], state.layers[1].wkv[2])
    assert same(State.cat([state.select(0), state.select([1, 2])]), state)
    assert same(state.detach().to("cpu"), state)
    with pytest.raises(ValueError, match="row 3 does not exist"):
        state.select(3)
    with pytest.raises(ValueError, match="row -1 does not exist"):
        state.select([-1])
    with pytest.raises(ValueError, match="at least one"):
        State.cat([])
    other = State.zeros(PRESETS["dove-tiny"]), State.zeros(PRESETS["finch-tiny"], dtype=torch.bfloat16)
    for stranger in (filled(1, fingerprint="e" * 64), *other):
        with pytest.raises(ValueError, match="differ in model, dtype or device"):
            State.cat([state, stranger])
    with pytest.raises(ValueError, match="batch is -1"):
        State.zeros(PRESETS["finch-tiny"], -1)


def test_repr_is_short() -> None:
    assert repr(filled(1)) == "<State of 1 row, 10 tokens read, 3 layers, 26,112 bytes>"
    assert repr(filled(6)).startswith("<State of 6 rows, 10, 11, 12, 13, ... tokens read")


def test_size_does_not_depend_on_length() -> None:
    assert State.zeros(PRESETS["finch-1.6b"], device="meta").nbytes == PRESETS["finch-1.6b"].state_bytes
    assert State.zeros(PRESETS["dove-tiny"]).nbytes == PRESETS["dove-tiny"].state_bytes
