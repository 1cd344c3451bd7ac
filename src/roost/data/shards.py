"""Shards: a part of the sources as ids, made by one process and kept until all are there.

Owns: how sources are cut into units of work, the two files of a finished shard, and the worker process. A shard's name
is a digest of all that decides its content, so that a later run takes what an earlier one finished and nothing else;
KEY.npz is renamed into place last, and a shard without it does not exist.
Refuses to know: which documents are written in the end (duplicates, weights, budgets, order).
"""

from __future__ import annotations

import hashlib
import json
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from roost.data.binidx import id_dtype
from roost.data.normalise import normalise
from roost.data.readers import Bad, cuts, kind, pieces
from roost.data.sources import BadLines, Source
from roost.files import replacing
from roost.tokenizer import WorldTokenizer

_LONGEST = 2**31 - 2  # ids of a document, the closing 0 left out, that an .idx can describe
SHOWN = 5
"""Bad lines that a shard, and a report, names."""

_BLOCK = 1 << 22  # bytes read between two reports of progress, and encoded at once


class File(NamedTuple):
    """A file as it was when the run began."""

    path: str
    size: int
    changed: int

    @classmethod
    def now(cls, path: Path) -> File:
        """Raises ValueError when it has vanished."""
        try:
            found = path.stat()
        except OSError as error:
            raise ValueError(f"{path} vanished during the run: put it back, or leave it out, and run again") from error
        return cls(str(path), found.st_size, found.st_mtime_ns)

    def check(self) -> None:
        """Raise ValueError unless it is still the same."""
        if File.now(Path(self.path)) != self:
            raise ValueError(f"{self.path} changed during the run: run again, what is finished and unchanged is kept")


@dataclass(frozen=True)
class Unit:
    """What one shard is made of: whole files, or one part of a large one (see `readers.cuts`)."""

    source: Source
    files: tuple[File, ...]
    start: int
    end: int
    size: int
    bad_lines: BadLines
    hashes: bool

    def key(self, fingerprint: str) -> str:
        """A digest of all that decides the shard: files, how they were found, filters and the tokenizer."""
        kept = ("text", "min_bytes", "max_bytes", "normalise")
        filters = {name: value for name, value in asdict(self.source).items() if name in kept}
        facts = [2, fingerprint, filters, self.files, self.stray, self.start, self.end, self.bad_lines, self.hashes]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

    @property
    def stray(self) -> list[bool]:
        """Whether each file is text that was found in a directory, not named: a zero byte makes it binary."""
        named = {Path(path) for path in self.source.path}
        return [kind(path) == "text" and path not in named for path in (Path(file.path) for file in self.files)]


def units(source: Source, files: list[Path], bad_lines: BadLines, hashes: bool, size: int) -> Iterator[Unit]:
    """Cut a source into units of about `size` bytes, in order."""
    small: list[File] = []

    def gathered() -> Iterator[Unit]:
        if small:
            total = sum(file.size for file in small)
            yield Unit(source, tuple(small), 0, -1, total, bad_lines, hashes)
            small.clear()

    for path in files:
        file = File.now(path)
        if file.size >= size:
            yield from gathered()
            parts = cuts(path, size)
            each = file.size // len(parts)
            for start, end in parts:
                yield Unit(source, (file,), start, end, each, bad_lines, hashes)
        else:
            small.append(file)
            if sum(one.size for one in small) >= size or len(small) == 1000:
                yield from gathered()
    yield from gathered()


class Shard(NamedTuple):
    """A finished shard.

    tokens   its file of ids, the closing 0 of each document included
    sizes    (documents,) tokens of each, the closing 0 included
    bytes    (documents,) bytes of text of each
    hashes   (documents, 2) uint64 of each text, (0, 2) where none were asked for
    dropped  how many documents were left out, by reason
    bad      the first few bad lines
    """

    tokens: Path
    sizes: NDArray[np.int64]
    bytes: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    dropped: dict[str, int]
    bad: list[str]


def find(folder: Path, key: str, dtype: np.dtype[Any]) -> Shard | None:
    """The finished shard of that name, or None."""
    tokens, facts = folder / f"{key}.bin", folder / f"{key}.npz"
    try:
        with facts.open("rb") as file, np.load(file) as held:
            sizes, lengths, hashes = held["sizes"], held["bytes"], held["hashes"]
            report = json.loads(bytes(held["report"]))
        if tokens.stat().st_size != int(sizes.sum()) * dtype.itemsize:
            return None
    except (FileNotFoundError, BadZipFile, KeyError, ValueError, EOFError):  # a crash of the machine cut it short
        return None
    return Shard(tokens, sizes, lengths, hashes, report["dropped"], report["bad"])


@dataclass
class _Facts:
    """What a growing shard knows beside its ids; the fields are those of `Shard`."""

    sizes: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def write(self, path: Path) -> None:
        report = json.dumps({"dropped": self.dropped, "bad": self.bad}).encode()
        with path.open("wb") as out:
            np.savez(
                out,
                sizes=np.array(self.sizes, np.int64),
                bytes=np.array(self.bytes, np.int64),
                hashes=np.frombuffer(b"".join(self.hashes), np.uint64).reshape(-1, 2),
                report=np.frombuffer(report, np.uint8),
            )


def make(unit: Unit, tokenizer: WorldTokenizer, folder: Path, done: Callable[[int], None]) -> None:
    """Read, filter and encode a unit into a shard in `folder`; `done` hears how many bytes of the unit are read.

    Raises ValueError for a bad line (unless they are skipped), and for a file that changed, vanished or is damaged.
    """
    key, dtype = unit.key(tokenizer.fingerprint), id_dtype(tokenizer.vocab_size)
    end, facts = bytes(dtype.itemsize), _Facts()
    with replacing(folder / f"{key}.npz") as last, replacing(folder / f"{key}.bin") as first:
        with first.open("wb", buffering=1 << 20) as out:
            for texts in _blocks(_kept(unit, facts, done)):
                for text, ids in zip(texts, tokenizer.encode_arrays(texts), strict=True):
                    if len(ids) > _LONGEST:
                        where = unit.files[0].path
                        raise ValueError(f"a document of {where} has {len(ids):,} ids, more than {_LONGEST:,}")
                    out.write(ids.astype(dtype, copy=False).data)
                    out.write(end)
                    facts.sizes.append(len(ids) + 1)
                    facts.bytes.append(len(text))
                    if unit.hashes:
                        facts.hashes.append(hashlib.blake2b(text, digest_size=16).digest())
        for file in unit.files:
            file.check()
        facts.write(last)


def _blocks(texts: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Texts gathered to a few MB: one call into the native library, during which other threads run Python."""
    block: list[bytes] = []
    size = 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size >= _BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _kept(unit: Unit, facts: _Facts, done: Callable[[int], None]) -> Iterator[bytes]:
    """The documents that pass the filters; what is dropped is counted in `facts`."""
    before, told, source = 0, 0, unit.source
    for file, stray in zip(unit.files, unit.stray, strict=True):
        for document, position in pieces(Path(file.path), source.text, unit.start, unit.end):
            if before + position - told >= _BLOCK:
                told = before + position
                done(told)
            if isinstance(document, Bad):
                if unit.bad_lines == "fail":
                    raise ValueError(f'{document} (bad_lines = "skip" leaves such lines out and counts them)')
                facts.drop("bad line")
                facts.bad += [str(document)] if len(facts.bad) < SHOWN else []
                continue
            if stray and b"\0" in document[:8192]:
                facts.drop("binary")
                continue
            text = normalise(document.decode("utf-8", "replace")).encode() if source.normalise else document
            if len(text) < source.min_bytes:
                facts.drop("short" if text else "empty")
            elif 0 < source.max_bytes < len(text):
                facts.drop("long")
            else:
                yield text
        before += file.size


def serve() -> None:
    """The worker process: a tokenizer and a folder on standard input, then units; progress, then None or an error out.

    It ends when its input does, so that none outlives the process that started it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    given, answers = sys.stdin.buffer, sys.stdout.buffer

    def answer(value: object) -> None:
        pickle.dump(value, answers)
        answers.flush()

    with suppress(EOFError, BrokenPipeError):  # whoever started this process has gone
        tokenizer, folder = pickle.load(given)
        while True:
            unit = pickle.load(given)
            try:
                make(unit, tokenizer, folder, answer)
                result = None
            except (ValueError, OSError, MemoryError) as error:
                result = error
            answer(result)
