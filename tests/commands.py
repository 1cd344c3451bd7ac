"""A command line that is wrong, run in this process."""

from __future__ import annotations

import pytest

from roost.cli import main


def error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a wrong command line gets."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("roost: error: ")
    return err.removeprefix("roost: error: ").removesuffix("\n")
