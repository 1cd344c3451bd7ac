"""roost.tokenizer over arrays, in threads and piece by piece, with the native library and without it."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roost import native
from roost.tokenizer import StreamEncoder, WorldTokenizer

WORLD = WorldTokenizer()
TEXT = (files("roost") / "assets" / "udhr_subset.jsonl").read_text("utf-8")


@pytest.fixture(params=["native", "python"])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorldTokenizer]:
    """The World tokenizer over each matcher."""
    if request.param == "python":
        monkeypatch.setattr(native, "available", lambda: False)
    elif not native.available():
        pytest.skip(native.why_not())
    tokenizer = WorldTokenizer()
    assert (tokenizer._native is None) == (request.param == "python")
    yield tokenizer


def test_arrays_lists_and_batches_agree(world: WorldTokenizer) -> None:
    ids = world.encode(TEXT)
    for threads in (1, 2, 4):
        array = world.encode_array(TEXT, threads)
        assert array.dtype == np.uint16 and array.ndim == 1 and array.tolist() == ids
        lines = TEXT.splitlines()
        assert world.encode_batch(lines, threads) == [world.encode(line) for line in lines]
    assert world.encode_array(TEXT.encode()).tolist() == ids
    assert len(world.encode_array("")) == 0 and world.encode_array("").dtype == np.uint16
    assert world.encode_batch([]) == [] and world.encode_batch(["", b""]) == [[], []]
    assert world.decode(world.encode_array(TEXT)) == world.decode(torch.tensor(ids)) == TEXT


def test_wide_ids(world: WorldTokenizer) -> None:
    tokens = {id: token for id in range(1, 65530) if (token := WORLD.token_bytes(id))}
    wide = WorldTokenizer(tokens | {70_000: b"Eagle and Finch"})
    array = wide.encode_array("Eagle and Finch fly")
    assert array.dtype == np.uint32 and array.tolist() == [70_000, *WORLD.encode(" fly")]
    assert wide.decode(array) == "Eagle and Finch fly"
    assert pickle.loads(pickle.dumps(wide)).encode("Eagle and Finch") == [70_000]


@pytest.mark.parametrize("data", ["abc", "", None, [1]])
@pytest.mark.usefixtures("unchecked")
def test_an_open_end_is_bytes(world: WorldTokenizer, data: Any) -> None:
    with pytest.raises(ValueError, match=r"data is .*; it must be a bytes: encode text first"):
        world.encode_open(data)


@pytest.mark.parametrize("threads", [0, -1, 257, True, 1.5, "2"])
@pytest.mark.usefixtures("unchecked")
def test_impossible_threads(world: WorldTokenizer, threads: Any) -> None:
    for call in (lambda: world.encode_array("a", threads), lambda: world.encode_batch(["a"], threads)):
        with pytest.raises(
            ValueError, match=f"threads is {threads!r}; it must be (at least 1|at most 256|a whole number)"
        ):
            call()


def test_refusals_are_those_of_encode(world: WorldTokenizer) -> None:
    with pytest.raises(ValueError, match=r"lone surrogate '\\ud800' at index 2"):
        world.encode_array("ab\ud800", 2)
    with pytest.raises(ValueError, match="text 1: lone surrogate"):
        world.encode_batch(["fine", "\ud800"], 2)
    stream = StreamEncoder(world)
    held = stream.push("//-")
    with pytest.raises(ValueError, match="lone surrogate"):
        stream.push("\ud800")
    assert held + stream.push("-x") + stream.flush() == world.encode("//--x")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_tensors_and_arrays_decode_alike(world: WorldTokenizer, dtype: torch.dtype) -> None:
    ids = torch.tensor([98, 33, 0, 200, 99], dtype=dtype)
    wanted = world.decode_bytes(ids.tolist())
    assert world.decode_bytes(ids) == world.decode_bytes(ids.numpy()) == wanted
    assert world.decode(ids.numpy()) == world.decode(ids.tolist())
    assert world.decode_with_offsets(ids.numpy()) == world.decode_with_offsets(ids.tolist())
    for wrong in (ids.to(torch.bfloat16), ids.numpy().astype(np.float32), ids.reshape(1, 5)):
        with pytest.raises(ValueError, match="flat sequence of integers"):
            world.decode_bytes(wrong)


def test_a_bad_id_or_byte_in_an_array_is_named(world: WorldTokenizer) -> None:
    for ids in (np.array([1, 65536]), np.array([1, 65536], np.uint64), torch.tensor([1, 65536])):
        with pytest.raises(ValueError, match=r"id 65536 at position 1 is not in 0\.\.65535"):
            world.decode(ids)
    with pytest.raises(ValueError, match=r"invalid UTF-8 .* in id 256 at position 2"):
        world.decode(np.array([98, 99, 256, 98], np.uint16), "strict")


@given(st.lists(st.text() | st.binary() | st.sampled_from(["//", "-" * 30, " " * 70, "\n", "。", "'", "l"])))
def test_streams_give_the_ids_of_the_whole(pieces: list[str | bytes]) -> None:
    whole = b"".join(piece if isinstance(piece, bytes) else piece.encode() for piece in pieces)
    stream = StreamEncoder(WORLD)
    ids = [id for piece in pieces for id in stream.push(piece)]
    assert WORLD.decode_bytes(ids) == whole[: len(whole) - len(stream._pending)] and len(stream._pending) < 128
    assert ids + stream.flush() == WORLD.encode(whole)
    assert stream.flush() == [] and stream.push("hi\n") + stream.flush() == WORLD.encode("hi\n")


@pytest.mark.parametrize("longest", [1, 3, 50, 30_000])
def test_a_long_stream_cut_anywhere(world: WorldTokenizer, longest: int) -> None:
    rng = random.Random(longest)
    data = (("//" + "-" * 63) * 3 + " " * 200 + TEXT[400_000:]).encode()[: 3000 + 20 * longest]
    stream, ids, at = StreamEncoder(world), list[int](), 0
    while at < len(data):
        size = rng.randint(1, longest)
        ids += stream.push(data[at : at + size])
        at += size
    assert ids + stream.flush() == WORLD.encode(data)


def test_an_extended_vocabulary_streams(world: WorldTokenizer) -> None:
    tokens = {byte + 1: bytes([byte]) for byte in range(256)} | {300: b"ab", 301: b"ab" * 100, 302: b"\x00\x00"}
    stream = StreamEncoder(WorldTokenizer(tokens))
    data = b"ab" * 99 + b"a" + b"\x00" * 3 + b"ab" * 101
    ids = [id for byte in data for id in stream.push(bytes([byte]))] + stream.flush()
    assert ids == [300] * 99 + [98, 302, 1, 301, 300]
