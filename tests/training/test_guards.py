"""What a run survives: fp16 that looks for its scale, data that change, a directory that vanishes, a second run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from math import isfinite
from pathlib import Path

import pytest
import torch

from roost import RWKV, TokenLoader, train
from roost.data.batch import Batch
from roost.data.pairs import PairBatch
from roost.training import loop
from roost.training.guards import Interrupted, drawing, dump
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
            return count + (loop.LOST if count and len(counts) > 5 else count)

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


def test_a_bad_batch_of_pairs_keeps_its_reference(tmp_path: Path) -> None:
    """Without it the step could not be made again."""
    ids = torch.zeros(1, 4, dtype=torch.long)
    dump(tmp_path / "bad.pt", [PairBatch(ids, ids, (0, 2, 4), torch.tensor([-1.0, -2.0]))], {"step": 3})
    (kept,) = torch.load(tmp_path / "bad.pt", weights_only=True)["parts"]
    assert PairBatch(**kept).reference.tolist() == [-1.0, -2.0] and kept["cu_seqlens"] == (0, 2, 4)


def test_draws_leave_other_devices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the generators that are put back afterwards are seeded: the host's and the run's own."""
    generators = tuple(torch.Generator().manual_seed(7) for _ in range(2))  # in the place of two GPUs'
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: [g.manual_seed(seed) for g in generators])
    monkeypatch.setattr(torch.random, "fork_rng", nullcontext)
    before = torch.get_rng_state()
    with drawing(torch.device("cuda", 1), 0, 1, 2):
        seeds = [generator.initial_seed() for generator in generators]
        assert seeds == [7, torch.default_generator.initial_seed()] and seeds[1] != 7
    torch.set_rng_state(before)


def test_a_bad_step_leaves_nothing_in_the_figures(tmp_path: Path, corpus: Path) -> None:
    """They are made of what was seen since: one NaN would otherwise stay in them for ever."""

    class Once:
        steps, seen = 0, 0.0

        def figures(self, total: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
            found, self.seen = self.seen, 0.0
            return {"seen": found}

        def __call__(self, model: RWKV, batch: Batch) -> Sums:
            sums, self.steps = next_token_sums(model, batch), self.steps + 1
            factor = torch.nan if self.steps == 3 else 1.0
            self.seen += factor
            return Sums(sums.loss * factor, sums.entropy, sums.count)

    train(tiny_model(), TokenLoader(corpus, 32, 4), config(tmp_path / "run", steps=6, log_every=2), objective=Once())
    assert [(line["step"], line.get("seen")) for line in log(tmp_path / "run")] == [(2, 2), (3, None), (4, 1), (6, 2)]


@pytest.mark.parametrize("package,module", [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_named_before_the_run(
    tmp_path: Path, corpus: Path, package: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    run = config(tmp_path / "run", **{package: "project" if package == "wandb" else True})
    with pytest.raises(ValueError, match=f"pip install {package}"):
        train(tiny_model(), TokenLoader(corpus, 32, 4), run)
    assert not (tmp_path / "run").exists()


def test_a_signal_of_another_rank_keeps_its_name(tmp_path: Path, corpus: Path) -> None:
    class First(Alone):
        ranks = 2

        def max_counts(self, count: int) -> int:
            return max(count, int(signal.SIGINT))

    with pytest.raises(Interrupted, match="stopped by SIGINT after step 1"):
        train(tiny_model(), TokenLoader(corpus, 32, 4), config(tmp_path / "run"), reduce=First())
