"""The native library: found beside the package, loaded once, and why it is missing when it is.

Owns: loading, the error convention (-1 and a message become ValueError), who frees what the library made, the choice of
an instruction set, and the numbers that Python and the library share.
Refuses to know: what the library's parts do; each Python module that uses one declares its own functions.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

ISAS = ("scalar", "avx2", "avx512", "amx")
"""Instruction sets from the slowest to the fastest; "scalar" is the compiler's baseline (SSE2, or NEON on Arm)."""

ABI = 3
"""Which declarations the library must have been built from: `roost::abi` in src/native/common.h, raised together."""

MOST_THREADS = 256
"""Of one call: `roost::max_threads` in src/native/pool.h."""

KINDS = ("f32", "w16", "bf16", "i8", "i8 fine", "i4")
"""Formats of a packed matrix (docs/native.md); the index is `roost::Format` in src/native/model.h.

f32 and w16 are exact (w16 for weights that are bf16 numbers), bf16 also multiplies bf16 activations; i8 and i8 fine are
one layout, multiplied with activations of 8 and of 16 bits; i4 goes with 8 bits.
"""

REASON = (
    "roost was installed without a C++ compiler, or compiling failed; with gcc 12, clang 14 or later, install it again"
    " (python -m pip install -v shows what the compiler says)"
)


def places() -> list[Path]:
    """Where the library may be: in the package, which in an editable installation lies in two directories."""
    return [Path(place) / "_native.so" for place in sys.modules["roost"].__path__]


def opened(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """The library in a file, or None and the reason."""
    try:
        found = ctypes.CDLL(str(path))
        for name in ("roost_error", "roost_isa", "roost_best_isa"):
            getattr(found, name).restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be used: {error}"
    number = found.roost_abi() if hasattr(found, "roost_abi") else 0
    if number != ABI:
        age = "older" if number < ABI else "newer"
        return None, f"{path} was built from {age} sources (interface {number}, not {ABI}); install roost again"
    return found, ""


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The first that can be used, else what is wrong with the first."""
    found = [opened(path) for path in places() if path.is_file()]
    return next((one for one in found if one[0] is not None), (found or [(None, REASON)])[0])


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
    """The exported function `name` with its argument types declared (ctypes releases the GIL during calls).

    Raises ValueError when there is no library, or one that was built from other sources.
    """
    try:
        found = getattr(library(), name)
    except AttributeError as error:
        raise ValueError(
            f"the native library has no {name}: it was built from older sources; install roost again"
        ) from error
    found.argtypes, found.restype = list(argtypes), restype
    return found


def check(status: int) -> None:
    """Raise ValueError with the library's message when a call returned -1."""
    if status < 0:
        raise ValueError(library().roost_error().decode())


class Handle:
    """What the library made: argument of its functions, and freed by `free` when no Python object holds it any more."""

    def __init__(self, made: int | None, free: str) -> None:
        self._as_parameter_ = ctypes.c_void_p(made)
        weakref.finalize(self, function(free, [ctypes.c_void_p], None), self._as_parameter_)


class Held:
    """A class whose objects hold a `Handle`: shallow copies share it; there are no deep copies and no pickles."""

    def __copy__(self) -> Held:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise TypeError(f"{type(self).__name__} cannot be copied deeply: {_OUTSIDE}; copy.copy shares it")

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(f"{type(self).__name__} cannot be pickled: {_OUTSIDE}; make it in the other process")


_OUTSIDE = "what it runs on is memory of the native library"


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
    force, before = function("roost_force_isa", [ctypes.c_char_p]), isa()
    check(force(name.encode()))
    try:
        yield
    finally:
        check(force(before.encode()))
