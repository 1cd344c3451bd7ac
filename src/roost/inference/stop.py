"""Stop strings in a stream of bytes that arrives in pieces.

Owns: that nothing of a stop string gets through, that nothing else is held back longer than needed, and that the result
does not depend on how the bytes were cut.
Refuses to know: tokens, characters, states.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Lets bytes through until a stop string begins, and holds back what may be the beginning of one.

    The first match to be complete wins, and of those the one that began first; how the bytes are cut into pieces does
    not matter. Strings are compared as UTF-8, where a match can only begin and end between characters.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [text.encode() for text in stop]
        self._held: bytes = b""
        self.released: int = 0
        """Bytes let through so far."""

    def push(self, data: bytes) -> tuple[bytes, bool]:
        """(bytes let through, whether a stop string is complete); what follows a stop string is dropped."""
        held = self._held + data
        found = [(at + len(stop), at) for stop in self._stop if (at := held.find(stop)) >= 0]
        if found:
            cut, self._held = min(found)[1], b""
        else:
            longest = max((len(stop) for stop in self._stop), default=1) - 1
            cut = next(
                at
                for at in range(max(0, len(held) - longest), len(held) + 1)
                if at == len(held) or any(stop.startswith(held[at:]) for stop in self._stop)
            )
            self._held = held[cut:]
        self.released += cut
        return held[:cut], bool(found)

    def flush(self) -> bytes:
        """The text is over: what was held back was no stop string after all."""
        held, self._held = self._held, b""
        self.released += len(held)
        return held
