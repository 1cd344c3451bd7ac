"""The verb `prepare`: text to the tokens that training reads.

Owns: its arguments and its table.
Refuses to know: how it is done (roost.data.prepare).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from roost.cli import terminal
from roost.data.prepare import prefix_of
from roost.data.prepare import prepare as write
from roost.data.report import Counts, Report
from roost.data.sources import Manifest, named_after, read_manifest
from roost.tokenizer import WorldTokenizer


def arguments(parser: argparse.ArgumentParser) -> None:
    """Of `roost prepare`."""
    what = "a manifest (.toml), or files, directories and globs: .jsonl and .parquet hold a document a line or row,"
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=f"{what} any other file is one; .gz and .zst too")
    parser.add_argument("-o", "--out", required=True, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx")
    parser.add_argument("--bytes", action="store_true", help="for models of bytes, such as nestling")
    parser.add_argument("--vocabulary", metavar="FILE", help="a vocabulary in the official text form (default: World)")
    what = "a line without a text: fail names it and stops (default), skip counts it"
    parser.add_argument("--bad-lines", choices=("fail", "skip"), help=what)
    parser.add_argument("--dedup", action="store_true", help="drop documents that came before, byte for byte")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="mix the documents of all sources")
    parser.add_argument("--min-bytes", type=int, metavar="N", help="drop shorter documents (default: 1)")
    parser.add_argument("--max-bytes", type=int, metavar="N", help="drop longer documents")
    what = "threads; processes if more than 4 (default: one per core)"
    parser.add_argument("--workers", type=int, metavar="N", help=what)


def prepare(args: argparse.Namespace) -> int:
    """Write a token file."""
    for ending in (".bin", ".idx", ".report.json"):
        terminal.check_writable(f"{prefix_of(args.out)}{ending}", *args.sources)
    if args.bytes and args.vocabulary:
        raise ValueError("--bytes and --vocabulary exclude each other")
    tokenizer = WorldTokenizer.byte_level() if args.bytes else WorldTokenizer()
    if args.vocabulary:
        tokenizer = WorldTokenizer.from_file(args.vocabulary)
    with terminal.preparing() as show:
        report = write(
            _manifest(args), args.out, tokenizer, workers=args.workers, progress=lambda position: show(*position)
        )
    _print(report)
    return 0


def _manifest(args: argparse.Namespace) -> Manifest:
    """What is to be read: flags overrule the manifest."""
    flags = {name: value for name in ("shuffle", "bad_lines") if (value := getattr(args, name)) is not None}
    flags |= {"dedup": True} if args.dedup else {}
    sizes = {name: value for name in ("min_bytes", "max_bytes") if (value := getattr(args, name)) is not None}
    if not any(path.endswith(".toml") for path in args.sources):
        return Manifest(named_after(args.sources, **sizes), **flags)
    if len(args.sources) > 1:
        raise ValueError("a manifest comes alone: write the other sources into it")
    manifest = read_manifest(args.sources[0])
    return replace(manifest, sources=tuple(replace(source, **sizes) for source in manifest.sources), **flags)


def _print(report: Report) -> None:
    total = report.total
    dropped = sum(total.dropped.values())
    if len(report.sources) > 1 or dropped or total.unread:
        table = Table(box=None, pad_edge=False)
        table.add_column("source", overflow="fold")
        for name in ("documents", "tokens", "share", "text", "bytes/token", "dropped"):
            table.add_column(name, justify="right", overflow="fold")
        for source, counts in report.sources:
            _row(table, source.name, counts, total)
        for name in ("language", "domain"):
            groups = report.by(name)
            if any(groups):
                table.add_section()
                for value, counts in groups.items():
                    _row(table, f"{name} {value or 'unknown'}", counts, total)
        Console(width=None if sys.stdout.isatty() else 100, highlight=False).print(table)
        for line in report.bad_lines:
            print(f"bad line: {line}", file=sys.stderr)
    documents = f"{total.documents:,} document{'s' * (total.documents != 1)}"
    print(f"{documents}, {total.tokens:,} tokens in {report.path}.bin and {report.path}.idx")


def _row(table: Table, name: str, counts: Counts, total: Counts) -> None:
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in counts.dropped.items())
    if counts.unread:
        dropped += f"{', ' if dropped else ''}{terminal.size(counts.unread)} not read"
    share = f"{counts.tokens / total.tokens:.1%}"
    size = terminal.size(counts.bytes)
    each = f"{counts.bytes_per_token:.2f}"
    table.add_row(name, f"{counts.documents:,}", f"{counts.tokens:,}", share, size, each, dropped or "0")
