"""Which implementations of the tokenizer, the WKV operator and the model are active here, and why one is not.

Owns: the facts that `roost info` prints; it asks, and neither chooses nor loads anything but the native library.
Refuses to know: how a backend is chosen for a call (the operator and the loader do that), and printing.
"""

from __future__ import annotations

from typing import NamedTuple

from roost import native


class Implementation(NamedTuple):
    """One implementation of one part.

    part    "tokenizer", "WKV operator" or "model"
    name    "python", "torch", "reference", "chunked", "native"
    note    what it runs with, or what it is for
    why_not "" for one that is active, else the reason
    """

    part: str
    name: str
    note: str
    why_not: str = ""

    @property
    def active(self) -> bool:
        """Whether calls can be served by it."""
        return not self.why_not


def backends() -> tuple[Implementation, ...]:
    """Every implementation, part by part, the fastest on this machine first."""
    why_not = native.why_not()
    isa = "" if why_not else native.isa()
    return (
        Implementation("tokenizer", "native", isa and "C++", why_not),
        Implementation("tokenizer", "python", "" if why_not else "what the native one is tested against"),
        Implementation("WKV operator", "native", isa and f"CPU, {isa}", why_not),
        Implementation("WKV operator", "chunked", "any device, and what the native one does not serve"),
        Implementation("WKV operator", "reference", "the specification; only when asked for"),
        Implementation("model", "native", isa and f"CPU, {isa}; with backend='native'", why_not),
        Implementation("model", "torch", "any device; trains"),
    )
