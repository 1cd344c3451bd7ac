"""Progress bars: on a terminal they show speed, time left and the size of the state; elsewhere nothing."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from roost.cli import terminal
from roost.cli.training import View
from roost.training.loop import Progress


def test_reading_bar() -> None:
    screen = io.StringIO()
    with terminal.reading("reading", 1_622_016, Console(file=screen, force_terminal=True, width=120)) as progress:
        progress(512, 2048)
        progress(2048, 2048)
    shown = screen.getvalue()
    assert "2048/2048" in shown and "tokens/s" in shown and "state 1.6 MB" in shown and "left" in shown


def test_preparing_bar() -> None:
    screen = io.StringIO()
    with terminal.preparing(Console(file=screen, force_terminal=True, width=120)) as show:
        show(1_000_000, 4_000_000, 0.0, 0.0)
        show(2_000_000, 4_000_000, 0.02, 100.0)
    assert "preparing" in screen.getvalue() and "2.0 MB of 4.0 MB  0.0 MB/s  1:40 left" in screen.getvalue()


def test_nothing_is_drawn_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.reading("reading", 10) as progress:
        progress(1, 2)
    with terminal.preparing() as show:
        show(1, 2, 1.0, 1.0)
    assert capsys.readouterr() == ("", "")


LINES: list[dict[str, Any]] = [
    {"loss": 3.5, "lr": 6e-4, "gradient_norm": 0.25, "tokens_per_second": 12345},
    {"loss": 3.25, "lr": 5e-4, "tokens_per_second": 12345},
    {"validation": "valid [x]", "loss": 3.125},
    {"sample": "Once"},
    {"warning": "no checkpoint: no space left"},
]


def test_training_bar() -> None:
    """Loss, rate, norm, speed, the last validation; a warning does not stay."""
    screen = io.StringIO()
    with terminal.training(Console(file=screen, force_terminal=True, width=150)) as show:
        view = View(show)
        for line in LINES:
            view(Progress(10, 20, line))
    shown = screen.getvalue()
    assert (
        "10/20" in shown and "loss 3.2500  lr 5.00e-04  12,345 tokens/s  valid [x] 3.1250" in shown and "left" in shown
    )
    assert view.last == " after step 10, loss 3.2500"


def test_a_run_without_a_terminal_prints_a_line_per_line_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        with terminal.training(quiet=quiet) as show:
            view = View(show)
            for line in LINES:
                view(Progress(10, 20, line))
        wanted = [
            "loss 3.5000  lr 6.00e-04  norm 0.25  12,345 tokens/s",
            "loss 3.2500  lr 5.00e-04  12,345 tokens/s",
            "valid [x] 3.1250",
            "warning: no checkpoint: no space left",
        ]
        out, err = capsys.readouterr()
        assert out == "" and err.splitlines() == ([] if quiet else [f"step 10/20  {text}" for text in wanted])


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_622_016, "1.6 MB"),
        (99_960_000, "100 MB"),
        (3 * 10**15, "3000 TB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert terminal.size(count) == text
