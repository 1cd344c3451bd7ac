"""The verbs that measure a model on this machine: `bench` its speed, `evaluate-quant` what rounding its weights costs.

Owns: what is measured, and the tables.
Refuses to know: how models run, and the definitions of the figures (evaluation.quantisation).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table

from roost import checkpoint
from roost.checks import choice, whole
from roost.cli import terminal
from roost.cli.models import check_threads, threads_for
from roost.evaluation.quantisation import Quality, compare
from roost.formats import packed
from roost.formats.locate import resolve
from roost.formats.slots import WeightsFormat
from roost.loading import load
from roost.models.native import NativeModel


def _check(args: argparse.Namespace) -> list[WeightsFormat]:
    """The forms to measure, all of them without --weights. Raises ValueError before any time is spent."""
    check_threads(args.threads)
    whole("--tokens", args.tokens, 1)
    resolve(args.model, None, None)
    known = get_args(WeightsFormat)
    forms = known if args.weights is None else args.weights.split(",")
    for form in forms:
        choice("--weights", form, known)
    return list(forms)


def _open(model: str, weights: WeightsFormat | None, threads: int | None, place: str) -> tuple[NativeModel, int]:
    """The model in one form (None: MODEL is packed), made in `place` and not beside it, and the bytes of its file."""
    path = Path(model)
    if weights is not None:
        path = Path(place) / f"m.{weights}{packed.ENDING}"
        exact, _ = checkpoint.load(model)
        threads = threads_for(exact.config, threads)
        packed.pack(exact.state_dict(), exact.config, path, weights_format=weights, threads=threads)
    found, _ = load(path, backend="native", threads=threads_for(packed.summary(path).config, threads))
    return found, path.stat().st_size


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for header in others:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _decode(model: NativeModel, tokens: int, rows: int = 1) -> float:
    """Median seconds per step of writing one token for each of `rows` sequences."""
    ids = torch.full((rows, 1), min(100, model.config.vocab_size - 1))
    _, state = model(ids)
    seconds: list[float] = []
    for _ in range(tokens):
        started = time.perf_counter()
        _, state = model(ids, state)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _prefill(model: NativeModel, tokens: int) -> float:
    """Best of three: seconds to read `tokens` tokens."""
    ids = torch.arange(tokens)[None] % model.config.vocab_size
    seconds: list[float] = []
    for _ in range(3):
        started = time.perf_counter()
        model(ids, last_only=True)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def bench(args: argparse.Namespace) -> int:
    """How fast a model reads and writes here, in every form of its weights."""
    rows: list[dict[str, Any]] = []
    forms: Sequence[WeightsFormat | None] = _check(args)
    if args.model.endswith(packed.ENDING):
        if args.weights is not None:
            raise ValueError(f"{args.model} is packed already: --weights goes with a checkpoint")
        forms = [None]
    with tempfile.TemporaryDirectory(prefix="roost-") as place:
        for weights in forms:
            model, size = _open(args.model, weights, args.threads, place)
            step = _decode(model, args.tokens)
            zeros = model.zero_rate()
            read = model.bytes_per_token(zeros)
            rows.append(
                {
                    "weights": model.weights,
                    "file_bytes": size,
                    "threads": model.threads,
                    "isa": model.isa,
                    "prefill_tokens_per_s": 512 / _prefill(model, 512),
                    "decode_tokens_per_s": 1 / step,
                    "decode_16_rows_tokens_per_s": 16 / _decode(model, max(3, args.tokens // 4), 16),
                    "weight_bytes_per_token": read,
                    "weights_read_GB_per_s": read / step / 1e9,
                    "ffn_zero_rate": zeros,
                }
            )
    if args.json:
        print(json.dumps(rows))
        return 0
    table = _table("weights", "file", "threads", "read t/s", "write t/s", "16 rows", "GB/s", "zeros")
    for row in rows:
        speeds = ("prefill_tokens_per_s", "decode_tokens_per_s", "decode_16_rows_tokens_per_s")
        cells = [f"{row[key]:,.0f}" if row[key] > 99 else f"{row[key]:.1f}" for key in speeds]
        figures = [f"{row['weights_read_GB_per_s']:.1f}", f"{row['ffn_zero_rate']:.1%}"]
        table.add_row(row["weights"], terminal.size(row["file_bytes"]), str(row["threads"]), *cells, *figures)
    console = Console(highlight=False)
    console.print(table)
    console.out(
        "\nread: 512 tokens at once; write: one by one; 16 rows: for 16 sequences at once; GB/s: of weights, writing;"
        "\nzeros: inputs of ffn.value that are zero, so that writing reads none of their weights"
    )
    return 0


def evaluate_quant(args: argparse.Namespace) -> int:
    """KL divergence, first choices and bits per byte of every form of the weights against fp32, on a text."""
    forms = _check(args)
    if args.model.endswith(packed.ENDING):
        raise ValueError(f"{args.model} is rounded already: name the checkpoint it was made from")
    source = files("roost") / "assets" / "example.txt"
    data = terminal.read_bytes(args.text) if args.text else source.read_bytes()
    exact, tokenizer = load(args.model, backend="native", weights="fp32", threads=args.threads, keep=False)
    if tokenizer is None:
        raise ValueError(f"{args.model} has no World vocabulary, so roost cannot read a text with it")
    ids = tokenizer.encode(data)[: args.tokens]
    count = len(tokenizer.decode_bytes(ids))
    rows: list[tuple[NativeModel, int, float, Quality]] = []
    with tempfile.TemporaryDirectory(prefix="roost-") as place:
        for weights in forms:
            model, size = _open(args.model, weights, args.threads, place)
            with terminal.reading(weights, model.config.state_bytes) as progress:
                rows.append((model, size, _decode(model, 20), compare(exact, model, ids, progress=progress)))
    if args.json:
        found = [
            {"weights": model.weights, "file_bytes": size, "decode_tokens_per_s": 1 / step, "text_bytes": count}
            | quality.__dict__
            for model, size, step, quality in rows
        ]
        print(json.dumps(found))
        return 0
    table = _table("weights", "file", "KL", "KL 99%", "same top", "bits/byte", "to fp32", "write t/s")
    for model, size, step, quality in rows:
        change = f"{quality.bits / quality.exact_bits - 1:+.3%}"
        figures = [f"{quality.kl:.2e}", f"{quality.kl_99:.2e}", f"{quality.top1:.2%}", f"{quality.bits / count:.4f}"]
        table.add_row(model.weights, terminal.size(size), *figures, change, f"{1 / step:,.1f}")
    console = Console(highlight=False)
    console.print(table)
    read = args.text or "the text that ships"
    console.out(f"\nKL in nats a token; {len(ids):,} tokens, {count:,} bytes of {read}; exact: fp32, native")
    return 0
