"""The trainer: groups, schedule, loss, exact resume of a killed process, guards."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from roost import PRESETS, RWKV, TokenLoader, TrainConfig, load, train
from roost.data.binidx import write_tokens
from roost.tokenizer import WorldTokenizer
from roost.training.loss import next_token_loss
from roost.training.optim import group_of, learning_rate, optimiser
from roost.training.resume import checkpoints
from roost.training.streams import byte_lengths
from roost.training.validation import Held, validate
from training_runs import TEXT, config, corpus_in, log, losses, same

LENGTHS = byte_lengths(WorldTokenizer.byte_level(), 257)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return corpus_in(tmp_path)


@pytest.mark.parametrize("name,eagle,finch", [("eagle-tiny", True, False), ("finch-tiny", False, True)])
def test_groups(name: str, eagle: bool, finch: bool) -> None:
    """RWKV-LM's table: the decay learns twice as fast; matrices and the embedding decay; nothing else does."""
    matrices = {"receptance", "key", "value", "gate", "output"}
    for parameter_name, parameter in RWKV(PRESETS[name]).named_parameters():
        parts = parameter_name.split(".")
        decays = parts[0] in ("emb", "head") or (len(parts) == 5 and parts[3] in matrices)
        doubled = parts[-1] == "time_decay"
        assert group_of(parameter_name, parameter, 0.1) == (2.0 if doubled else 1.0, 0.1 if decays else 0.0)
    assert group_of("blocks.0.att.time_first", torch.zeros(3), 0.1) == (3.0, 0.0)
    assert group_of("blocks.0.att.time_state", torch.zeros(2, 3, 3), 0.1) == (1.0, 0.1)


def test_frozen_parameters_are_left_out() -> None:
    model = RWKV(PRESETS["finch-tiny"])
    model.emb.weight.requires_grad_(False)
    grouped = {id(p) for group in optimiser(model, TrainConfig(steps=1)).param_groups for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters()} - {id(model.emb.weight)}


def test_schedule() -> None:
    c = TrainConfig(steps=110, lr=1e-3, lr_final=1e-4, warmup=10)
    assert learning_rate(0, c) == pytest.approx(0.2e-3)
    assert learning_rate(5, c) == pytest.approx(0.6e-3)
    assert learning_rate(10, c) == pytest.approx(1e-3)
    assert learning_rate(60, c) == pytest.approx(5.5e-4)
    assert learning_rate(110, c) == pytest.approx(1e-4)
    assert learning_rate(0, TrainConfig(steps=5, warmup=0)) == pytest.approx(6e-4)


REFERENCE = TrainConfig(tokens=1498226207, lr=6e-4, lr_final=6e-5, warmup=10, warmup_from=0.01)


@pytest.mark.parametrize(
    "step,rate",
    [
        *((0, 6e-6), (1, 6.54e-5), (5, 3.03e-4), (10, 6e-4), (1000, 5.999609549e-4), (50000, 5.064127157e-4)),
        *((91445, 3.300207358e-4), (150000, 1.019587496e-4), (182888, 6.000000004e-5)),
    ],
)
def test_schedule_by_tokens_is_that_of_rwkv_lm(step: int, rate: float) -> None:
    """docs: RWKV-LM's demo run, 16 rows of 512 tokens; the warm-up of the paper begins at a fifth."""
    length = REFERENCE.tokens / (512 * 16)
    assert learning_rate(step, REFERENCE, length) == pytest.approx(rate, rel=1e-9)
    paper = {0: 1.2e-4, 1: 1.68e-4, 5: 3.6e-4}.get(step, rate)
    assert learning_rate(step, replace(REFERENCE, warmup_from=0.2), length) == pytest.approx(paper, rel=1e-9)


def test_other_schedules() -> None:
    c = TrainConfig(steps=100, lr=1.0, lr_final=0.1, warmup=10, schedule="wsd", cooldown=0.2)
    assert [learning_rate(s, c) for s in (10, 50, 80)] == [1.0, 1.0, 1.0]
    assert learning_rate(85, c) == pytest.approx(1 - 0.9 * 0.5) and learning_rate(100, c) == pytest.approx(0.1)
    assert learning_rate(85, replace(c, schedule="wsd-linear")) == pytest.approx(1 - 0.9 * 0.25)
    assert learning_rate(99, replace(c, schedule="constant")) == 1.0
    assert learning_rate(5, replace(c, schedule="constant")) == pytest.approx(0.6)


def test_l2wrap_is_the_gradient_of_rwkv_lm() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=g, requires_grad=True)
    targets = torch.randint(0, 7, (2, 5), generator=g)
    plain, _ = next_token_loss(logits, targets)
    total, entropy = next_token_loss(logits, targets, l2wrap=1e-2)
    assert entropy == plain
    difference = torch.autograd.grad(total, logits)[0] - torch.autograd.grad(plain, logits)[0]
    values, where = logits.detach().max(-1, keepdim=True)
    assert torch.allclose(difference, torch.zeros_like(logits).scatter(-1, where, 1e-2 * values / 10), atol=1e-7)


def test_masked_targets_count_nowhere() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 6, 7, generator=g)
    targets = torch.tensor([[1, -100, 2, 3, -100, -100]])
    kept = targets[0] >= 0
    total, entropy = next_token_loss(logits, targets, 0.1)
    wanted, wanted_entropy = next_token_loss(logits[:, kept], targets[:, kept], 0.1)
    assert torch.allclose(total, wanted) and torch.allclose(entropy, wanted_entropy)
    assert next_token_loss(logits, torch.full((1, 6), -100), 0.1)[0] == 0
    assert next_token_loss(logits, targets.clamp(min=-1), 0.1)[0] == total


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["dove-tiny", "eagle-tiny", "finch-tiny"])
def test_it_learns(tmp_path: Path, corpus: Path, name: str, precision: str) -> None:
    final = train(
        RWKV(PRESETS[name]), TokenLoader(corpus, 32, 4), config(tmp_path / "run", steps=40, precision=precision)
    )
    history = losses(tmp_path / "run")
    assert len(history) == 40 and history[0] > 5 and history[-1] < 3.2
    model, tokenizer = load(final)
    assert model.config == PRESETS[name] and tokenizer is not None and tokenizer.vocab_size == 257


def test_interrupted_and_resumed_is_the_same_run(tmp_path: Path, corpus: Path) -> None:
    """Losses and final weights equal those of one uninterrupted run, bit for bit."""
    whole = RWKV(PRESETS["finch-tiny"])
    train(whole, TokenLoader(corpus, 32, 4), config(tmp_path / "whole"))

    class Stop(Exception):
        pass

    def stop(p: object) -> None:
        if p.step == 10:  # type: ignore[attr-defined]
            raise Stop

    parts = config(tmp_path / "parts", keep=1)
    with pytest.raises(Stop):
        train(RWKV(PRESETS["finch-tiny"]), TokenLoader(corpus, 32, 4), parts, progress=stop)
    assert [p.name for p in checkpoints(tmp_path / "parts")] == ["step-8.pt"]
    resumed = RWKV(PRESETS["finch-tiny"], seed=99)
    train(resumed, TokenLoader(corpus, 32, 4), parts, resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_run_is_not_overwritten(tmp_path: Path, corpus: Path) -> None:
    data = TokenLoader(corpus, 32, 4)
    train(RWKV(PRESETS["finch-tiny"]), data, config(tmp_path / "run"))
    with pytest.raises(ValueError, match="already holds a run"):
        train(RWKV(PRESETS["finch-tiny"]), data, config(tmp_path / "run"))
    for change, message in (({"lr": 0.1}, "lr = 0.003, not 0.1"), ({"steps": 13}, "steps = 12, not 13")):
        with pytest.raises(ValueError, match=f"was trained with {message}"):
            train(RWKV(PRESETS["finch-tiny"]), data, config(tmp_path / "run", **change), resume=True)
    with pytest.raises(ValueError, match="was trained with ctx = 32, not 16"):
        train(RWKV(PRESETS["finch-tiny"]), TokenLoader(corpus, 16, 4), config(tmp_path / "run"), resume=True)


def test_a_short_finished_run_is_not_overwritten(tmp_path: Path, corpus: Path) -> None:
    short = config(tmp_path / "run", steps=2)
    final = train(RWKV(PRESETS["finch-tiny"]), TokenLoader(corpus, 32, 4), short)
    before = final.read_bytes()
    with pytest.raises(ValueError, match="holds a finished run"):
        train(RWKV(PRESETS["finch-tiny"], seed=1), TokenLoader(corpus, 32, 4), short)
    assert final.read_bytes() == before and len(losses(tmp_path / "run")) == 2


def test_what_a_kill_leaves_behind(tmp_path: Path, corpus: Path) -> None:
    """A log line cut short and an abandoned temporary file are cleared; a damaged checkpoint is named."""
    run, data = config(tmp_path / "run"), TokenLoader(corpus, 32, 4)
    train(RWKV(PRESETS["finch-tiny"]), data, run)
    whole = losses(tmp_path / "run")
    with (tmp_path / "run" / "log.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    killed = subprocess.Popen(["true"])
    killed.wait()
    (tmp_path / "run" / f".roost-{killed.pid}-00.tmp").write_bytes(b"half")
    living = tmp_path / "run" / f".roost-{os.getpid()}-00.tmp"
    living.write_bytes(b"being written by somebody")
    train(RWKV(PRESETS["finch-tiny"]), data, run, resume=True)
    assert losses(tmp_path / "run") == whole and list((tmp_path / "run").glob(".*.tmp")) == [living]
    newest = checkpoints(tmp_path / "run")[-1]
    flipped = bytearray(newest.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    newest.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"step-8.pt is damaged.*checksums"):
        train(RWKV(PRESETS["finch-tiny"]), data, run, resume=True)
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"step-8.pt is damaged: delete it; the run then goes on from step-4.pt"):
        train(RWKV(PRESETS["finch-tiny"]), data, run, resume=True)


def test_validation_is_checked_before_the_run(tmp_path: Path, corpus: Path) -> None:
    held = {"short": Held(torch.tensor([5]), LENGTHS)}
    with pytest.raises(ValueError, match="short has 1 token"):
        train(RWKV(PRESETS["finch-tiny"]), TokenLoader(corpus, 32, 4), config(tmp_path / "run"), validation=held)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_other_data_of_the_same_size_is_noticed(tmp_path: Path, corpus: Path) -> None:
    train(RWKV(PRESETS["finch-tiny"]), TokenLoader(corpus, 32, 4), config(tmp_path / "run"))
    write_tokens(corpus, [[b + 1 for b in TEXT[::-1]]] * 3, vocab_size=257)
    with pytest.raises(ValueError, match="was trained with data_digest"):
        train(RWKV(PRESETS["finch-tiny"]), TokenLoader(corpus, 32, 4), config(tmp_path / "run"), resume=True)


def test_a_run_may_not_become_longer_at_a_resume(tmp_path: Path, corpus: Path) -> None:
    """Also where it ends after `tokens`, whose name is not that of the data's length."""
    data = TokenLoader(corpus, 32, 4)
    train(RWKV(PRESETS["finch-tiny"]), data, config(tmp_path / "run", steps=0, tokens=128 * 4, save_every=2))
    longer = config(tmp_path / "run", steps=0, tokens=128 * 6, save_every=2)
    with pytest.raises(ValueError, match="was trained with tokens = 512, not 768"):
        train(RWKV(PRESETS["finch-tiny"]), data, longer, resume=True)
    with pytest.raises(ValueError, match="two parts of the run have a setting called lr"):
        train(RWKV(PRESETS["finch-tiny"]), data, config(tmp_path / "other"), identity={"lr": 1.0})


def test_numpy_numbers_do_not_spoil_a_checkpoint(tmp_path: Path, corpus: Path) -> None:
    run = config(tmp_path / "run", lr=np.float64(3e-3), steps=np.int64(12))
    train(RWKV(PRESETS["finch-tiny"]), TokenLoader(corpus, 32, 4), run)
    whole = losses(tmp_path / "run")
    train(RWKV(PRESETS["finch-tiny"]), TokenLoader(corpus, 32, 4), run, resume=True)
    assert losses(tmp_path / "run") == whole and len(whole) == 12


def test_what_cannot_be_saved_is_not_trained(tmp_path: Path, corpus: Path) -> None:
    strange = RWKV(replace(PRESETS["finch-tiny"], group_norm_eps=1e-5))
    with pytest.raises(ValueError, match="group_norm_eps is 1e-05"):
        train(strange, TokenLoader(corpus, 32, 4), config(tmp_path / "run"))


def test_16_bit_weights_are_not_trained(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ValueError, match="training needs"):
        train(RWKV(PRESETS["finch-tiny"], dtype=torch.bfloat16), TokenLoader(corpus, 32, 4), config(tmp_path / "run"))


def test_not_finite_stops_before_the_weights_change(tmp_path: Path, corpus: Path) -> None:
    model = RWKV(PRESETS["finch-tiny"])
    with torch.no_grad():
        model.head.weight[3] = torch.inf
    before = model.emb.weight.clone()
    with pytest.raises(ValueError, match=r"step 0: loss nan, .* bad step 1 \(max_bad_steps = 0"):
        train(model, TokenLoader(corpus, 32, 4), config(tmp_path / "run", max_bad_steps=0))
    assert torch.equal(model.emb.weight, before)


def test_full_disk_keeps_the_last_checkpoint(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on with a warning, what was saved before stays, and the result is that of a run with room."""
    quiet = RWKV(PRESETS["finch-tiny"])
    train(quiet, TokenLoader(corpus, 32, 4), config(tmp_path / "quiet"))
    save, count = torch.save, []

    def failing(content: object, path: Path) -> None:
        count.append(path)
        if len(count) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(content, path)

    monkeypatch.setattr(torch, "save", failing)
    model = RWKV(PRESETS["finch-tiny"])
    train(model, TokenLoader(corpus, 32, 4), config(tmp_path / "run"))
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-4.pt"]
    assert not list((tmp_path / "run").glob(".*.tmp"))
    (warning,) = [line for line in log(tmp_path / "run") if "warning" in line]
    assert warning["step"] == 8 and "No space left" in warning["warning"]
    assert same(model, quiet)


def test_validation_is_the_mean_loss(corpus: Path) -> None:
    """A model that knows nothing: log 257 nats per token, log2 257 bits per byte."""
    model = RWKV(PRESETS["finch-tiny"])
    with torch.no_grad():
        model.head.weight.zero_()
    tokens = torch.tensor([b + 1 for b in TEXT])
    nats, bits = validate(model, Held(tokens, LENGTHS), rows=4, chunk=100)
    assert nats == pytest.approx(np.log(257)) and bits == pytest.approx(np.log2(257))
    model = RWKV(PRESETS["finch-tiny"], seed=5)
    whole = validate(model, Held(tokens, LENGTHS), rows=1, chunk=10**6)
    assert validate(model, Held(tokens, LENGTHS), rows=1, chunk=33) == pytest.approx(whole, rel=1e-5)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        validate(model, Held(tokens[:1], LENGTHS))


def test_byte_lengths_of_the_world() -> None:
    lengths = byte_lengths(WorldTokenizer(), 65536)
    assert lengths[0] == 0 and lengths[261] == 2 and lengths[65529] == 128 and lengths[65530:].sum() == 0
