"""roost.matching: the Python longest match, its cuts and windows, and what it says about an open end."""

from __future__ import annotations

import json
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost.matching import PythonMatcher, hard_pairs

BYTES = [b"", *(bytes([byte]) for byte in range(256))]
EXTRA = [b"ab", b"abc", b"abcde", b"bc", b"cd", b"//", b"//----", b"\x00\x00", b"ba"]
SMALL = PythonMatcher([*BYTES, *EXTRA])
PIECES = st.lists(st.sampled_from([*EXTRA, b"a", b"b", b"c", b"-", b"\x00"])).map(b"".join)


def naive(tokens: list[bytes], data: bytes) -> list[int]:
    """Longest match, written as plainly as possible."""
    ids = {token: id for id, token in enumerate(tokens) if token}
    found: list[int] = []
    while data:
        length = next(n for n in range(len(data), 0, -1) if data[:n] in ids)
        found.append(ids[data[:length]])
        data = data[length:]
    return found


@given(PIECES)
def test_the_longest_match(data: bytes) -> None:
    assert SMALL.encode(data) == naive([*BYTES, *EXTRA], data)


@pytest.mark.parametrize(("window", "kept"), [(1, 1), (7, 3), (64, 100_000)])
def test_windows_and_a_full_memory_change_nothing(window: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from roost import WorldTokenizer

    world = WorldTokenizer()
    tokens = [world.token_bytes(id) for id in range(world.vocab_size)]
    lines = (files("roost") / "assets" / "udhr_subset.jsonl").read_text("utf-8").splitlines()
    text = "".join(json.loads(line)["articles"][0] + "\n" + "-" * 200 for line in lines[::8]).encode()
    wanted = PythonMatcher(tokens).encode(text)
    monkeypatch.setattr("roost.matching._WINDOW", window)
    monkeypatch.setattr("roost.matching._UNITS_KEPT", kept)
    matcher = PythonMatcher(tokens)
    assert matcher.encode(text) == wanted
    assert matcher.encode(text) == wanted
    assert len(matcher.units) <= kept


@given(PIECES, st.lists(PIECES, min_size=1))
def test_an_open_end_gives_out_exactly_what_is_final(data: bytes, continuations: list[bytes]) -> None:
    ids, used = SMALL.encode_open(data)
    assert b"".join([*BYTES, *EXTRA][id] for id in ids) == data[:used]
    for more in continuations:
        assert SMALL.encode(data + more)[: len(ids)] == ids
    rest = data[used:]  # and nothing final is held back: some token begins with the rest and goes on
    assert not rest or any(token.startswith(rest) and len(token) > len(rest) for token in EXTRA)


def test_hard_pairs() -> None:
    hard = hard_pairs([token for token in [*BYTES, *EXTRA] if token])
    soft = {token[i : i + 2] for token in EXTRA for i in range(len(token) - 1)}
    assert {bytes(divmod(int(pair), 256)) for pair in np.flatnonzero(~hard)} == soft
