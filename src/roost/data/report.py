"""What a prepared corpus holds: counts by source, language and domain, and what was dropped and why.

Owns: the report's fields and its JSON, PREFIX.report.json.
Refuses to know: how documents are read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from roost.data.sources import Source
from roost.files import replacing


@dataclass
class Counts:
    """What was written, and what was not.

    documents   written, repetitions included
    tokens      of those, each document's closing 0 included
    bytes       of their text
    unread      bytes of source files, as they lie on the disk, that were not opened: the budget was full before
    dropped     documents that were read and left out, by reason
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    unread: int = 0
    dropped: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text that a token stands for, the closing zeros left out."""
        return self.bytes / max(1, self.tokens - self.documents)

    def drop(self, reason: str, count: int) -> None:
        """Count documents that were left out."""
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + count

    def add(self, other: Counts) -> None:
        """Count what another one counted."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.bytes += other.bytes
        self.unread += other.unread
        for reason, count in other.dropped.items():
            self.drop(reason, count)


@dataclass
class Report:
    """A run of `prepare`: everything together, and each source in the order of the manifest.

    path         the token file's prefix
    bad_lines    the first few lines that held no document, with file, line and reason
    seconds      the run took; what an earlier, killed run had finished took none
    """

    path: str
    tokenizer: str
    vocab_size: int
    sources: list[tuple[Source, Counts]]
    bad_lines: list[str]
    seconds: float = 0.0

    @property
    def total(self) -> Counts:
        """All sources together."""
        return _sum(counts for _, counts in self.sources)

    def by(self, name: str) -> dict[str, Counts]:
        """All sources of the same `name`, which is "language", "domain" or "licence"; "" for those that say none."""
        values = dict.fromkeys(str(getattr(source, name)) for source, _ in self.sources)
        return {value: _sum(c for source, c in self.sources if getattr(source, name) == value) for value in values}

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON. Raises OSError when the disk is full."""
        content = {
            "path": self.path,
            "tokenizer": self.tokenizer,
            "vocab_size": self.vocab_size,
            "seconds": round(self.seconds, 3),
            **_plain(self.total),
            "bad_lines": self.bad_lines,
            "sources": [{**_described(source), **_plain(counts)} for source, counts in self.sources],
            **{
                plural: {value or "unknown": _plain(counts) for value, counts in self.by(name).items()}
                for name, plural in (("language", "languages"), ("domain", "domains"), ("licence", "licences"))
            },
        }
        with replacing(path) as temporary:
            Path(temporary).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `Report.write` wrote; {} when there is no such file. Raises ValueError for a file that is something else."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("tokenizer"), str):
        raise ValueError(f"{path} is not a report of roost prepare: move it away")
    return cast("dict[str, Any]", found)


def _sum(several: Iterable[Counts]) -> Counts:
    total = Counts()
    for counts in several:
        total.add(counts)
    return total


def _plain(counts: Counts) -> dict[str, Any]:
    return {**asdict(counts), "bytes_per_token": round(counts.bytes_per_token, 4)}


def _described(source: Source) -> dict[str, Any]:
    """Name, path and description of a source, and the settings that are not the default."""
    always: Sequence[str] = ("name", "path", "licence", "domain", "language")
    return {
        f.name: getattr(source, f.name)
        for f in fields(source)
        if f.name in always or getattr(source, f.name) != f.default
    }
