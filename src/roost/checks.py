"""What a caller handed in, checked where it enters: one ValueError with the name, the value and what to do.

Owns: the wording of these errors.
Refuses to know: what the values are for.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from operator import index
from typing import Any, cast

import torch


def nearest(value: object, known: Iterable[str]) -> str:
    """The known name that looks most like `value`."""
    return difflib.get_close_matches(str(value), list(known), 1, 0)[0]


def choice(name: str, value: object, known: Sequence[str]) -> None:
    """Raise ValueError, naming the nearest, unless `value` is one of `known`."""
    if value not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(f"{name} is {value!r}; did you mean {nearest(value, known)!r}? It must be one of {names}")


def instance(name: str, value: object, kind: type, advice: str = "") -> None:
    """Raise ValueError, with the advice, unless `value` is a `kind`."""
    if not isinstance(value, kind):
        shown = repr(value)
        shown = shown if len(shown) <= 40 else f"a {type(value).__name__}"
        raise ValueError(f"{name} is {shown}; it must be a {kind.__name__}" + (f": {advice}" if advice else ""))


def whole(name: str, value: object, least: int | None = None, most: int | None = None) -> int:
    """`value` as an int. Raises ValueError when it is no whole number (no bool is), or outside least..most."""
    try:
        number = index(cast(Any, value if not isinstance(value, bool) else None))
    except TypeError:
        raise ValueError(f"{name} is {value!r}; it must be a whole number") from None
    if least is not None and number < least:
        raise ValueError(f"{name} is {number}; it must be at least {least}")
    if most is not None and number > most:
        raise ValueError(f"{name} is {number}; it must be at most {most}")
    return number


def integers(name: str, values: object) -> list[int]:
    """`values` as a list of ints. Raises ValueError when they are not whole numbers in a sequence."""
    try:
        return [index(value) for value in cast(Any, values)]
    except TypeError as error:
        raise ValueError(f"{name} must be integers: {error}") from error


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device (None: torch's default). Raises ValueError when it is unknown, or CUDA where there is none."""
    try:
        found = torch.get_default_device() if device is None else torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device {device!r} is unknown; it must be 'cpu', 'cuda', 'cuda:1' ...") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {found}, but this machine has no usable CUDA device")
    return found
