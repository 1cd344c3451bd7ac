"""From text to a token file: shards by several workers, then what they hold, chosen and joined.

Owns: the run. Shards lie in PREFIX.parts until all are there, so that a killed run goes on where it was; duplicates,
weights, budgets and the order are decided afterwards from sizes and digests alone, in the order of the sources, so that
the files are the same for any number of workers. PREFIX.bin and PREFIX.idx are each whole, and never of two runs: the
old .idx goes before the new .bin comes, so a crash between them leaves a .bin alone, which TokenFile refuses.
Refuses to know: formats of text files (readers), the layout of token files (binidx), command lines.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from roost.checks import whole
from roost.data.binidx import id_dtype, write_blocks
from roost.data.order import permutation
from roost.data.readers import check_readable
from roost.data.report import Counts, Report
from roost.data.shards import SHOWN, Shard, Unit, find, units
from roost.data.sources import Manifest, files_of, named_after
from roost.data.workers import run
from roost.files import clear_abandoned, locked
from roost.tokenizer import WorldTokenizer

Integers = NDArray[np.int64]


class Progress(NamedTuple):
    """Where a run is: bytes of source files (as they lie on the disk) done and in all, and how fast.

    speed   MB (10^6 bytes) a second, of what this run has read
    left    seconds, at this speed
    """

    done: int
    total: int
    speed: float
    left: float


def prepare(
    sources: Sequence[str | os.PathLike[str]] | Manifest,
    out: str | os.PathLike[str],
    tokenizer: WorldTokenizer,
    *,
    workers: int | None = None,
    shard_bytes: int = 1 << 25,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Write PREFIX.bin, PREFIX.idx and PREFIX.report.json from all documents of the sources; token 0 closes each.

    sources      paths, in order, or a manifest
    out          the prefix, or either of the two files
    workers      threads, or processes if more than four; None = one per core; fewer for little text
    shard_bytes  of source text that are kept together when a run is killed
    progress     called now and then

    A run that was killed goes on from the shards it finished; a file that changed since is read again.

    Raises ValueError before any work for a missing or empty source, a missing package, an output that is a source or
    has no directory, or that another run is writing; and later for a bad line (unless they are skipped), a file that
    changed, vanished or is damaged, a worker that died, and when no document is left. The old token file survives all
    of these.
    """
    start = time.perf_counter()
    manifest = sources if isinstance(sources, Manifest) else Manifest(named_after(sources))
    prefix = prefix_of(out)
    whole("shard_bytes", shard_bytes, 1)
    count = _cores() if workers is None else whole("workers", workers, 1, 1024)
    folder = Path(f"{prefix}.parts")
    found = [[f for f in files_of(source) if folder not in f.parents] for source in manifest.sources]
    _check(prefix, [file for files in found for file in files])
    work = [
        list(units(source, files, manifest.bad_lines, manifest.dedup, shard_bytes))
        for source, files in zip(manifest.sources, found, strict=True)
    ]
    with locked(prefix.with_name(f".{prefix.name}.lock"), f"{prefix}.bin"):
        folder.mkdir(exist_ok=True)
        try:
            clear_abandoned(folder)
            clear_abandoned(prefix.parent)
            shards = _shards(work, tokenizer, folder, count, progress)
            for file in {file for several in work for unit in several for file in unit.files}:
                file.check()
            unread = [sum(u.size for u in several[len(s) :]) for several, s in zip(work, shards, strict=True)]
            report = _write(manifest, shards, unread, prefix, tokenizer)
            report.seconds = time.perf_counter() - start
            report.write(f"{prefix}.report.json")
            for path in folder.iterdir():
                if path.suffix in (".bin", ".npz"):
                    path.unlink()
            return report
        finally:
            with suppress(OSError):  # finished shards stay when the run failed
                folder.rmdir()


def prefix_of(out: str | os.PathLike[str]) -> Path:
    """The common part of the names that are written."""
    path = Path(out)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check(prefix: Path, files: Sequence[Path]) -> None:
    """What can be refused before any work."""
    if not prefix.name:
        raise ValueError(f"the output {str(prefix)!r} has no name: give a prefix such as corpus")
    if Path(f"{prefix}.parts").is_file():
        raise ValueError(f"{prefix}.parts is in the way: it has to be a directory for what is half finished")
    if not prefix.parent.is_dir():
        raise ValueError(f"cannot write {prefix}.bin: the directory {prefix.parent} does not exist")
    read = {file.resolve() for file in files}
    for ending in (".bin", ".idx", ".report.json"):
        target = Path(f"{prefix}{ending}").resolve()
        if target in read:
            raise ValueError(f"cannot write {prefix}{ending}: it is what is being read; choose another name")
        if target.exists() and not target.is_file():
            raise ValueError(f"cannot write {prefix}{ending}: it is not a regular file")
    for ending in {file.suffix for file in files}:
        check_readable(next(file for file in files if file.suffix == ending))


@dataclass
class _Reach:
    """How many units a source needs, as far as the finished ones tell: up to the one that fills its budget.

    `have` only grows, so the units from the first on are counted once: `known` of them, with so many `tokens`.
    """

    units: list[Unit]
    have: Mapping[Unit, Shard]
    known: int = 0
    tokens: int = 0

    def __call__(self) -> int:
        source = self.units[0].source
        if not source.budget or source.weight < 1 or self.units[0].hashes:
            return len(self.units)
        while self.tokens <= source.budget and self.known < len(self.units) and self.units[self.known] in self.have:
            self.tokens += int(self.have[self.units[self.known]].sizes.sum())
            self.known += 1
        return self.known if self.tokens > source.budget else len(self.units)


def _shards(
    work: list[list[Unit]],
    tokenizer: WorldTokenizer,
    folder: Path,
    count: int,
    progress: Callable[[Progress], None] | None,
) -> list[list[Shard]]:
    """The finished shards of every source: what is missing is made, what a budget cannot reach is not."""
    dtype, began = id_dtype(tokenizer.vocab_size), time.perf_counter()
    total = sum(unit.size for several in work for unit in several)
    have: dict[Unit, Shard] = {}

    def look(unit: Unit) -> Shard | None:
        if unit not in have and (shard := find(folder, unit.key(tokenizer.fingerprint), dtype)):
            have[unit] = shard
        return have.get(unit)

    reaches = [_Reach(several, have) for several in work]
    finished = sum(unit.size for several in work for unit in several if look(unit))

    def tell(read: int) -> None:
        if progress:
            speed = read / max(time.perf_counter() - began, 1e-9)
            left = total - finished - read
            progress(Progress(finished + read, total, speed / 1e6, left / speed if speed else 0.0))

    def missing() -> Iterator[Unit]:
        for reach in reaches:
            for number, unit in enumerate(reach.units):
                if not look(unit) and number < reach():
                    yield unit

    tell(0)
    run(missing(), tokenizer, folder, count, total - finished, tell, look)
    tell(total - finished)
    return [[have[unit] for unit in reach.units[: reach()]] for reach in reaches]


def _write(
    manifest: Manifest, shards: list[list[Shard]], unread: list[int], prefix: Path, tokenizer: WorldTokenizer
) -> Report:
    """Choose the documents, write the token file and count; `unread` bytes of every source were not needed."""
    flat = [shard for several in shards for shard in several]
    sizes = np.concatenate([shard.sizes for shard in flat])
    lengths = np.concatenate([shard.bytes for shard in flat])
    first = _first_copies(flat) if manifest.dedup else np.ones(len(sizes), np.bool_)
    chosen: list[Integers] = []
    counted: list[tuple[Any, Counts]] = []
    at = 0
    for number, (source, several) in enumerate(zip(manifest.sources, shards, strict=True)):
        counts = Counts(unread=unread[number])
        for shard in several:
            for reason, count in shard.dropped.items():
                counts.drop(reason, count)
        here = np.arange(at, at + sum(len(shard.sizes) for shard in several))
        at += len(here)
        kept = here[first[here]]
        counts.drop("duplicate", len(here) - len(kept))
        take = _weighted(kept, source.weight, number)
        counts.drop("weight below 1", len(kept) - len(take) if source.weight < 1 else 0)
        if source.budget:
            within = take[: int(np.searchsorted(np.cumsum(sizes[take]), source.budget, "right"))]
            counts.drop("over budget", len(np.setdiff1d(take, within)))
            take = within
        counts.documents, counts.tokens = len(take), int(sizes[take].sum())
        counts.bytes = int(lengths[take].sum())
        chosen.append(take)
        counted.append((source, counts))
    order = np.concatenate(chosen)
    if not len(order):
        reasons = Report("", "", 0, counted, []).total.dropped
        why = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
        raise ValueError(f"there are no documents to write{f' (dropped: {why})' if why else ''}")
    if manifest.shuffle is not None:
        order = order[permutation(len(order), manifest.shuffle, 0)]
    dtype = id_dtype(tokenizer.vocab_size)
    write_blocks(prefix, _blocks(flat, sizes, order, dtype), sizes[order], vocab_size=tokenizer.vocab_size)
    bad = [line for shard in flat for line in shard.bad][:SHOWN]
    return Report(str(prefix), tokenizer.fingerprint, tokenizer.vocab_size, counted, bad)


def _first_copies(shards: Sequence[Shard]) -> NDArray[np.bool_]:
    """Which documents have no equal before them."""
    digests = np.concatenate([shard.hashes for shard in shards])
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones stay in order
    ordered = digests[order]
    first = np.ones(len(order), np.bool_)
    first[order[1:]] = (ordered[1:] != ordered[:-1]).any(1)
    return first


def _weighted(documents: Integers, weight: float, source: int) -> Integers:
    """The documents, `weight` times: whole passes first, then a part of them, in order, which the source decides."""
    passes = int(weight)
    part = round((weight - passes) * len(documents))
    some = np.sort(permutation(len(documents), source, 0)[:part])
    return np.concatenate([np.tile(documents, passes), documents[some]])


def _blocks(shards: Sequence[Shard], sizes: Integers, order: Integers, dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    """The ids of the documents in that order, neighbours of one shard at once."""
    counts = np.array([len(shard.sizes) for shard in shards])
    ends = np.cumsum(counts)
    shard_of = np.searchsorted(ends, order, "right")
    offsets = np.cumsum(sizes) - sizes
    together = (np.diff(order) == 1) & (np.diff(shard_of) == 0)
    starts = np.concatenate([np.zeros(1, np.int64), np.flatnonzero(~together) + 1])
    stops = np.append(starts[1:], len(order)) - 1
    opened: dict[int, NDArray[Any]] = {}
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        number = int(shard_of[start])
        if number not in opened:
            if len(opened) >= 500:  # files that may be open at once
                opened.clear()
            opened[number] = np.memmap(shards[number].tokens, dtype=dtype, mode="r")
        base = int(offsets[ends[number] - counts[number]])
        yield opened[number][int(offsets[order[start]]) - base : int(offsets[order[stop]] + sizes[order[stop]]) - base]
