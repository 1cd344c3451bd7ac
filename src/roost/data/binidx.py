"""Token files: the `.bin` / `.idx` pair that RWKV-LM, Megatron and datatrove read.

Owns: the layout, little endian. `.idx`: `MMIDIDX\\0\\0`, u64 version 1, u8 dtype code, u64 items, u64 length of
doc_idx, i32 sizes[items] in tokens, i64 pointers[items] in bytes, i64 doc_idx (starts with 0). `.bin`: ids back to
back. Written as RWKV-LM's make_data.py does: one item per document, id 0 after each.
Refuses to know: text, tokenizers, batches.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roost.files import replacing

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}

Tokens = NDArray[np.integer[Any]]
"""Token ids in the dtype of their file (or of the caller), 1-D."""


def _pair(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The .bin and .idx paths for a common prefix, or for either of the two."""
    prefix = Path(path)
    if prefix.suffix in (".bin", ".idx"):
        prefix = prefix.with_suffix("")
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


class TokenFile:
    """A memory-mapped token file.

    path  the common prefix, or the .bin or the .idx

    `tokens` is the whole stream, 1-D, read-only, in the dtype of the file; `len` counts tokens; `documents(i)` is one
    document with its closing 0; `count` is the number of documents, `borders` (count + 1,) where each begins and where
    the last ends. To read `tokens` of a file that was cut short after it was opened kills the process: call
    `check_unchanged` before. Raises ValueError when a file is missing, truncated or damaged.
    """

    tokens: Tokens
    count: int
    borders: NDArray[np.int64]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, index = _pair(path)
        for file in (self.path, index):
            if not file.is_file():
                raise ValueError(f"no token file at {file}; a token file is a pair PREFIX.bin and PREFIX.idx")
        dtype, sizes, pointers, documents = _read_index(index)
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
        self._opened = self._facts()
        expected, found = int(ends[-1]) * dtype.itemsize, self._opened[0]
        if found != expected:
            what = "truncated" if found < expected else "too long"
            raise ValueError(f"{self.path} is {what}: {found:,} bytes, but {index.name} describes {expected:,}")
        if not np.array_equal(pointers, ends[:-1] * dtype.itemsize):
            raise ValueError(f"{index} is damaged: its documents do not lie back to back in {self.path.name}")
        if expected:
            self.tokens = np.memmap(self.path, dtype=dtype, mode="r")
        else:
            self.tokens = np.empty(0, dtype)
        self.borders = ends[documents]
        self.count = len(documents) - 1

    def __len__(self) -> int:
        return len(self.tokens)

    def _facts(self) -> tuple[int, int, int]:
        """Size, time of the last change and inode of the .bin."""
        found = self.path.stat()
        return found.st_size, found.st_mtime_ns, found.st_ino

    def check_unchanged(self) -> None:
        """Raise ValueError unless the .bin is still the file that was opened, as it was."""
        try:
            same = self._facts() == self._opened
        except OSError:
            same = False
        if not same:
            raise ValueError(f"{self.path} changed or vanished during the run: put back what it was, and resume")

    def documents(self, i: int) -> Tokens:
        """Document `i` as a view of `tokens`. Raises ValueError out of range."""
        if not 0 <= i < self.count:
            raise ValueError(f"document {i} does not exist: {self.path} has {self.count}, numbered from 0")
        return self.tokens[self.borders[i] : self.borders[i + 1]]

    def check_ids(self, vocab_size: int) -> None:
        """Raise ValueError, naming the place, when a token is outside 0..vocab_size-1.

        Reads the whole file, unless its dtype cannot hold such an id.
        """
        limits = np.iinfo(self.tokens.dtype)
        if limits.min >= 0 and limits.max < vocab_size:
            return
        for start in range(0, len(self), 1 << 22):
            block = self.tokens[start : start + (1 << 22)]
            bad = (block < 0) | (block >= vocab_size) if limits.min < 0 else block >= vocab_size
            if bad.any():
                place = int(np.argmax(bad))
                raise ValueError(
                    f"{self.path} holds token id {block[place]} (token {start + place:,} of the file), outside"
                    f" 0..{vocab_size - 1}: it was made with another vocabulary"
                )


def _read_index(
    path: Path,
) -> tuple[np.dtype[Any], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Read and check an .idx: dtype, sizes, pointers, doc_idx."""
    data = path.read_bytes()
    if not data.startswith(_MAGIC):
        raise ValueError(f"{path} is not a token index: it starts with {data[:9]!r}, wanted {_MAGIC!r}")
    if len(data) < _HEADER.size:
        raise ValueError(f"{path} is truncated: {len(data)} bytes, the header alone has {_HEADER.size}")
    _, version, code, items, length = _HEADER.unpack_from(data)
    if version != 1:
        raise ValueError(f"{path} has version {version}; only version 1 is known")
    if code not in _DTYPES:
        raise ValueError(f"{path} has dtype code {code}; integer ids have one of {sorted(_DTYPES)}")
    expected = _HEADER.size + 12 * items + 8 * length
    if len(data) != expected:
        what = "truncated" if len(data) < expected else "too long"
        raise ValueError(f"{path} is {what}: {len(data):,} bytes, its header describes {expected:,}")
    sizes = np.frombuffer(data, "<i4", items, _HEADER.size)
    pointers = np.frombuffer(data, "<i8", items, _HEADER.size + 4 * items)
    documents = np.frombuffer(data, "<i8", length, _HEADER.size + 12 * items)
    if (sizes < 0).any():
        raise ValueError(f"{path} is damaged: item {int(np.argmax(sizes < 0))} has a negative size")
    if not length or documents[0] != 0 or documents[-1] != items or (np.diff(documents) < 0).any():
        raise ValueError(f"{path} is damaged: doc_idx does not climb from 0 to the {items} items")
    return _DTYPES[code], sizes, pointers, documents


def write_tokens(
    path: str | os.PathLike[str], documents: Iterable[Sequence[int] | NDArray[Any]], *, vocab_size: int = 65536
) -> int:
    """Write PREFIX.bin and PREFIX.idx and return the number of tokens, a closing 0 after each document included.

    path        the common prefix, or the .bin or the .idx; an old pair survives any failure before the renames;
                one during them leaves no pair, never halves of two
    documents   ids of one document each, without the closing 0; read once, one at a time
    vocab_size  ids must lie in [0, vocab_size); uint16 up to 65,536, int32 beyond

    Raises ValueError for an id outside the vocabulary, or a document of 2**31 - 1 ids or more.
    """
    code = _code(vocab_size)
    dtype = _DTYPES[code]
    sizes: list[int] = []
    with _new_pair(path) as (new_index, new_binary):
        with new_binary.open("wb") as out:
            for number, document in enumerate(documents):
                ids = _checked(document, vocab_size, number)
                out.write(ids.astype(dtype).tobytes())
                out.write(bytes(dtype.itemsize))
                sizes.append(len(ids) + 1)
        return _write_index(new_index, np.array(sizes, np.int64), code)


def write_blocks(
    path: str | os.PathLike[str], blocks: Iterable[NDArray[Any]], sizes: NDArray[Any], *, vocab_size: int = 65536
) -> int:
    """As `write_tokens`, from ids that are known to be good and already hold the closing 0 of every document.

    blocks  1-D arrays that make the stream when joined, cut anywhere
    sizes   (documents,) tokens of each, the closing 0 included

    Raises ValueError when the blocks have another number of tokens than the sizes.
    """
    code = _code(vocab_size)
    dtype, found = _DTYPES[code], 0
    with _new_pair(path) as (new_index, new_binary):
        with new_binary.open("wb") as out:
            for block in blocks:
                out.write(np.ascontiguousarray(block, dtype).data)
                found += len(block)
        total = _write_index(new_index, sizes, code)
        if total != found:
            raise ValueError(f"{path}: the documents have {total:,} tokens by their sizes, but {found:,} were given")
    return total


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """What ids of this vocabulary are written as: uint16 up to 65,536, int32 beyond. Raises ValueError beyond that."""
    return _DTYPES[_code(vocab_size)]


def _code(vocab_size: int) -> int:
    if not 1 <= vocab_size < 2**31:
        raise ValueError(f"vocab_size is {vocab_size}; it must be between 1 and 2**31 - 1")
    return 8 if vocab_size <= 65536 else 4


@contextmanager
def _new_pair(path: str | os.PathLike[str]) -> Generator[tuple[Path, Path], None, None]:
    """Temporary paths for .idx and .bin. The old .idx goes, then the .bin is renamed, then the .idx.

    So an .idx never describes another .bin: what is cut short between them leaves no pair, which the reader names.
    """
    binary, index = _pair(path)
    with replacing(index) as new_index, replacing(binary) as new_binary:
        yield new_index, new_binary
        for new in (new_index, new_binary):  # a disk that fails now costs nothing yet
            with new.open("rb") as written:
                os.fsync(written.fileno())
        Path(os.path.realpath(index)).unlink(missing_ok=True)


def _write_index(path: Path, sizes: NDArray[Any], code: int) -> int:
    """Write an .idx of one item per document and return the number of tokens."""
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
    with path.open("wb") as out:
        out.write(_HEADER.pack(_MAGIC, 1, code, len(sizes), len(sizes) + 1))
        out.write(sizes.astype("<i4").tobytes())
        out.write((ends[:-1] * _DTYPES[code].itemsize).astype("<i8").tobytes())
        out.write(np.arange(len(sizes) + 1, dtype="<i8").tobytes())
    return int(ends[-1])


def _checked(document: Sequence[int] | NDArray[Any], vocab_size: int, number: int) -> NDArray[np.int64]:
    ids = np.asarray(document)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"document {number} is not a flat sequence of integers (shape {ids.shape}, {ids.dtype})")
    if ids.size >= 2**31 - 1:
        raise ValueError(f"document {number} has {ids.size:,} ids; the format holds 2**31 - 2 and a closing 0")
    bad = (ids < 0) | (ids >= vocab_size)
    if bad.any():
        raise ValueError(f"document {number} holds id {ids[bad][0]}, outside the vocabulary of {vocab_size}")
    return ids.astype(np.int64)
