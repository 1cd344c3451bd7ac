"""Greedy longest match and decoding in the native library (src/native/tokenizer.cpp), over NumPy arrays.

Owns: the tables of one vocabulary and how arrays are handed over. The ids are those of `matching.PythonMatcher`.
Refuses to know: lists, and how errors are worded for users.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roost import native

_KINDS = {np.dtype("u2"): 2, np.dtype("u4"): 4, np.dtype("i4"): -4, np.dtype("i8"): -8}
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int

# A bytes object to be filled before anybody else sees it: Python's documented way, and one copy of the text less.
_new_bytes = ctypes.pythonapi["PyBytes_FromStringAndSize"]
_new_bytes.argtypes, _new_bytes.restype = [ctypes.c_char_p, ctypes.c_ssize_t], ctypes.py_object

# The UTF-8 of a str without a copy (of ASCII), or the copy that Python then keeps beside the str (of anything else).
_as_utf8 = ctypes.pythonapi["PyUnicode_AsUTF8AndSize"]
_as_utf8.argtypes, _as_utf8.restype = [ctypes.py_object, ctypes.c_void_p], ctypes.c_void_p
_SHORT = 4096  # characters that are copied sooner than asked for


class NativeMatcher(native.Held):
    """Longest match over `tokens` (position is the id, empty ones are no tokens); all 256 bytes must be tokens.

    Safe to share between threads. Raises ValueError without the native library.
    """

    def __init__(self, tokens: Sequence[bytes]) -> None:
        data = b"".join(tokens)
        starts = np.zeros(len(tokens) + 1, np.uint64)
        np.cumsum(np.fromiter(map(len, tokens), np.uint64, len(tokens)), out=starts[1:])
        handle = ctypes.c_void_p()
        new = native.function("roost_tokenizer_new", [ctypes.c_char_p, _POINTER, _SIZE, _POINTER])
        native.check(new(data, starts.ctypes.data, len(tokens), ctypes.byref(handle)))
        self._handle = native.Handle(handle.value, "roost_tokenizer_free")
        self._dtype = np.dtype(np.uint16 if len(tokens) <= 1 << 16 else np.uint32)
        self._encode = native.function(
            "roost_tokenizer_encode",
            [_POINTER, _POINTER, _POINTER, _SIZE, _INT, _INT, _POINTER, _POINTER],
        )
        self._open = native.function(
            "roost_tokenizer_encode_open", [_POINTER, ctypes.c_char_p, _SIZE, _POINTER, _POINTER, _POINTER]
        )
        self._count = native.function("roost_tokenizer_byte_count", [_POINTER, _POINTER, _SIZE, _INT, _POINTER])
        self._decode = native.function(
            "roost_tokenizer_decode", [_POINTER, _POINTER, _SIZE, _INT, ctypes.c_char_p, _SIZE]
        )

    @property
    def table_bytes(self) -> int:
        """Resident bytes of the tables; each thread that encodes adds 2 MiB for the units it remembers."""
        return native.function("roost_tokenizer_table_bytes", [_POINTER], _SIZE)(self._handle)

    def encode(self, text: str | bytes, threads: int = 1, *, remember: bool = True) -> NDArray[Any]:
        """The ids of `text` (a str as its UTF-8 bytes): uint16, or uint32 when there are ids beyond 65,535.

        remember=False asks the trie for every token: the same ids, for comparison.
        Raises ValueError for an impossible number of threads, and UnicodeEncodeError for a lone surrogate.
        """
        if isinstance(text, bytes) or len(text) < _SHORT:
            data = text if isinstance(text, bytes) else text.encode()
            return self._run(data, np.array([len(data)], np.uint64), threads, remember)[0]
        size = ctypes.c_ssize_t()
        pointer = _as_utf8(text, ctypes.byref(size))
        return self._run(pointer, np.array([size.value], np.uint64), threads, remember)[0]

    def encode_batch(self, texts: Sequence[bytes], threads: int = 1) -> list[NDArray[Any]]:
        """The ids of each text, as `encode`."""
        ends = np.cumsum(np.fromiter(map(len, texts), np.uint64, len(texts)), dtype=np.uint64)
        ids, counts = self._run(b"".join(texts), ends, threads, True)
        return np.split(ids, np.cumsum(counts)[:-1].astype(np.intp)) if len(texts) else []

    def _run(
        self, data: bytes | int, ends: NDArray[np.uint64], threads: int, remember: bool
    ) -> tuple[NDArray[Any], NDArray[np.uint64]]:
        ids = np.empty(
            int(ends[-1]) if len(ends) else 0, self._dtype
        )  # room for one id per byte; pages that stay empty cost nothing
        counts = np.empty(len(ends), np.uint64)
        pointers = ids.ctypes.data, counts.ctypes.data
        native.check(self._encode(self._handle, data, ends.ctypes.data, len(ends), threads, remember, *pointers))
        ids.resize(int(counts.sum()), refcheck=False)  # nobody else has seen it
        return ids, counts

    def encode_open(self, data: bytes) -> tuple[list[int], int]:
        """The ids that no continuation of `data` can change, and how many bytes they are."""
        ids = np.empty(len(data), self._dtype)
        count, used = ctypes.c_uint64(), ctypes.c_uint64()
        native.check(
            self._open(self._handle, data, len(data), ids.ctypes.data, ctypes.byref(count), ctypes.byref(used))
        )
        return ids[: count.value].tolist(), used.value

    def decode(self, ids: NDArray[Any]) -> bytes:
        """The bytes of a 1-D array of integers.

        Raises ValueError naming position and id when one is outside the vocabulary.
        """
        kind = _KINDS.get(ids.dtype)
        array = np.ascontiguousarray(ids if kind else ids.astype(np.int64))
        place = array.ctypes.data, len(array), kind or -8
        size = ctypes.c_uint64()
        native.check(self._count(self._handle, *place, ctypes.byref(size)))
        data: bytes = _new_bytes(None, size.value)
        native.check(self._decode(self._handle, *place, data, size.value))
        return data
