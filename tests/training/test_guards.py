"""What a run survives: fp16 that looks for its scale, data that change, a directory that vanishes, a second run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from math import isfinite
from pathlib import Path

import pytest
import torch

from roost import RWKV, TokenLoader, train
from roost.data.batch import Batch
from roost.training import loop
from roost.training.loop import Progress
from roost.training.loss import Sums, next_token_sums
from roost.training.reducer import Alone
from roost.training.resume import checkpoints
from tiny import tiny_model
from training_runs import config, corpus_in, log, losses, same


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return corpus_in(tmp_path)


def scaled(model: RWKV, batch: Batch, by: float = 100.0) -> Sums:
    sums = next_token_sums(model, batch)
    return Sums(sums.loss * by, sums.entropy, sums.count)


def test_fp16_finds_its_scale(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients overflow until the scale is low enough: these steps are no bad ones, and their lines have no norm."""
    monkeypatch.setattr(loop, "check_run", lambda *_, **__: None)  # it refuses fp16 on a CPU
    models = [tiny_model(), tiny_model(), tiny_model(seed=9)]
    run = {"precision": "fp16", "max_bad_steps": 0}
    train(models[0], TokenLoader(corpus, 32, 4), config(tmp_path / "whole", **run), objective=scaled)
    lines = log(tmp_path / "whole")
    found = ["gradient_norm" in line for line in lines]
    assert len(lines) == 12 and not any("warning" in line for line in lines)
    assert found == sorted(found) and 4 < found.index(True) < 8 and all(isfinite(line["loss"]) for line in lines)
    assert lines[4]["loss"] == pytest.approx(lines[0]["loss"], rel=0.05) and lines[-1]["loss"] < lines[0]["loss"] / 2
    state = torch.load(tmp_path / "whole" / "step-8.pt", weights_only=True)
    assert state["scaler"]["scale"] == 65536 / 2 ** found.index(True) and state["bad"] == 0

    def stop(at: Progress) -> None:
        if at.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        out = config(tmp_path / "parts", **run)
        train(models[1], TokenLoader(corpus, 32, 4), out, objective=scaled, progress=stop)
    train(models[2], TokenLoader(corpus, 32, 4), out, objective=scaled, resume=True)
    assert same(models[0], models[2]) and losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_gradient_that_no_scale_mends_is_bad(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its elements are finite, their norm is not: the scale stays, and the run does not go on for ever."""
    monkeypatch.setattr(loop, "check_run", lambda *_, **__: None)

    def huge(model: RWKV, batch: Batch) -> Sums:
        sums = next_token_sums(model, batch)
        return Sums(sums.loss + 3e30 * model.ln_out.bias.sum(), sums.entropy, sums.count)

    with pytest.raises(ValueError, match=r"gradient norm inf; that is bad step 3 \(max_bad_steps = 2"):
        run = config(tmp_path / "run", precision="fp16", max_bad_steps=2)
        train(tiny_model(), TokenLoader(corpus, 32, 4), run, objective=huge)


@pytest.mark.parametrize("vanishes", [False, True])
def test_data_that_change_end_the_run_after_a_checkpoint(tmp_path: Path, corpus: Path, vanishes: bool) -> None:
    """Cut short (to read it would kill the process) or gone; put back, the resumed run is the whole one."""
    file, kept = corpus.with_suffix(".bin"), corpus.with_suffix(".kept")
    shutil.copy(file, kept)
    steps: list[int] = []

    def striking(model: RWKV, batch: Batch) -> Sums:
        steps.append(len(steps))
        if len(steps) == 6:
            file.unlink() if vanishes else os.truncate(file, 100)
        return next_token_sums(model, batch)

    models = [tiny_model(), tiny_model(), tiny_model(seed=9)]
    train(models[0], TokenLoader(corpus, 32, 4), config(tmp_path / "whole"), objective=next_token_sums)
    with pytest.raises(ValueError, match=r"corpus\.bin changed or vanished during the run"):
        train(models[1], TokenLoader(corpus, 32, 4), config(tmp_path / "run"), objective=striking)
    assert checkpoints(tmp_path / "run")[-1].name == "step-6.pt"
    shutil.copy(kept, file)
    train(models[2], TokenLoader(corpus, 32, 4), config(tmp_path / "run"), objective=next_token_sums, resume=True)
    assert same(models[0], models[2]) and losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_data_that_another_rank_lost_end_the_run_here_too(tmp_path: Path, corpus: Path) -> None:
    """Otherwise this rank would wait for ever, and a checkpoint needs all."""
    counts: list[int] = []

    class First(Alone):
        ranks = 2

        def sum_counts(self, count: int) -> int:
            counts.append(count)
            return count + (loop.LOST if count and len(counts) > 9 else count)

    with pytest.raises(ValueError, match=r"another rank could not read its data of step \d"):
        train(tiny_model(), TokenLoader(corpus, 32, 4), config(tmp_path / "run"), reduce=First())
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-4.pt", "step-5.pt"]


def test_a_directory_that_vanishes_is_made_again(tmp_path: Path, corpus: Path) -> None:
    """At the next checkpoint, or for the final model. No line is lost that came after."""
    steps: list[int] = []

    def striking(model: RWKV, batch: Batch) -> Sums:
        steps.append(len(steps))
        if len(steps) == 6:
            shutil.rmtree(tmp_path / "run")
        return scaled(model, batch, torch.nan if len(steps) == 7 else 1.0)

    final = train(tiny_model(), TokenLoader(corpus, 32, 4), config(tmp_path / "run"), objective=striking)
    assert final.exists() and [path.name for path in checkpoints(tmp_path / "run")] == ["step-8.pt"]
    lines = log(tmp_path / "run")
    warnings = [line["warning"] for line in lines if "warning" in line]
    assert [line["step"] for line in lines if "lr" in line] == [6, 8, 9, 10, 11, 12]
    assert "step 6 was skipped" in warnings[0] and "was not kept" in warnings[1] and "vanished" in warnings[2]
    shutil.rmtree(tmp_path / "run")

    def leaving(at: Progress) -> None:
        if at.step == 3:
            shutil.rmtree(tmp_path / "run")

    run = config(tmp_path / "run", steps=3)
    assert train(tiny_model(), TokenLoader(corpus, 32, 4), run, progress=leaving).exists()


RUNNING = """
import sys
from pathlib import Path
from roost import TokenLoader, train
from tiny import tiny_model
from training_runs import config
folder = Path(sys.argv[1])
def wait(at):
    if at.step == 6:
        print("held", flush=True)
        sys.stdin.read()
train(tiny_model(), TokenLoader(folder / "corpus", 32, 4), config(folder / "run"), progress=wait)
"""


@pytest.mark.slow
def test_two_runs_do_not_write_one_directory(tmp_path: Path, corpus: Path) -> None:
    """A resume of a run that is alive is refused and changes nothing; when it was killed, it goes on."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", RUNNING, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as other:
        assert other.stdout and other.stdout.readline() == b"held\n"
        before = (tmp_path / "run" / "log.jsonl").read_bytes()
        with pytest.raises(ValueError, match=r"another run is writing .*run: wait for its end"):
            train(tiny_model(), TokenLoader(corpus, 32, 4), config(tmp_path / "run"), resume=True)
        assert (tmp_path / "run" / "log.jsonl").read_bytes() == before and len(losses(tmp_path / "run")) == 6
        other.send_signal(signal.SIGKILL)
    train(tiny_model(), TokenLoader(corpus, 32, 4), config(tmp_path / "run"), resume=True)
    assert len(losses(tmp_path / "run")) == 12 and not (tmp_path / "run" / ".lock").exists()
