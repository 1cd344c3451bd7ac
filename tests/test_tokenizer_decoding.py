"""roost.tokenizer, from ids to text: whole, with offsets, and as a stream."""

from __future__ import annotations

import codecs
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roost.tokenizer import StreamDecoder, WorldTokenizer

WORLD = WorldTokenizer()
BYTES = WorldTokenizer.byte_level()


def test_ids_without_bytes_decode_to_nothing() -> None:
    assert WORLD.decode([0, 24281, 0, *range(65530, 65536)]) == "User"
    assert WORLD.decode([]) == ""
    assert WORLD.token_bytes(0) == WORLD.token_bytes(65535) == b""
    assert WORLD.decode([3319, 0, 2417], "strict") == "🙂"


@pytest.mark.parametrize(
    "ids", [(24281, 59), iter([24281, 59]), np.array([24281, 59], np.uint16), torch.tensor([24281, 59])]
)
def test_ids_from_any_container(ids: Any) -> None:
    assert WORLD.decode(ids) == "User:"
    assert WORLD.token_bytes(torch.tensor(24281)) == b"User"  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("call", ["decode", "decode_bytes", "decode_with_offsets"])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([11, 65536], r"id 65536 at position 1 is not in 0\.\.65535"),
        ([11, 12, -1], "id -1 at position 2"),
        ([10**30], "at position 0"),
        ([11, 1.0], "flat sequence of integers: 'float'"),
        ("11", "flat sequence of integers: 'str'"),
        ([None], "flat sequence of integers: 'NoneType'"),
        (11, "flat sequence of integers: 'int' object is not iterable"),
        (torch.tensor(11), "flat sequence of integers: 'int' object is not iterable"),
        (np.array([[11]]), "flat sequence of integers: 'list'"),
        (np.array([11.0]), "flat sequence of integers: 'float'"),
    ],
)
def test_ids_that_do_not_exist(call: str, ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(WORLD, call)(ids)


@pytest.mark.usefixtures("unchecked")
def test_token_bytes_and_push_reject_the_same() -> None:
    for bad in (-1, 65536, 1.5, "a", None):
        with pytest.raises(ValueError, match="id"):
            WORLD.token_bytes(bad)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="id"):
            StreamDecoder(WORLD).push(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"id 257 at position 0 is not in 0\.\.256"):
        BYTES.decode([257])


@pytest.mark.usefixtures("unchecked")
def test_errors_of_decode() -> None:
    ids = WORLD.encode("né".encode()[:2] + b"x")
    assert WORLD.decode(ids) == "n\ufffdx"
    assert WORLD.decode(ids, "ignore") == "nx"
    with pytest.raises(ValueError, match=r"at byte 1, in id 196 at position 1; decode with errors='replace'"):
        WORLD.decode(ids, "strict")
    with pytest.raises(ValueError, match=r"at byte 2, in id 3028 at position 3"):
        WORLD.decode([0, 11, 11, 3028], "strict")
    for call in (lambda: WORLD.decode([], "strct"), lambda: StreamDecoder(WORLD, "strct")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"errors is 'strct'; .*did you mean 'strict'"):
            call()


def characters_by_hand(data: bytes) -> list[int]:
    """The character of each byte, found by feeding the standard library's incremental decoder byte by byte."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    owner: list[int] = []
    count = pending = 0
    for byte in data:
        emitted = len(decoder.decode(bytes([byte])))
        held = len(decoder.getstate()[0])
        decided = pending + 1 - held
        owner += [count] * (decided - 1) + [count + 1] if emitted == 2 else [count] * decided
        count, pending = count + emitted, held
    return owner + [count] * pending


@given(st.lists(st.integers(0, 65535) | st.integers(0, 4000) | st.sampled_from([0, 19232, 240, 160, 146, 3319, 2417])))
def test_offsets_of_any_ids(ids: list[int]) -> None:
    text, spans = WORLD.decode_with_offsets(ids)
    owner = [*characters_by_hand(WORLD.decode_bytes(ids)), len(text)]
    assert text == WORLD.decode(ids)
    at = 0
    for number, span in zip(ids, spans, strict=True):
        size = len(WORLD.token_bytes(number))
        assert span == ((owner[at], owner[at + size - 1] + 1) if size else (owner[at], owner[at]))
        at += size


def test_offsets() -> None:
    ids = [24281, 0, 3319, 2417, 11]
    assert WORLD.decode_with_offsets(ids) == ("User🙂\n", [(0, 4), (4, 4), (4, 5), (4, 5), (5, 6)])
    assert WORLD.decode_with_offsets([]) == ("", [])
    assert WORLD.decode_with_offsets([0]) == ("", [(0, 0)])
    assert WORLD.decode_with_offsets([256, 19232, 131, 2412, 98]) == (
        "\ufffd\ufffd\ufffd\ufffd\ufffda",
        [(0, 1), (1, 2), (2, 3), (3, 5), (5, 6)],
    )
    assert WORLD.decode_with_offsets([3319, 146]) == ("\ufffd", [(0, 1), (0, 1)])


# any ids, and runs of fragments that begin, break and end characters
STREAMS = st.lists(
    st.integers(0, 65535) | st.sampled_from([0, 256, 225, 129, 240, 160, 146, 3319, 2417, 3028, 2412, 98])
)


@given(STREAMS, st.sampled_from(["replace", "ignore"]))
def test_a_stream_is_the_whole_text_in_pieces(ids: list[int], errors: Any) -> None:
    stream = StreamDecoder(WORLD, errors)
    for _ in range(2):  # a flushed decoder starts afresh
        seen = ""
        for position, number in enumerate(ids, 1):
            seen += stream.push(number)
            tail = WORLD.decode(ids[:position], errors).removeprefix(seen)
            assert len(tail) <= 1  # at most one unfinished character is held back
        assert seen + stream.flush() == WORLD.decode(ids, errors)
        assert stream.flush() == ""


@given(st.text())
def test_a_stream_of_text_never_shows_half_a_character(text: str) -> None:
    for tokenizer in (WORLD, BYTES):
        stream = StreamDecoder(tokenizer)
        pieces = [stream.push(number) for number in tokenizer.encode(text)]
        assert "".join(pieces) == text and stream.flush() == ""


def test_streams_by_example() -> None:
    stream = StreamDecoder(WORLD)
    assert [stream.push(number) for number in (3319, 0, 2417, 24281)] == ["", "", "🙂", "User"]
    assert [stream.push(number) for number in (256, 24281, 19232, 3319)] == ["\ufffd", "User", "\ufffd", ""]
    other = StreamDecoder(WORLD)
    assert other.push(2417) == "\ufffd\ufffd"  # not the other half of what `stream` holds
    assert stream.flush() == "\ufffd"
    strict = StreamDecoder(WORLD, "strict")
    assert strict.push(3319) == ""
    with pytest.raises(ValueError, match="invalid continuation byte"):
        strict.push(24281)
    with pytest.raises(ValueError, match="unexpected end of data"):
        strict.flush()
    assert strict.push(24281) == "User"
