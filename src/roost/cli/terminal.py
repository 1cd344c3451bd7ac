"""What the verbs share on a terminal: progress bars, sizes, input files.

Owns: the look of a bar (speed, time left, size of the state). Bars go to stderr, and only to a terminal; a run of
hours prints lines elsewhere.
Refuses to know: models, and what is being read.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} tokens/s" if speed else "", no_wrap=True)


@contextmanager
def reading(
    what: str, state_bytes: int, console: Console | None = None, *, quiet: bool = False
) -> Generator[Callable[[int, int], None], None, None]:
    """A bar for reading a text; yields the callback (tokens done, tokens in all). `quiet`: no bar, it takes no time."""
    console = console or Console(stderr=True)
    columns = (
        TextColumn(what, markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn(f"state {size(state_bytes)}"),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def training(
    console: Console | None = None, *, quiet: bool = False
) -> Generator[Callable[[int, int, str, str], None], None, None]:
    """A bar for a training run; yields the callback (step, steps, text beside the bar, line for the record).

    The line, if there is one, is printed where no bar is drawn. `quiet`: neither, as on ranks other than the main one.
    """
    console = console or Console(stderr=True)
    columns = (
        TextColumn("step"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}", markup=False),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def show(step: int, steps: int, text: str, line: str) -> None:
            bar.update(task, completed=step, total=steps, description=text)
            if line and not quiet and not console.is_terminal:
                console.print(f"step {step}/{steps}  {line}", markup=False, highlight=False, soft_wrap=True)

        yield show


@contextmanager
def preparing(console: Console | None = None) -> Generator[Callable[[int, int, float, float], None], None, None]:
    """A bar for making a token file; yields the callback (bytes done, bytes in all, MB a second, seconds left)."""
    console = console or Console(stderr=True)
    columns = TextColumn("preparing"), BarColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int, speed: float, left: float) -> None:
            text = f"{size(done)} of {size(total)}"
            if speed:
                text += f"  {speed:.1f} MB/s  {int(left) // 60}:{int(left) % 60:02} left"
            bar.update(task, completed=done, total=total, description=text)

        yield show


def size(count: int) -> str:
    """Bytes for people, in decimal units: 1622016 -> "1.6 MB"."""
    value, units = float(count), ["TB", "GB", "MB", "kB", "B"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop()
    return f"{value:.{0 if value >= 99.95 or units[-1] == 'B' else 1}f} {units[-1]}"


def read_bytes(path: str) -> bytes:
    """A file, or standard input for "-". Raises ValueError when it is missing, a directory or empty."""
    if path == "-":
        data = sys.stdin.buffer.read()
    elif Path(path).is_dir():
        raise ValueError(f"{path} is a directory; name a file")
    elif not Path(path).exists():
        raise ValueError(f"no such file: {path}")
    else:
        data = Path(path).read_bytes()
    if not data:
        raise ValueError(f"{'standard input' if path == '-' else path} is empty: there is nothing to read")
    return data


def check_writable(path: str | None, *inputs: str | None) -> None:
    """Complain about a save path now, not after an hour of reading; never write over an input. Raises ValueError."""
    if path is None:
        return
    target = Path(path).resolve()
    if target.is_dir():
        raise ValueError(f"cannot save to {path}: it is a directory")
    if not target.parent.is_dir():
        raise ValueError(f"cannot save to {path}: the directory {target.parent} does not exist")
    if target.exists() and not target.is_file():
        raise ValueError(f"cannot save to {path}: it is not a regular file")
    for other in inputs:
        if not other or not target.exists() or not Path(other).exists():
            continue
        if target.samefile(other) or target.parent.samefile(other):  # the file, or one in the directory of a model
            raise ValueError(f"cannot save to {path}: it is what is being read; choose another name")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise ValueError(f"cannot save to {path}: {error.strerror}") from error
