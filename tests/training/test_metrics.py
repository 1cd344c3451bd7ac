"""Logs: a full disk costs no line, optional writers get a copy and may fail, plots draw what a log holds."""

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
    """They get every number, under train/ or the stream's name."""
    seen: list[Any] = []
    starts: list[Any] = []
    wandb, board = ModuleType("wandb"), ModuleType("torch.utils.tensorboard")
    run = SimpleNamespace(log=lambda numbers, step: seen.append((step, numbers)), finish=lambda: seen.append("done"))
    wandb.init = lambda **given: starts.append(given) or run  # type: ignore[attr-defined]
    scalar = SimpleNamespace(add_scalar=lambda *point: seen.append(point), close=lambda: seen.append("closed"))
    board.SummaryWriter = lambda out, purge_step: starts.append(purge_step) or scalar  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    log = Log(config(tmp_path, wandb="project", tensorboard=True))
    log.write({"step": 3, "validation": "a", "loss": 2.5})
    log.close()
    assert seen == [("a/loss", 2.5, 3), (3, {"a/loss": 2.5}), "closed", "done"]
    Log(config(tmp_path, wandb="project", tensorboard=True), step=8)  # a resume: points from 9 on are written again
    (tmp_path / "other").mkdir()
    Log(config(tmp_path / "other", wandb="project", tensorboard=True))
    assert starts[::2] == [1, 9, 1]
    first, again, other = starts[1::2]
    assert first["project"] == "project" and first["resume"] == "allow" and first["name"] == tmp_path.name
    assert first["id"] == again["id"] != other["id"]


def test_other_writers_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, or a service that is gone: a warning, once; the run and its log go on."""

    class Unreachable(Exception):
        """As wandb.Error: no OSError."""

    class Failing:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def close(self) -> None: ...

        def add_scalar(self, key: str, value: float, step: int) -> None:
            if step == 2:
                raise OSError(28, "No space left on device")

        log = lambda self, numbers, step: None  # noqa: E731

        def finish(self) -> None:
            raise Unreachable("gone")

    board, wandb = ModuleType("torch.utils.tensorboard"), ModuleType("wandb")
    board.SummaryWriter = Failing  # type: ignore[attr-defined]
    wandb.init = Failing  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = Log(config(tmp_path, tensorboard=True, wandb="project"))
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1.5})
    log.close()
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    found = [(line["step"], line["warning"]) for line in lines if "warning" in line]
    assert [step for step, _ in found] == [2, 3]
    assert "TensorBoard failed and gets no more lines: [Errno 28]" in found[0][1]
    assert "Weights & Biases failed and gets no more lines: gone" in found[1][1]


def test_a_sample_may_hold_other_line_ends(tmp_path: Path) -> None:
    log = Log(config(tmp_path))
    lines = [{"step": 1, "sample": "a\u2028b\x85c\rd"}, {"step": 2}]
    for line in [*lines, {"step": 3}]:
        log.write(line)
    trim(tmp_path / "log.jsonl", 2)
    assert read_log(tmp_path) == lines


def test_other_files_are_no_logs(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for bad, message in (
        (b"5", "line 2 has no step"),
        (b'{"loss": 1}', "line 2 has no step"),
        (b'{"step": true}', "line 2 has no step"),
        (b"\xff", "line 2 is not JSON"),
        (b"xx", "line 2 is not JSON"),
    ):
        path.write_bytes(b'{"step": 1, "loss": 1e999}\n' + bad + b"\n")
        with pytest.raises(ValueError, match=f"log.jsonl is not a log of a run: {message}"):
            curves([tmp_path])
    path.write_bytes(b'{"step": 1, "loss": 1e999}\n')
    assert curves([tmp_path]) == {}


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
