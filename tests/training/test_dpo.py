"""DPO: closed forms, gradients against an independent formula, the reference and its file."""

from __future__ import annotations

import json
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from roost.data.batch import Batch
from roost.data.pairs import PairBatch, PairLoader, Reference, read_pairs
from roost.data.sft import Documents
from roost.models.rwkv import RWKV, fingerprint_of
from roost.tokenizer import WorldTokenizer
from roost.training import dpo
from roost.training.dpo import Dpo, answer_logprobs, pair_losses, reference_logprobs
from tiny import tiny_model

GENERATIONS = ["eagle-tiny", "finch-tiny"]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    """Six pairs with answers of different lengths."""
    path = tmp_path_factory.mktemp("dpo") / "a.jsonl"
    records = [
        {"prompt": f"q{i}" * (i + 1), "chosen": "yes" * (1 + i % 2), "rejected": "no" * (i + 1)} for i in range(6)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_pairs([path], WorldTokenizer.byte_level(), 200)


def test_closed_forms() -> None:
    """beta = 1/2; gains 1.5 and -0.5 make a margin of 1, gains of 0 a margin of 0, a loss of log 2."""
    policy = torch.tensor([-1.0, -4.5, -2.0, -3.0], dtype=torch.float64)
    reference = torch.tensor([-2.5, -4.0, -2.0, -3.0], dtype=torch.float64)
    losses, margin = pair_losses(policy, reference, 0.5)
    assert margin.tolist() == pytest.approx([1, 0], abs=1e-15)
    assert losses.tolist() == pytest.approx([log(1 + exp(-1)), log(2)], rel=1e-14)
    losses, _ = pair_losses(policy, reference, 0.5, 0.1)
    assert losses.tolist() == pytest.approx([0.9 * log(1 + exp(-1)) + 0.1 * log(1 + exp(1)), log(2)], rel=1e-14)
    large, _ = pair_losses(policy * 1e4, reference, 0.5)
    assert torch.isfinite(large).all()


def answers(model: RWKV, documents: Documents) -> list[torch.Tensor]:
    """Log-probabilities of each document's learned tokens, one document and one token at a time."""
    found: list[torch.Tensor] = []
    for i in range(len(documents)):
        ids, loss = torch.tensor(documents[i].ids.astype(np.int64)), documents[i].loss
        logits, _ = model(ids[None])
        terms = [
            logits[0, t - 1, ids[t]] - torch.log(torch.exp(logits[0, t - 1]).sum())
            for t in range(1, len(ids))
            if loss[t]
        ]
        found.append(torch.stack(terms))
    return found


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("name", GENERATIONS)
def test_loss_and_gradient(name: str, normalise: bool, documents: Documents) -> None:
    """Against the formula written out over single documents; in shares as in one piece; logits whole or in pieces."""
    generator = torch.Generator().manual_seed(1)
    model, n = tiny_model(name).double(), len(documents)
    reference = -20 * torch.rand(n, generator=generator)
    beta, e = 0.3, 0.2
    p = torch.stack([some.mean() if normalise else some.sum() for some in answers(model, documents)])
    gain = p - reference.double()
    margins = beta * (gain[0::2] - gain[1::2])
    expected = ((1 - e) * torch.log(1 + torch.exp(-margins)) + e * torch.log(1 + torch.exp(margins))).mean()
    wanted = torch.autograd.grad(expected, list(model.parameters()))

    loader = PairLoader(documents, Reference(reference.numpy(), ""), n // 2)
    for parts, largest in [(1, 2**25), (3, 2**25), (1, 3 * 257)]:
        objective = Dpo(beta, e, normalise, largest)
        batches = [loader.batch_at(0, part, parts) for part in range(parts)]
        count = sum(objective.count(batch) for batch in batches)
        model.zero_grad()
        loss = 0.0
        for batch in batches:
            sums = objective(model, batch)
            (sums.loss / count).backward()
            loss += sums.entropy.item() / count
            assert int(sums.count) == objective.count(batch) == n // 2 // parts
        assert loss == pytest.approx(expected.item(), rel=1e-12)
        for (key, parameter), grad in zip(model.named_parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-9, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}")
        assert objective.figures() == pytest.approx(
            {"reward_margin": margins.mean().item(), "reward_accuracy": (margins > 0).double().mean().item()}
        )
        assert objective.figures() == {}


@pytest.mark.parametrize("name", GENERATIONS)
def test_the_reference_is_the_model_before_training(name: str, documents: Documents) -> None:
    """Values of single documents in NumPy; at the start every margin is 0 and the loss log 2."""
    model = tiny_model(name)
    model.train()
    found = reference_logprobs(model, documents, tokens=100)
    assert model.training
    assert found.fingerprint == model.fingerprint
    with torch.no_grad():
        expected = [some.double().sum().item() for some in answers(model, documents)]
    np.testing.assert_allclose(found.logprobs, expected, rtol=2e-6)
    objective = Dpo()
    sums = objective(model, PairLoader(documents, found, 6).batch_at(0))
    assert sums.entropy.item() / 6 == pytest.approx(log(2), rel=1e-5)
    assert objective.figures()["reward_margin"] == pytest.approx(0, abs=1e-5)


def test_the_file_is_used_and_stale_when_anything_differs(
    documents: Documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = tmp_path / "reference.safetensors", tiny_model()
    first = reference_logprobs(model, documents, path)
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "answer_logprobs", None)  # nothing may be computed
        again = reference_logprobs(model, documents, path)
    assert again.logprobs.tobytes() == first.logprobs.tobytes()

    other = tiny_model(seed=1)
    changed = reference_logprobs(other, documents, path)
    assert changed.fingerprint == fingerprint_of(other.config, other.state_dict()) != first.fingerprint
    assert not np.array_equal(changed.logprobs, first.logprobs)
    fewer = Documents(
        documents.ids[: documents.offsets[4]],
        documents.loss[: documents.offsets[4]],
        documents.offsets[:5],
        documents.report,
    )
    kept = path.read_bytes()
    for data, options in [(fewer, {}), (documents, {"precision": "bf16"}), (documents, {"normalise": True})]:
        path.write_bytes(kept)
        values = reference_logprobs(other, data, path, **options)  # pyright: ignore[reportArgumentType]
        assert path.read_bytes() != kept
        assert values.logprobs.shape == (len(data),)
    assert reference_logprobs(other, documents, path).logprobs.tobytes() == changed.logprobs.tobytes()


def test_a_file_that_is_something_else_stays(documents: Documents, tmp_path: Path) -> None:
    model = tiny_model()
    for content in (b"notes", b""):
        path = tmp_path / "notes.txt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged or no reference file"):
            reference_logprobs(model, documents, path)
        assert path.read_bytes() == content
    weights = tmp_path / "model.safetensors"
    save_file({"logprobs": np.zeros(12, np.float32)}, weights)
    before = weights.read_bytes()
    with pytest.raises(ValueError, match="is no reference file of roost"):
        reference_logprobs(model, documents, weights)
    assert weights.read_bytes() == before


def test_a_failed_write_leaves_the_old_file(
    documents: Documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "reference.safetensors"
    reference_logprobs(tiny_model(), documents, path)
    before = path.read_bytes()

    def full(_: object, file: Path, __: object) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(dpo, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        reference_logprobs(tiny_model(seed=1), documents, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with safe_open(path, "numpy") as file:
        assert file.metadata()["kind"] == dpo.KIND


def test_errors(documents: Documents) -> None:
    model = tiny_model()
    for arguments in ((0.0,), (float("nan"),), (0.1, 0.5), (0.1, -0.1)):
        with pytest.raises(ValueError, match="must be"):
            Dpo(*arguments)
    row = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="needs those of a PairLoader"):
        Dpo()(model, Batch(row, row, (0, 2, 4)))
    with pytest.raises(ValueError, match="no cu_seqlens"):
        answer_logprobs(model, Batch(row, row))
    empty = PairBatch(row, torch.tensor([[1, 1, -1, -1]]), (0, 2, 4), torch.zeros(2))
    with pytest.raises(ValueError, match="sequence 1 has no target"):
        Dpo()(model, empty)
