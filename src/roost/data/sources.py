"""Where text comes from: sources, and the manifest (TOML) that lists them.

    dedup = true                          drop documents that came before, byte for byte, in any source
    shuffle = 1                           write the documents in the order of this seed, not of the files
    bad_lines = "skip"                    or "fail", the default
    [[source]]
    name = "books"
    path = "books/*.jsonl.zst"            a file, a directory or a glob, or a list; relative to the manifest
    licence = "public domain"             licence, domain and language go into the report
    domain = "fiction"
    language = "en"
    weight = 2                            how often each document is written; 0.1 keeps a tenth of them
    budget = 1_000_000                    tokens at most: whole documents, from the first on

Owns: the keys and their checks, and which files a path means.
Refuses to know: what is inside the files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any, Literal, cast, get_args

from roost.checks import choice, nearest, whole
from roost.files import read_toml

BadLines = Literal["fail", "skip"]
"""What a line that cannot be used does: it ends the run, or it is counted and left out."""


@dataclass(frozen=True)
class Source:
    """One source of documents.

    name, path             what the report calls it; files, directories (read whole, hidden names left out) or globs
    licence, domain, language   for the report
    weight                 how often each document is written: 2.5 = all twice, and a random half of them once more;
                           0.1 = a random tenth. Which ones depends on the place of the source in the manifest alone
    budget                 tokens at most, 0 = no limit: what the weight gives (all of a pass before the next), from the
                           first document on, up to the first one that no longer fits
    min_bytes, max_bytes   documents outside are dropped (0 = no limit); by default only empty ones are
    text                   the field that holds the text, in jsonl and parquet
    include                names to read in a directory, such as ("*.py", "*.md"); () = all
    normalise              bring the text to the form of `roost.data.normalise`

    Raises ValueError for a value out of range or of another type.
    """

    name: str
    path: tuple[str, ...]
    licence: str = ""
    domain: str = ""
    language: str = ""
    weight: float = 1.0
    budget: int = 0
    min_bytes: int = 1
    max_bytes: int = 0
    text: str = "text"
    include: tuple[str, ...] = ()
    normalise: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type == "int":
                object.__setattr__(self, name, whole(name, value, 0))
            elif field.type == "str" and not isinstance(value, str):
                raise ValueError(f"{name} is {value!r}; it must be text")
            elif field.type == "tuple[str, ...]":
                names = (value,) if isinstance(value, str) else value
                if not isinstance(names, (list, tuple)) or not all(isinstance(one, str) for one in cast(Any, names)):
                    raise ValueError(f"{name} is {value!r}; it must be text, or a list of texts")
                object.__setattr__(self, name, tuple(cast("Sequence[str]", names)))
        if not isinstance(self.normalise, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"normalise is {self.normalise!r}; it must be true or false")
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"weight is {self.weight!r}; it must be a number")
        if not 0 < self.weight <= 1000 or not isfinite(self.weight):
            raise ValueError(f"weight is {self.weight!r}; it must be above 0 and at most 1000")
        if self.max_bytes and self.max_bytes < self.min_bytes:
            raise ValueError(f"max_bytes is {self.max_bytes}, less than min_bytes, {self.min_bytes}")
        if not self.path or not self.name or not self.text:
            raise ValueError(f"the source {self.name!r} needs a name, a path and a text field")


@dataclass(frozen=True)
class Manifest:
    """Sources and what concerns them all: `dedup`, `shuffle` (a seed, None = in order) and `bad_lines`."""

    sources: tuple[Source, ...]
    dedup: bool = False
    shuffle: int | None = None
    bad_lines: BadLines = "fail"

    def __post_init__(self) -> None:
        choice("bad_lines", self.bad_lines, get_args(BadLines))
        if self.shuffle is not None:
            whole("shuffle", self.shuffle, 0, 2**64 - 1)
        if not isinstance(self.dedup, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"dedup is {self.dedup!r}; it must be true or false")
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are called {name!r}: give each a name of its own")
        if not names:
            raise ValueError("there are no sources: name files, or write [[source]] tables")


def named_after(paths: Sequence[str | os.PathLike[str]], **options: Any) -> tuple[Source, ...]:
    """A source for each path, called as the file (as the whole path where two files are called the same)."""
    given = list(dict.fromkeys(os.fspath(path) for path in paths))
    names = [Path(path).name for path in given]
    return tuple(
        Source(name if names.count(name) == 1 and name else path, (path,), **options)
        for name, path in zip(names, given, strict=True)
    )


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read a manifest. Raises ValueError for a missing file, bad TOML, an unknown key (naming the nearest) or value."""
    given = read_toml(path, "manifest")
    tables = given.pop("source", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in cast("list[Any]", tables)):
        raise ValueError(f"{path}: sources are written as [[source]] tables")
    _known(path, given, ("dedup", "shuffle", "bad_lines", "source"))
    sources: list[Source] = []
    for number, table in enumerate(cast("list[dict[str, Any]]", tables), 1):
        _known(f"{path}, source {number}", table, [field.name for field in fields(Source)])
        for key in ("name", "path"):
            if key not in table:
                raise ValueError(f"{path}, source {number}: the key {key!r} is missing")
        try:
            source = Source(**table)
        except ValueError as error:
            raise ValueError(f"{path}, source {number}: {error}") from error
        here = tuple(os.path.join(Path(path).parent, one) for one in source.path)  # noqa: PTH118  (keeps globs as they are)
        sources.append(replace(source, path=here))
    try:
        return Manifest(tuple(sources), **given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _known(where: object, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; did you mean {nearest(key, known)!r}?")


def files_of(source: Source) -> list[Path]:
    """The files of a source in a fixed order: paths as given, the names in a directory or glob sorted.

    Raises ValueError when a path is missing or matches nothing, and when a file named as such is empty.
    """
    found: list[Path] = []
    for path in source.path:
        place = Path(path)
        if place.is_dir():
            inside = [file for file in sorted(place.rglob("*")) if file.is_file() and _wanted(file, place, source)]
        elif place.is_file():
            if not place.stat().st_size:
                raise ValueError(f"{path} is empty")
            inside = [place]
        elif any(letter in path for letter in "*?["):
            inside = [file for file in _matching(path) if file.is_file()]
        else:
            raise ValueError(f"no such file: {path}")
        if not inside:
            raise ValueError(f"the source {source.name!r} finds no files at {path}")
        found += inside
    once: dict[str, Path] = {}
    for file in found:  # however its name is written
        once.setdefault(str(file.resolve()), file)
    return list(once.values())


def _matching(pattern: str) -> list[Path]:
    from glob import glob

    return [Path(name) for name in sorted(glob(pattern, recursive=True))]  # noqa: PTH207  (absolute patterns too)


def _wanted(file: Path, place: Path, source: Source) -> bool:
    inside = file.relative_to(place)
    if any(part.startswith(".") for part in inside.parts):
        return False
    return not source.include or any(inside.match(pattern) for pattern in source.include)
