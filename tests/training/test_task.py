"""The choice of a task: its keys, and runs of the real loop that learn what they should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from roost.data.binidx import write_tokens
from roost.data.loader import PackedLoader, TokenLoader
from roost.data.pairs import PairLoader
from roost.data.sft import SftLoader, read_conversations
from roost.tokenizer import WorldTokenizer
from roost.training.config import TrainConfig
from roost.training.dpo import Dpo
from roost.training.loop import train
from roost.training.task import Data, TaskConfig, answer_sums, begin, open_data, summary
from tiny import tiny_model

BYTES = WorldTokenizer.byte_level()
GENERATIONS = ["eagle-tiny", "finch-tiny"]


@pytest.fixture
def conversations(tmp_path: Path) -> str:
    path = tmp_path / "sft.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"q{i}" * (i + 1), "completion": "yes" * (i % 3 + 1)}) + "\n" for i in range(8))
    )
    return str(path)


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    path = tmp_path / "dpo.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"q{i}", "chosen": "yes", "rejected": "no"}) + "\n" for i in range(8))
    )
    return str(path)


@pytest.mark.parametrize("name", GENERATIONS)
def test_packed_answers_weigh_as_single_ones(name: str, conversations: str) -> None:
    """Cross-entropy, L2Wrap and gradients of a packed row are those of every conversation by itself, in one piece."""
    model = tiny_model(name).double()
    documents = read_conversations([conversations], BYTES, 64)
    loader, l2wrap = SftLoader(documents, 64, 6), 1e-2
    total, entropy, count = torch.zeros((), dtype=torch.float64), 0.0, 0
    for i in range(len(documents)):
        ids, loss = torch.tensor(documents[i].ids.astype(np.int64)), torch.tensor(documents[i].loss)
        logits = model(ids[None, :-1])[0][0][loss[1:]]
        nats = F.cross_entropy(logits, ids[1:][loss[1:]], reduction="sum")
        total = total + nats + 0.5 * l2wrap * logits.amax(-1).square().sum()
        entropy, count = entropy + nats.item(), count + len(logits)
    wanted = torch.autograd.grad(total, list(model.parameters()))
    assert loader.windows <= 6
    every = SftLoader(documents, 64, loader.windows)
    sums = answer_sums(model, every.batch_at(0), l2wrap)
    assert (float(sums.entropy), int(sums.count)) == (pytest.approx(entropy, rel=1e-12), count)
    found = torch.autograd.grad(sums.loss, list(model.parameters()))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def run(out: Path, task: TaskConfig, data: str, name: str, **numbers: Any) -> list[dict[str, Any]]:
    """Train with the loop and return its log."""
    settings = {"steps": 12, "lr": 3e-3, "lr_final": 3e-3, "schedule": "constant", "log_every": 1, "peak_flops": 1.0}
    model, config = tiny_model(name), TrainConfig(out=str(out), **{**settings, **numbers})
    opened = open_data(task, (data,), BYTES, ctx=64, batch=4, vocab_size=257)
    batches, objective = begin(task, opened, model, config, 64)
    train(model, batches, config, objective=objective)
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", GENERATIONS)
def test_runs_learn(name: str, conversations: str, pairs: str, tmp_path: Path) -> None:
    """The loss of answers falls; that of pairs falls from log 2, and accumulation changes it by rounding only."""
    lines = run(tmp_path / "sft", TaskConfig("sft"), conversations, name)
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    whole = [line["loss"] for line in run(tmp_path / "dpo", TaskConfig("dpo"), pairs, name)]
    assert whole[0] == pytest.approx(np.log(2), rel=1e-4)
    assert whole[-1] < 0.5 * whole[0]
    halves = [line["loss"] for line in run(tmp_path / "two", TaskConfig("dpo"), pairs, name, accumulate=2, steps=4)]
    assert halves == pytest.approx(whole[:4], rel=1e-4)


def opened(task: TaskConfig, *paths: str, tokenizer: WorldTokenizer | None = BYTES, **rest: Any) -> Data:
    return open_data(task, paths, tokenizer, **{"ctx": 64, "batch": 2, "vocab_size": 257, "seed": 4, **rest})


def test_each_task_opens_its_data(conversations: str, pairs: str, tmp_path: Path) -> None:
    model, config = tiny_model(), TrainConfig(steps=1, out=str(tmp_path / "run"))
    write_tokens(tmp_path / "tokens", [range(1, 50)], vocab_size=257)
    windows = opened(TaskConfig(), str(tmp_path / "tokens"), tokenizer=None, ctx=8, order="sequential")
    assert isinstance(windows, TokenLoader) and (windows.order, windows.seed) == ("sequential", 4)
    packed = opened(TaskConfig(), str(tmp_path / "tokens"), packing="documents")  # fewer than ctx tokens
    assert isinstance(packed, PackedLoader) and packed.windows == 1
    sft = opened(TaskConfig("sft"), *(conversations,) * 2)
    assert isinstance(sft, SftLoader)
    assert (sft.documents.report.kept, sft.seed) == (16, 4)
    task = TaskConfig("dpo", beta=0.2, label_smoothing=0.1, normalise=True, reference=str(tmp_path / "r"))
    dpo, objective = begin(task, opened(task, pairs), model, config, 64)
    assert isinstance(dpo, PairLoader) and dpo.seed == 4
    assert (dpo.reference.logprobs < 0).all()
    assert objective == Dpo(0.2, 0.1, True)
    assert dpo.identity["objective"] == "Dpo(beta=0.2, label_smoothing=0.1, normalise=True)"
    assert (tmp_path / "r").is_file() and not (tmp_path / "run").exists()
    begin(TaskConfig("dpo"), opened(TaskConfig("dpo"), pairs), model, config, 64)
    assert (tmp_path / "run/reference.safetensors").is_file()


def test_summary(conversations: str, pairs: str, tmp_path: Path) -> None:
    path, turn = tmp_path / "more.jsonl", {"prompt": "q", "completion": "y" * 90}
    turns = [{"role": role, "content": text} for text in ("long " * 6, "b") for role in ("user", "assistant")]
    path.write_text(f"oops\n[]\n{json.dumps(turn)}\n{json.dumps({'messages': turns})}\n")
    found = opened(TaskConfig("sft", bad_lines="skip"), conversations, str(path))
    assert isinstance(found, SftLoader)
    assert summary(found).startswith(f"9 conversations, 2 bad lines: {path}, line 1: ")
    assert summary(found).endswith("; 1 shortened; 1 too long")
    found = opened(TaskConfig("dpo"), pairs)
    assert isinstance(found, PairLoader) and summary(found) == "8 pairs"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"task": "stf"}, "did you mean 'sft'"),
    ({"task": "sft", "loss_on": ["asistant"]}, "did you mean 'assistant'"),
    ({"task": "sft", "loss_on": "user"}, "loss_on is 'user'"),
    ({"task": "sft", "long": "cut"}, "long is 'cut'"),
    ({"task": "sft", "template": "alpaca"}, "template is"),
    ({"task": "sft", "bad_lines": True}, "bad_lines is True"),
    ({"task": "dpo", "beta": "0.1"}, "beta is '0.1'"),
    ({"task": "dpo", "beta": -1}, "beta is -1"),
    ({"task": "dpo", "label_smoothing": 0.5}, "label_smoothing is 0.5"),
    ({"task": "dpo", "normalise": 1}, "normalise is 1"),
    ({"task": "sft", "beta": 0.2}, "beta is 0.2, which task 'sft' ignores: dpo use"),
    ({"long": "drop"}, "long is 'drop', which task 'pretrain' ignores"),
]


@pytest.mark.parametrize("keys,message", BAD)
def test_bad_keys(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskConfig(**keys)


def test_bad_data(conversations: str) -> None:
    large = WorldTokenizer({i + 1: bytes([i]) for i in range(256)}, vocab_size=300)
    cases: list[tuple[str, tuple[str, ...], WorldTokenizer | None, str]] = [
        ("pretrain", (), None, "data is empty"),
        ("pretrain", ("a", "b"), None, "pretraining reads one token file"),
        ("sft", (), BYTES, "data is empty"),
        ("sft", (conversations,), None, "vocabulary is not known"),
        ("sft", (conversations,), large, "the tokenizer has 300 ids, the model only 257"),
        ("dpo", (conversations,), BYTES, 'line 1: expected "prompt"'),
    ]
    for task, data, tokenizer, message in cases:
        with pytest.raises(ValueError, match=message):
            opened(TaskConfig(cast(Any, task)), *data, tokenizer=tokenizer)
