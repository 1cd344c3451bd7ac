"""The examples run, on a tiny model, and stay short."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tiny import tiny_model

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(path.read_text().splitlines()) < 60
    model = tmp_path / "tiny.safetensors"
    tiny_model().save(model)
    runpy.run_path(str(path))["main"](str(model))
    assert capsys.readouterr().out.count("\n") > 2


def test_there_are_examples() -> None:
    assert {"quickstart.py", "fork_state.py"} <= {path.name for path in EXAMPLES}
