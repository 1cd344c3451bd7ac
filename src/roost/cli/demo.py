"""`make demo`: a model reads a real document, goes to sleep in a file, and writes on in another process.

Owns: the order of the demonstration and its one comparison, bits per byte beside a general compressor's.
Refuses to know: how it is done; every step is a public call or the command line itself.
"""

from __future__ import annotations

import lzma
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.table import Table

from roost.cli.models import open_model
from roost.cli.terminal import read_bytes, reading, size
from roost.evaluation.loss import Score, bits_per_byte

PROMPT = "\nEveryone has the right to"


def run(name: str, path: str | None, console: Console | None = None) -> int:
    """Read, save, reload in a second process, write on, compare; the second process's exit code is the demo's."""
    console = console or Console(highlight=False)
    data = read_bytes(path) if path else (files("roost") / "assets" / "example.txt").read_bytes()
    model, tokenizer = open_model(name)
    config = model.config
    console.out(f"{name}: {config.generation}, {config.parameters:,} parameters, {config.n_layer} layers")
    if path is None:
        console.out(
            "the document: articles 26 to 30 of the Universal Declaration of Human Rights in 16 languages, 13 scripts"
        )

    started = time.perf_counter()
    with reading("reading", config.state_bytes) as progress:
        score = bits_per_byte(model, tokenizer, data, progress=progress)
    seconds = time.perf_counter() - started
    console.out(f"read {score.bytes:,} bytes in {seconds:.1f} s ({score.tokens / seconds:,.0f} tokens/s)")

    with tempfile.TemporaryDirectory() as directory:
        file = str(Path(directory) / "demo.state")
        score.state.save(file)
        console.out(f"all of it is now a state of {size(score.state.nbytes)}; a second process writes on from there:\n")
        console.out(PROMPT.strip(), end="")
        console.file.flush()
        second = [sys.executable, "-m", "roost", "generate", name, PROMPT, "--state", file]
        status = subprocess.run(
            [*second, "--max-tokens", "200", "--top-p", "0.5", "--seed", "1"], check=False
        ).returncode
    console.out("...\n" if name != "nestling" else "... (nestling has learnt a manner of writing, no facts)\n")
    console.print(_table(name, score, data))
    console.out("xz starts from nothing; the model was trained on other texts, and its weights are not counted.")
    if name == "nestling" and path is None:
        console.out("This document was held out from its training.")
    return status


def _table(name: str, score: Score, data: bytes) -> Table:
    packed = len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    table = Table("", "bits per byte", "bytes", title=f"The document, {len(data):,} bytes")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("as it is", "8.000", f"{len(data):,}")
    table.add_row("xz -9e, this document alone", f"{8 * packed / len(data):.3f}", f"{packed:,}")
    table.add_row(f"{name}, as a predictor", f"{score.bits_per_byte:.3f}", f"{score.bits / 8:,.0f}")
    return table
