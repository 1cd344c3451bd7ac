"""The native library: found beside the package, loaded once, and why it is missing when it is.

Owns: loading, the error convention (-1 and a message become ValueError), and the choice of an instruction set.
Refuses to know: what the library's parts do; each Python module that uses one declares its own functions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

ISAS = ("scalar", "avx2", "avx512", "amx")
"""Instruction sets from the slowest to the fastest; "scalar" is the compiler's baseline (SSE2, or NEON on Arm)."""


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    import roost

    places = [Path(place) / "_native.so" for place in roost.__path__]
    found = [path for path in places if path.is_file()]
    if not found:
        return None, "the package was installed without a C++ compiler; install one and install roost again"
    try:
        library = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return None, f"{found[0]} does not load: {error}"
    for name in ("roost_error", "roost_isa", "roost_best_isa"):
        getattr(library, name).restype = ctypes.c_char_p
    return library, ""


def available() -> bool:
    """Whether the native library is here; without it everything but its own features works in plain torch."""
    return _load()[0] is not None


def why_not() -> str:
    """Why `available()` is False; "" when it is True."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """The loaded library. Raises ValueError with the reason when there is none."""
    loaded, reason = _load()
    if loaded is None:
        raise ValueError(f"the native library is not available: {reason}")
    return loaded


def function(name: str, argtypes: Sequence[Any], restype: Any = ctypes.c_int) -> Any:
    """The exported function `name` with its argument types declared (ctypes releases the GIL during calls)."""
    found = getattr(library(), name)
    found.argtypes, found.restype = list(argtypes), restype
    return found


def check(status: int) -> None:
    """Raise ValueError with the library's message when a call returned -1."""
    if status < 0:
        raise ValueError(library().roost_error().decode())


def isa() -> str:
    """The instruction set in use, one of `ISAS`."""
    return library().roost_isa().decode()


def supported_isas() -> tuple[str, ...]:
    """Those of `ISAS` that this machine can run."""
    return ISAS[: ISAS.index(library().roost_best_isa().decode()) + 1]


@contextmanager
def forced_isa(name: str) -> Generator[None, None, None]:
    """Use another instruction set inside the block, in the whole process (for tests and measurements).

    Raises ValueError for an unknown name and for one that this machine lacks.
    """
    force = function("roost_force_isa", [ctypes.c_char_p])
    check(force(name.encode()))
    try:
        yield
    finally:
        force(None)
