"""The loop: parts of a step, lengths, skipped steps, signals, devices that share a step, frozen parts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from roost import PRESETS, RWKV, TokenLoader, TrainConfig, load, train
from roost.data.batch import Batch
from roost.tokenizer import WorldTokenizer
from roost.training.guards import Interrupted
from roost.training.loss import Sums, next_token_sums
from roost.training.reducer import Alone
from roost.training.resume import checkpoints
from roost.training.start import length_of
from roost.training.validation import Held
from tiny import tiny_model
from training_runs import RECIPE, config, corpus_in, log, losses, same


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return corpus_in(tmp_path)


@dataclass
class Masked:
    """Batches whose parts have very different numbers of targets; step 2 may hold an id that breaks the loss."""

    loader: TokenLoader

    @property
    def identity(self) -> dict[str, int | str]:
        return self.loader.identity

    def batch_at(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        whole = self.loader.batch_at(step)
        targets = whole.targets.clone()
        targets[0, 3:] = -1
        return Batch(whole.inputs, targets).split(parts)[part]


@pytest.mark.parametrize("name", ["eagle-tiny", "finch-tiny"])
def test_parts_weigh_by_their_tokens(tmp_path: Path, corpus: Path, name: str) -> None:
    """Four parts = one batch, to fp32 rounding, although the first part has 3 targets and the others 32."""
    runs = {}
    for parts in (1, 4):
        model = tiny_model(name)
        run = config(tmp_path / str(parts), steps=3, accumulate=parts, l2wrap=0.01, warmup=0)
        train(model, Masked(TokenLoader(corpus, 32, 4)), run)
        runs[parts] = log(tmp_path / str(parts))
    for one, four in zip(runs[1], runs[4], strict=True):
        assert four["loss"] == pytest.approx(one["loss"], rel=2e-5)
        assert four["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=2e-4)


def test_parts_may_change_at_a_resume(tmp_path: Path, corpus: Path) -> None:
    train(tiny_model(), TokenLoader(corpus, 32, 4), config(tmp_path / "run", accumulate=2))
    before = losses(tmp_path / "run")
    train(tiny_model(), TokenLoader(corpus, 32, 4), config(tmp_path / "run", accumulate=4), resume=True)
    assert losses(tmp_path / "run") == pytest.approx(before, rel=1e-5)


def test_ranks_divide_by_the_count_of_all(tmp_path: Path, corpus: Path) -> None:
    """A rank reads its own shares, divides by everybody's targets, and steps on everybody's gradients."""
    loader, seen, norms = TokenLoader(corpus, 32, 4), [], []

    class Second(Alone):
        rank, ranks, is_main = 1, 2, False

        def sum_counts(self, count: int) -> int:
            return 2 * count

        def sum_values(self, values: torch.Tensor) -> torch.Tensor:
            return 2 * values

        def reduce_gradients(self, parameters: Any) -> None:
            for parameter in parameters:
                parameter.grad.mul_(2)
            norms.append(1)

    def objective(model: RWKV, batch: Batch) -> Sums:
        seen.append(batch.inputs)
        return next_token_sums(model, batch)

    run = config(tmp_path / "run", steps=2, accumulate=2)
    train(tiny_model(), loader, run, objective=objective, reduce=Second())
    wanted = [loader.batch_at(step, part, 4).inputs for step in (0, 1) for part in (2, 3)]
    assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True)) and len(norms) == 2
    assert not (tmp_path / "run" / "log.jsonl").exists()  # only the main rank writes it


def test_the_unit_may_be_the_objectives_own(tmp_path: Path, corpus: Path) -> None:
    class Rows:
        def count(self, batch: Batch) -> int:
            return len(batch.inputs)

        def figures(self, total: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
            return {"accuracy": total(torch.tensor(0.5)).item(), "unknown": float("nan")}

        def __call__(self, model: RWKV, batch: Batch) -> Sums:
            return next_token_sums(model, batch)

    train(tiny_model(), TokenLoader(corpus, 32, 4), config(tmp_path / "a", steps=1), objective=Rows())
    train(tiny_model(), TokenLoader(corpus, 32, 4), config(tmp_path / "b", steps=1))
    (rows,), (tokens,) = log(tmp_path / "a"), log(tmp_path / "b")
    assert rows["loss"] == pytest.approx(32 * tokens["loss"], rel=1e-6) and rows["accuracy"] == 0.5
    assert "unknown" not in rows  # JSON has no such number


def test_the_end_of_a_run(tmp_path: Path, corpus: Path) -> None:
    """Steps, tokens (to the end of the step that reaches them) or epochs; the run stops there and says so."""
    data = TokenLoader(corpus, 32, 4)
    assert length_of(data, TrainConfig(steps=7)) == (7, 7.0, 128.0)
    assert length_of(data, TrainConfig(tokens=1000)) == (8, 1000 / 128, 128.0)
    epochs = length_of(data, TrainConfig(epochs=1.5))
    assert epochs.exact == pytest.approx(1.5 * data.windows / 4) and epochs.steps == -(-int(epochs.exact * 4) // 4)
    train(tiny_model(), data, config(tmp_path / "run", steps=0, tokens=300))
    lines = log(tmp_path / "run")
    assert [line["tokens"] for line in lines] == [128, 256, 384] and lines[-1]["step"] == 3
    keys = {"lr", "gradient_norm", "tokens_per_second", "flops_per_second", "peak_share", "memory_bytes", "data_wait"}
    assert keys <= lines[0].keys() and lines[0]["peak_share"] > 0 and lines[0]["memory_bytes"] > 10**7


@pytest.mark.parametrize("name", ["eagle-tiny", "finch-tiny"])
def test_recomputation_changes_no_bit(tmp_path: Path, corpus: Path, name: str) -> None:
    models = [tiny_model(name), tiny_model(name)]
    for model, recompute in zip(models, (False, True), strict=True):
        train(model, TokenLoader(corpus, 32, 4), config(tmp_path / str(recompute), steps=3, recompute=recompute))
    assert same(*models) and "forward" not in models[1].layers[0].__dict__


def test_a_bad_step_is_skipped_and_kept(tmp_path: Path, corpus: Path) -> None:
    """Step 2 gives no number: nothing moves there, its batch is in a file, and the next steps are made."""
    loader, steps = TokenLoader(corpus, 32, 4), []

    def objective(model: RWKV, batch: Batch) -> Sums:
        sums = next_token_sums(model, batch)
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return Sums(sums.loss * torch.nan, sums.entropy, sums.count) if len(steps) == 3 else sums

    train(tiny_model(), loader, config(tmp_path / "run", steps=5), objective=objective)
    assert torch.equal(steps[2], steps[3]) and not torch.equal(steps[3], steps[4])
    kept = torch.load(tmp_path / "run" / "bad-step-2.pt", weights_only=True)
    assert kept["step"] == 2 and torch.equal(kept["parts"][0]["inputs"], loader.batch_at(2).inputs)
    lines = log(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5] and "step 2 was skipped" in lines[2]["warning"]
    assert torch.load(tmp_path / "run" / "step-4.pt", weights_only=True)["bad"] == 1


def test_dropout_is_drawn_again(tmp_path: Path, corpus: Path) -> None:
    """Draws are a function of the step: a resumed run has the losses of a whole one, and torch's generator is left."""

    def noisy(model: RWKV, batch: Batch) -> Sums:
        sums = next_token_sums(model, batch)
        return Sums(sums.loss * (0.5 + torch.rand(())), sums.entropy, sums.count)

    before = torch.get_rng_state()
    models = [tiny_model(), tiny_model(), tiny_model(seed=9)]
    train(models[0], TokenLoader(corpus, 32, 4), config(tmp_path / "a"), objective=noisy)
    train(models[1], TokenLoader(corpus, 32, 4), config(tmp_path / "b"), objective=noisy)
    torch.manual_seed(5)
    train(models[2], TokenLoader(corpus, 32, 4), config(tmp_path / "b"), objective=noisy, resume=True)
    torch.set_rng_state(before)
    assert same(models[0], models[2]) and len(set(losses(tmp_path / "a"))) == 12


def test_only_what_is_trained_is_kept(tmp_path: Path, corpus: Path) -> None:
    def frozen(seed: int) -> RWKV:
        model = tiny_model(seed=seed)
        model.requires_grad_(False)
        model.head.weight.requires_grad_(True)
        return model

    train(frozen(0), TokenLoader(corpus, 32, 4), config(tmp_path / "run", recompute=True))
    assert list(torch.load(tmp_path / "run" / "step-8.pt", weights_only=True)["model"]) == ["head.weight"]
    with pytest.raises(ValueError, match="was trained with frozen_weights"):
        train(frozen(1), TokenLoader(corpus, 32, 4), config(tmp_path / "run"), resume=True)
    nothing = tiny_model().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        train(nothing, TokenLoader(corpus, 32, 4), config(tmp_path / "none"))


def test_another_model_is_refused_at_a_resume(tmp_path: Path, corpus: Path) -> None:
    train(tiny_model("finch-tiny"), TokenLoader(corpus, 32, 4), config(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"was trained with .* = "):
        train(tiny_model("eagle-tiny"), TokenLoader(corpus, 32, 4), config(tmp_path / "run"), resume=True)
    more: dict[str, Any] = {"identity": {"alpha": 2.0}}
    with pytest.raises(ValueError, match=r"trained with alpha = None, not 2\.0"):
        train(tiny_model(), TokenLoader(corpus, 32, 4), config(tmp_path / "run"), resume=True, **more)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves(
    tmp_path: Path, corpus: Path, signum: int, request: pytest.FixtureRequest
) -> None:
    """The step in which it comes is finished and saved; the resumed run equals one that was left alone."""
    before = signal.signal(signum, signal.default_int_handler)  # programs that a shell starts with & ignore SIGINT
    request.addfinalizer(lambda: signal.signal(signum, before))
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]

    def interrupting(model: RWKV, batch: Batch) -> Sums:
        if len(losses(tmp_path / "run") if (tmp_path / "run" / "log.jsonl").exists() else []) == 5:
            os.kill(os.getpid(), signum)
        return next_token_sums(model, batch, 1e-4)

    models = [tiny_model(), tiny_model(), tiny_model()]
    train(models[0], TokenLoader(corpus, 32, 4), config(tmp_path / "whole"))
    with pytest.raises(Interrupted, match=r"after step 6; saved .*step-6.pt") as stopped:
        train(models[1], TokenLoader(corpus, 32, 4), config(tmp_path / "run"), objective=interrupting)
    assert stopped.value.signum == signum
    assert handlers == [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    train(models[2], TokenLoader(corpus, 32, 4), config(tmp_path / "run"), resume=True)
    assert same(models[0], models[2]) and losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_saving_by_the_clock(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10**6, 40))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    run = config(tmp_path / "run", steps=5, save_every=99, save_minutes=1, keep=9)
    train(tiny_model(), TokenLoader(corpus, 32, 4), run)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-2.pt", "step-4.pt"]


def test_validation_lines(tmp_path: Path, corpus: Path) -> None:
    """Loss, perplexity, bits per byte of each stream; a domain's figures weigh its streams by their tokens."""
    from roost.training.streams import byte_lengths

    g, lengths = torch.Generator().manual_seed(0), byte_lengths(WorldTokenizer.byte_level(), 257)
    streams = {name: torch.randint(1, 257, (size,), generator=g) for name, size in (("a", 500), ("b", 90), ("c", 90))}
    held = {name: Held(ids, lengths, "" if name == "c" else "law", "en") for name, ids in streams.items()}
    run = config(tmp_path / "run", steps=2, validate_every=1)
    train(tiny_model(), TokenLoader(corpus, 32, 4), run, validation=held, sample=lambda model: f"{model.training}")
    lines = [line for line in log(tmp_path / "run") if line["step"] == 2]
    found = {line["validation"]: line for line in lines if "validation" in line}
    assert list(found) == ["a", "b", "c", "domain law", "language en"]
    a, b, law = found["a"], found["b"], found["domain law"]
    assert law["tokens"] == a["tokens"] + b["tokens"]
    assert law["loss"] * law["tokens"] == pytest.approx(a["loss"] * a["tokens"] + b["loss"] * b["tokens"])
    assert a["perplexity"] == pytest.approx(2.718281828459045 ** a["loss"])
    assert a["bits_per_byte"] == pytest.approx(a["loss"] / 0.6931471805599453)  # one byte a token
    assert lines[-1] == {"step": 2, "sample": "False"}


@pytest.mark.parametrize("name", ["eagle-tiny", "finch-tiny"])
def test_pth_for_the_rwkv_package(tmp_path: Path, corpus: Path, name: str) -> None:
    final = train(tiny_model(name), TokenLoader(corpus, 32, 4), config(tmp_path / "run", steps=1, pth=True))
    both = [load(path)[0] for path in (final, final.with_suffix(".pth"))]
    assert final.name == "final.safetensors" and same(*both)
    assert torch.load(final.with_suffix(".pth"), weights_only=True).keys() == both[0].state_dict().keys()


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path, corpus: Path) -> None:
    """SIGKILL at random moments and while a checkpoint is being written: the run that is left equals a quiet one."""
    for out in ("quiet", "killed"):
        text = RECIPE.format(data=corpus, out=tmp_path / out).replace("steps = 60", "steps = 30")
        (tmp_path / f"{out}.toml").write_text(text.replace("save_every = 3", "save_every = 1"))

    def start(name: str, dying: str = "") -> subprocess.Popen[bytes]:
        code = f"""
import torch, os, signal
torch.set_num_threads(1)
from roost.training.recipe import run_recipe
save, count = torch.save, 0
def dying(content, path):
    global count
    count += 1
    save(content, path)
    if count == {dying or 0}:
        os.truncate(path, 5000)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = dying
run_recipe({str(tmp_path / name)!r}, resume=True)
"""
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)

    assert start("quiet.toml").wait() == 0
    assert start("killed.toml", "5").wait() == -signal.SIGKILL
    assert list((tmp_path / "killed").glob(".*.tmp"))
    moments = torch.rand(3, generator=torch.Generator().manual_seed(int(time.time()))).tolist()
    for moment in moments:
        process, newest = start("killed.toml"), checkpoints(tmp_path / "killed")[-1]
        while process.poll() is None and checkpoints(tmp_path / "killed")[-1:] == [newest]:
            time.sleep(0.002)
        time.sleep(moment * 0.2)
        process.kill()
        process.wait()
    assert start("killed.toml").wait() == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "quiet"), moments
    one, other = (load(tmp_path / name / "final.safetensors")[0] for name in ("quiet", "killed"))
    assert same(one, other), moments


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch looks, and hides it from users only
def test_compiled_blocks(tmp_path: Path, corpus: Path, unchecked: None) -> None:
    """The same losses to rounding; `eager` shows that the blocks are compiled one by one and restored."""
    seen: list[object] = []
    compiled = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda f: seen.append(f) or compiled(f, backend="eager"))
        model = RWKV(PRESETS["finch-tiny"])
        train(model, TokenLoader(corpus, 32, 4), config(tmp_path / "a", steps=2, compile=True))
    train(RWKV(PRESETS["finch-tiny"]), TokenLoader(corpus, 32, 4), config(tmp_path / "b", steps=2))
    assert len(seen) == 3 and "forward" not in model.layers[0].__dict__
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-5)


def test_the_command_line_says_that_it_stopped(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM: the step is finished and saved, one line says so, the exit code is 143; --resume finishes the run."""
    from roost.cli import main
    from roost.training import loop

    (tmp_path / "r.toml").write_text(RECIPE.format(data=corpus, out=tmp_path / "run"))
    asked: list[int] = []
    rate, arguments = loop.learning_rate, ["train", str(tmp_path / "r.toml"), "--set", "steps=8"]

    def stopping(step: int, *more: Any) -> float:
        if step == 4 and not asked:  # a second signal would end the run at once
            asked.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(step, *more)

    monkeypatch.setattr(loop, "learning_rate", stopping)
    assert main(arguments) == 143
    captured = capsys.readouterr()
    assert captured.out == "" and "stopped by SIGTERM after step 5; saved" in captured.err
    assert main([*arguments, "--resume"]) == 0
    assert "wrote" in capsys.readouterr().out and len(losses(tmp_path / "run")) == 8
