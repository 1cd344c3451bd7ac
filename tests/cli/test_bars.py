"""Progress bars: on a terminal they show speed, time left and the size of the state; elsewhere nothing."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from roost.cli import terminal


def test_reading_bar() -> None:
    screen = io.StringIO()
    with terminal.reading("reading", 1_622_016, Console(file=screen, force_terminal=True, width=120)) as progress:
        progress(512, 2048)
        progress(2048, 2048)
    shown = screen.getvalue()
    assert "2048/2048" in shown and "tokens/s" in shown and "state 1.6 MB" in shown and "left" in shown


def test_nothing_is_drawn_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.reading("reading", 10) as progress:
        progress(1, 2)
    with terminal.training() as show:
        show(1, 2, 3.5, 1000.0)
    assert capsys.readouterr() == ("", "")


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
