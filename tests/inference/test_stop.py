"""Stop strings in a stream of bytes: nothing leaks, nothing waits too long, pieces do not matter."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from roost.inference.stop import StopFilter


def run(stop: list[str], pieces: list[bytes]) -> tuple[bytes, bool]:
    """What comes through in all, and whether it was stopped."""
    gate, through = StopFilter(stop), b""
    for piece in pieces:
        released, stopped = gate.push(piece)
        through += released
        assert gate.released == len(through)
        if stopped:
            return through, True
    through += gate.flush()
    assert gate.released == len(through)
    return through, False


def expected(stop: list[str], data: bytes) -> tuple[bytes, bool]:
    """Byte by byte: the first end of a match wins, of several ending there the longest."""
    for end in range(len(data) + 1):
        matches = [len(text.encode()) for text in stop if data[:end].endswith(text.encode())]
        if matches:
            return data[: end - max(matches)], True
    return data, False


@given(
    stop=st.lists(st.text("ab\nß", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("ab\nß", max_size=4).map(str.encode) | st.binary(max_size=2), max_size=8),
)
def test_equals_the_definition_however_it_is_cut(stop: list[str], pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    assert run(stop, pieces) == run(stop, [data]) == run(stop, [bytes([b]) for b in data]) == expected(stop, data)


@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.text("abc", max_size=12))
def test_holds_back_exactly_the_longest_possible_beginning(stop: list[str], text: str) -> None:
    gate = StopFilter(stop)
    released, stopped = gate.push(text.encode())
    if stopped:
        return
    held = text[len(released) :]
    tails = [text[at:] for at in range(len(text))]
    possible = [tail for tail in tails if any(word.startswith(tail) for word in stop)]
    assert held == max(possible, key=len, default="")


def test_without_stop_strings_everything_passes_at_once() -> None:
    gate = StopFilter(())
    assert gate.push(b"\xf0\x9f") == (b"\xf0\x9f", False)
    assert gate.flush() == b""
