"""Logs: a full disk costs no line, optional writers say what to install, plots draw what a log holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from roost.cli import main
from roost.training.metrics import Log, measured_peak, trim
from roost.training.plot import curves, plot, read_log
from training_runs import config


def test_a_full_disk_costs_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, opened = Log(config(tmp_path)), Path.open
    log.write({"step": 1})

    def full(self: Path, *how: Any, **more: Any) -> Any:
        if how == ("a",):
            with opened(self, "a") as file:
                file.write('{"st')
            raise OSError(28, "No space left on device")
        return opened(self, *how, **more)

    monkeypatch.setattr(Path, "open", full)
    log.write({"step": 2})
    monkeypatch.undo()
    assert read_log(tmp_path) == [{"step": 1}]
    log.write({"step": 3})
    assert read_log(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3}]
    trim(tmp_path / "log.jsonl", 2)
    assert read_log(tmp_path) == [{"step": 1}, {"step": 2}]
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write({"step": 4, "loss": float("nan")})


def test_other_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absent: an error that says what to install. Present: every number, under train/ or the stream's name."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        Log(config(tmp_path, wandb="project"))
    with pytest.raises(ValueError, match="pip install tensorboard"):
        Log(config(tmp_path, tensorboard=True))
    seen: list[Any] = []
    wandb, board = ModuleType("wandb"), ModuleType("torch.utils.tensorboard")
    run = SimpleNamespace(log=lambda numbers, step: seen.append((step, numbers)), finish=lambda: seen.append("done"))
    wandb.init = lambda **given: seen.append(given["project"]) or run  # type: ignore[attr-defined]
    scalar = SimpleNamespace(add_scalar=lambda *point: seen.append(point), close=lambda: seen.append("closed"))
    board.SummaryWriter = lambda out: scalar  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    log = Log(config(tmp_path, wandb="project", tensorboard=True))
    log.write({"step": 3, "validation": "a", "loss": 2.5})
    log.close()
    assert seen == ["project", ("a/loss", 2.5, 3), (3, {"a/loss": 2.5}), "closed", "done"]


def test_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        lines = [{"step": s, "loss": 3.0 - s, "gradient_norm": 1.0, "tokens_per_second": 9} for s in (1, 2)]
        lines.append({"step": 2, "validation": "held", "loss": 1.5, "bits_per_byte": 2.0})
        (tmp_path / name / "log.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "l'
        )
    runs = [str(tmp_path / name) for name in ("one", "two")]
    found = curves(runs)
    assert found["loss"] == {"one": [(1, 2.0), (2, 1.0)], "two": [(1, 2.0), (2, 1.0)]}
    assert found["bits_per_byte"] == {"one: held": [(2, 2.0)], "two: held": [(2, 2.0)]}
    picture = tmp_path / "curves.png"
    assert main(["plot", *runs, "-o", str(picture)]) == 0
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and str(picture) in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds no run"):
        plot([tmp_path / "three"], picture)
    (tmp_path / "one" / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot([tmp_path / "one"], picture)


def test_the_peak_is_that_of_a_product() -> None:
    assert 1e8 < measured_peak(torch.device("cpu"), torch.float32) < 1e14
    assert measured_peak(torch.device("meta"), torch.float32) == 0
