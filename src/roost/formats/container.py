"""GGUF as a container: a header, keys with values, a list of tensors, and their aligned bytes (versions 2 and 3).

    "GGUF", u32 version, u64 tensors, u64 keys | keys: string, u32 type, value
    tensors: string, u32 n, u64[n] sizes (the fastest first), u32 kind, u64 offset | padding to the alignment
    bytes of the tensors, each at an aligned offset                                   (all little endian)

The gguf package, ggml's own, believes what a file says; here nothing that a file says is believed: counts, lengths and
offsets are compared with the file's length before anything of their size is made, so any damage gives one ValueError.

Owns: this layout, and "no tensor is read before it is asked for".
Refuses to know: what keys and tensors mean.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from roost.files import replacing
from roost.formats.ggml import KINDS, UNREAD, decode, encode

MAGIC = b"GGUF"
Value: TypeAlias = "str | bool | int | float | list[str] | list[int]"
"""What a key can hold when written: text, bool, u32, f32, texts, i32s."""

_ALIGNMENT = 32
_MOST = 1 << 16  # keys, or tensors: far beyond any RWKV
_LONGEST = 1 << 24  # elements of an array: the largest vocabulary there can be
_LONGEST_NAME = 256  # letters of a key or of a tensor's name; ggml allows 64 for tensors
_STRING, _ARRAY = 8, 9
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_CODES = {name: kind.code for name, kind in KINDS.items()}


class Entry(NamedTuple):
    """One tensor of a file: how it is stored, its shape in torch's order, and where its bytes are."""

    kind: str
    shape: tuple[int, ...]
    start: int
    size: int


class Container:
    """An open GGUF file. The bytes are mapped copy on write; nothing is read before `tensor` is called.

    Raises ValueError for a file that is truncated, damaged, of another version or byte order, or that holds kinds of
    tensors which are not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.stat().st_size < 24:
            raise ValueError(f"{path} is a truncated GGUF file: it ends in its header; get it again")
        self._bytes = np.asarray(np.memmap(path, np.uint8, "c"))
        try:
            self.keys, self.entries = _parse(_Cursor(self._bytes.data))
        except _Damage as damage:
            raise ValueError(f"{path} is a truncated or corrupt GGUF file: {damage}; get it again") from None
        except _Unread as reason:
            raise ValueError(f"{path}: {reason}") from None

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """One tensor: plain floats mapped as they are stored, blocks as numbers of `dtype`."""
        entry = self.entries[name]
        raw = torch.from_numpy(self._bytes[entry.start : entry.start + entry.size])
        return decode(entry.kind, raw, entry.shape, dtype)


class Stored(NamedTuple):
    """One tensor to write: its numbers and the kind they shall have."""

    value: Tensor
    kind: str


def write(path: Path, keys: Mapping[str, Value], tensors: Mapping[str, Stored]) -> None:
    """Write a file, version 3, tensor by tensor, through a temporary file.

    Raises ValueError, naming the tensor, for numbers that do not fit their kind.
    """
    out = bytearray(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(keys)))
    for key, value in keys.items():
        out += _string(key) + _value(value)
    offset = 0
    for name, (value, kind) in tensors.items():
        out += _string(name) + struct.pack(f"<I{value.dim()}Q", value.dim(), *reversed(value.shape))
        out += struct.pack("<IQ", _CODES[kind], offset)
        offset += _padded(KINDS[kind].nbytes(value.numel()))
    out += bytes(_padded(len(out)) - len(out))
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(out)
        for name, (value, kind) in tensors.items():
            try:
                _write_tensor(file, value, kind)
            except ValueError as error:
                raise ValueError(f"cannot write {path}: {name} is {error}") from error


def _write_tensor(file: BinaryIO, value: Tensor, kind: str) -> None:
    count = sum(file.write(piece.numpy().data) for piece in encode(kind, value.detach().cpu()))
    file.write(bytes(_padded(count) - count))


def _padded(size: int, alignment: int = _ALIGNMENT) -> int:
    return -(-size // alignment) * alignment


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    texts = [_string(item) for item in value if isinstance(item, str)]
    head = struct.pack("<IIQ", _ARRAY, _STRING if texts else 5, len(value))
    return head + (b"".join(texts) if texts else struct.pack(f"<{len(value)}i", *value))


class _Damage(Exception):
    """The file does not say what its layout needs; the message says where."""


class _Unread(Exception):
    """The file is sound, but not of a kind that is read; the message says what to do."""


class _Cursor:
    """Reads forward and never behind the end."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def take(self, count: int, what: str) -> memoryview:
        if count > len(self.data) - self.at:
            raise _Damage(f"{what} at byte {self.at} needs {count} bytes, and the file ends after {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> str:
        """Text; bytes that are not UTF-8 become lone surrogates, so that nothing is lost."""
        return bytes(self.take(self.number("Q", what), what)).decode("utf-8", "surrogateescape")

    def name(self, what: str) -> str:
        """Text short enough to be shown in an error."""
        text = self.string(what)
        if len(text) > _LONGEST_NAME:
            raise _Damage(f"{what} has {len(text)} letters")
        return text

    def value(self, what: str) -> Any:
        kind = self.number("I", what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            return self.number(_scalar(kind, what), what)
        kind, count = self.number("I", what), self.number("Q", what)
        if count > _LONGEST:
            raise _Damage(f"{what} claims to hold {count} values")
        if kind == _STRING:
            return [self.string(what) for _ in range(count)]
        code = _scalar(kind, what)
        return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code), what)))


def _scalar(kind: int, what: str) -> str:
    if kind not in _SCALARS:
        raise _Damage(f"{what} has the unknown type {kind}")
    return _SCALARS[kind]


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, Entry]]:
    if bytes(cursor.take(4, "the magic")) != MAGIC:
        raise _Damage("it does not begin with GGUF")
    version = cursor.number("I", "the version")
    if version not in (2, 3):
        if version >= 1 << 16:
            raise _Unread("a big-endian GGUF file is not read; convert it with gguf-convert-endian of the gguf package")
        raise _Unread(f"GGUF version {version} is not read, only 2 and 3; convert the original anew")
    tensors, count = cursor.number("Q", "the header"), cursor.number("Q", "the header")
    if max(tensors, count) > _MOST:
        raise _Damage(f"its header claims {tensors} tensors and {count} keys")
    keys: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.name("a key")
        if key in keys:
            raise _Damage(f"the key {key!r} is there twice")
        keys[key] = cursor.value(f"the key {key!r}")
    infos = list(_infos(cursor, tensors))
    alignment = keys.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment % 8 or alignment > 1 << 20:
        raise _Damage(f"its alignment is {alignment!r}")
    return keys, _place(infos, _padded(cursor.at, alignment), alignment, len(cursor.data))


def _infos(cursor: _Cursor, count: int) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Name, kind, shape and offset of each tensor."""
    names = {code: name for name, code in _CODES.items()}
    for _ in range(count):
        name = cursor.name("the name of a tensor")
        what = f"the tensor {name!r}"
        dims = cursor.number("I", what)
        if not 1 <= dims <= 4:
            raise _Damage(f"{what} has {dims} dimensions")
        shape = tuple(cursor.number("Q", what) for _ in range(dims))[::-1]
        code, offset = cursor.number("I", what), cursor.number("Q", what)
        if code not in names:
            kind = UNREAD.get(code, f"of ggml's kind {code}")
            raise _Unread(f"{what} is {kind}, which is not read; quantise to q8_0 or q4_0, or use the original")
        if not all(0 < size < 1 << 40 for size in shape) or shape[-1] % KINDS[names[code]].block:
            raise _Damage(f"{what} has the impossible shape {list(shape)} for {names[code]}")
        yield name, names[code], shape, offset


def _place(
    infos: Iterable[tuple[str, str, tuple[int, ...], int]], data: int, alignment: int, length: int
) -> dict[str, Entry]:
    """Where the bytes of each tensor are. They may not overlap: together they are never more than the file."""
    entries: dict[str, Entry] = {}
    for name, kind, shape, offset in infos:
        entry = Entry(kind, shape, data + offset, KINDS[kind].nbytes(prod(shape)))
        if name in entries:
            raise _Damage(f"the tensor {name!r} is there twice")
        if offset % alignment:
            raise _Damage(f"the tensor {name!r} begins at {offset}, which is no multiple of {alignment}")
        if entry.start + entry.size > length:
            raise _Damage(
                f"the tensor {name!r} ends at byte {entry.start + entry.size}, and the file ends after {length}"
            )
        entries[name] = entry
    ordered = sorted(entries.items(), key=lambda item: item[1].start)
    for (left, one), (right, other) in pairwise(ordered):
        if one.start + one.size > other.start:
            raise _Damage(f"the tensors {left!r} and {right!r} overlap")
    return entries
