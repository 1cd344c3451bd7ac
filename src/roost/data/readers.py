"""Files to documents: jsonl, parquet and plain text, also compressed.

Owns: what a document is. Every line {"text": ...} of .jsonl and .ndjson that is not blank, every row of .parquet, every
other file whole; .gz and .zst are opened on the way. A line or row that holds no text is a `Bad` one, with its place.
Refuses to know: tokens, filters, what happens to bad lines.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NamedTuple, cast


class Bad(NamedTuple):
    """A line (or row) without a document, numbered from 1."""

    path: str
    line: int
    why: str

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}: {self.why}"


class Piece(NamedTuple):
    """One document, or a bad line, and how many bytes of the file have been read."""

    document: bytes | Bad
    position: int


_COMPRESSED = (".gz", ".zst")


def kind(path: Path) -> str:
    """What is inside a file, by its name: "jsonl", "parquet" or "text"."""
    name = path.with_suffix("") if path.suffix in _COMPRESSED else path
    if name.suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    return "parquet" if path.suffix == ".parquet" else "text"


def check_readable(path: Path) -> None:
    """Raise ValueError when a package that this file needs is missing."""
    if path.suffix == ".zst":
        _optional(path, "zstandard")
    if path.suffix == ".parquet":
        _optional(path, "pyarrow.parquet")


def cuts(path: Path, size: int) -> list[tuple[int, int]]:
    """Parts of about `size` bytes that can be read on their own: (start, end) for `pieces`; (0, -1) is all of it.

    Lines of plain jsonl by their first byte, row groups of parquet; everything else is one part.
    """
    if kind(path) == "jsonl" and path.suffix not in _COMPRESSED:
        total = path.stat().st_size
        starts = range(0, max(total, 1), size)
        return [(start, min(start + size, total)) for start in starts] if total > size else [(0, -1)]
    if kind(path) == "parquet" and path.stat().st_size > size:
        with _failures(path), path.open("rb") as raw:
            groups = _optional(path, "pyarrow.parquet").ParquetFile(raw).num_row_groups
        each = max(1, groups * size // path.stat().st_size)
        return [(start, min(start + each, groups)) for start in range(0, groups, each)]
    return [(0, -1)]


def pieces(path: Path, field: str, start: int = 0, end: int = -1) -> Iterator[Piece]:
    """The documents of a file, or of the part (start, end), in order.

    Raises ValueError when the file has vanished, cannot be read, or is no whole archive.
    """
    with _failures(path):
        if kind(path) == "parquet":
            yield from _rows(path, field, start, end)
            return
        with path.open("rb", 1 << 20) as raw, _opened(path, raw) as file:
            if kind(path) == "text":
                data = file.read()
                yield Piece(data, raw.tell())
            else:
                yield from _lines(path, field, file, raw, start, end)


@contextmanager
def _failures(path: Path) -> Generator[None, None, None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path} vanished during the run: put it back, or leave it out, and run again") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


@contextmanager
def _opened(path: Path, raw: IO[bytes]) -> Generator[IO[bytes], None, None]:
    if path.suffix == ".gz":
        with gzip.open(raw, "rb") as file:
            yield cast("IO[bytes]", file)
    elif path.suffix == ".zst":
        zstandard = _optional(path, "zstandard")
        try:
            yield cast(
                "IO[bytes]", io.BufferedReader(_Frames(raw, zstandard.ZstdDecompressor().decompressobj), 1 << 18)
            )
        except zstandard.ZstdError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    else:
        yield raw


class _Frames(io.RawIOBase):
    """The text of zstd frames. Unlike zstandard's reader it notices an archive that was cut short: EOFError."""

    def __init__(self, raw: IO[bytes], new: Callable[[], Any]) -> None:
        self._raw, self._new, self._frame = raw, new, None
        self._left, self._ready = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill the buffer with what comes next; 0 at the end."""
        while not self._ready:
            data = self._left or self._raw.read(1 << 18)
            if not data:
                if self._frame is not None:
                    raise EOFError("the archive ends in the middle")
                return 0
            self._frame = self._frame or self._new()
            self._ready, self._left = self._frame.decompress(data), b""
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _lines(path: Path, field: str, file: IO[bytes], raw: IO[bytes], start: int, end: int) -> Iterator[Piece]:
    at = start
    if start:  # lines belong to the part that holds their first byte
        file.seek(start - 1)
        at += len(file.readline()) - 1
    plain, quick = file is raw, _quick()
    for number, line in enumerate(iter(file.readline, b""), 1):
        if 0 <= end <= at:
            return
        at += len(line)
        if line.isspace():
            continue
        document = _text(line, field, quick) or _text(line, field, json.loads)
        if document is None:
            before = _count_lines(path, start) if start else 0
            document = Bad(str(path), before + number, f'expected an object with a string "{field}" in UTF-8')
        yield Piece(document, at - start if plain else raw.tell())


def _text(line: bytes, field: str, loads: Callable[[bytes], Any]) -> bytes | None:
    try:
        return loads(line)[field].encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _quick() -> Callable[[bytes], Any]:
    """The fastest parser there is. orjson is stricter than json (no NaN, say): json has the last word on a line."""
    try:
        return import_module("orjson").loads
    except ImportError:
        return json.loads


def _count_lines(path: Path, start: int) -> int:
    """How many lines begin before the first line that begins at `start` or after it."""
    count = 0
    with path.open("rb") as file:
        while file.tell() < start and file.readline():
            count += 1
    return count


def _rows(path: Path, field: str, start: int, end: int) -> Iterator[Piece]:
    parquet = _optional(path, "pyarrow.parquet")
    arrow = _optional(path, "pyarrow")
    try:
        with path.open("rb") as raw:
            file = parquet.ParquetFile(raw)
            if field not in file.schema_arrow.names:
                raise ValueError(f"{path} has no column {field!r}; it has {', '.join(file.schema_arrow.names)}")
            groups = list(range(start, file.num_row_groups if end < 0 else end))
            number = sum(file.metadata.row_group(i).num_rows for i in range(start))
            share = path.stat().st_size / max(1, file.metadata.num_rows)
            first = number
            for batch in file.iter_batches(256, row_groups=groups, columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    done = int((number - first) * share)
                    if isinstance(text, (str, bytes)):
                        yield Piece(text.encode() if isinstance(text, str) else text, done)
                    else:
                        yield Piece(Bad(str(path), number, f"column {field!r} holds {text!r}, not text"), done)
    except arrow.ArrowException as error:
        raise ValueError(f"{path} is damaged or no parquet file: {error}") from error


def _optional(path: Path, module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ValueError(f"reading {path} needs {package}: pip install {package}") from error
