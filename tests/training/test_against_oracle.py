"""Loss, gradients and new weights against an independent RWKV-LM in NumPy float64 (tests/oracle_training.py)."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import oracle
import oracle_training
from oracle_training import Recipe
from roost import PRESETS, RWKV, TokenLoader, TrainConfig, train
from roost.data.batch import Batch
from roost.data.binidx import write_tokens
from roost.training.loss import next_token_sums

VOCAB, B, T = 29, 2, 9
GENERATIONS = ("eagle-tiny", "finch-tiny")
RECIPE = Recipe(
    steps=3, lr=2e-3, lr_final=2e-4, warmup=1, warmup_from=0.2, beta1=0.9, beta2=0.99, eps=1e-8,
    weight_decay=0.1, clip=2.0, l2wrap=1e-2,
)  # fmt: skip
"""L2Wrap a hundred times RWKV-LM's, so that its part of the gradient is far above rounding."""


def network(name: str, dtype: torch.dtype) -> RWKV:
    """Two layers whose every parameter matters: fresh ones leave output matrices at zero. The same in any dtype."""
    model = RWKV(replace(PRESETS[name], n_layer=2, vocab_size=VOCAB, dim_ffn=32), dtype=dtype)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=g) * 0.5 / parameter.shape[-1] ** 0.5
            parameter.copy_((parameter.float() + noise).to(dtype))
    return model


def arrays(model: RWKV) -> dict[str, np.ndarray]:
    return {name: value.detach().double().numpy().copy() for name, value in model.state_dict().items()}


def batch(rows: int = B) -> Batch:
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (rows, T + 1), generator=g)
    return Batch(tokens[:, :-1], tokens[:, 1:])


def numbers(x: Batch) -> tuple[np.ndarray, np.ndarray]:
    return x.inputs.numpy(), x.targets.numpy()


def distance(got: np.ndarray, true: np.ndarray) -> float:
    """Relative L2 distance."""
    return float(np.linalg.norm(got - true) / (np.linalg.norm(true) + 1e-30))


@pytest.mark.parametrize("name", GENERATIONS)
def test_the_oracle_of_training_is_the_oracle(name: str) -> None:
    """Its logits are oracle.py's; its gradients are central differences of oracle.py, for every kind of parameter."""
    weights, (inputs, targets) = arrays(network(name, torch.float64)), numbers(batch(rows=1))
    leaves = {key: oracle_training.Var(value) for key, value in weights.items()}
    logits = oracle_training.logits_of(leaves, inputs).value
    true = np.stack([oracle.forward(weights, row)[0] for row in inputs])
    assert distance(logits, true) < 1e-13
    loss, pull = oracle_training.logit_gradient(true, targets, 0.01)
    rows = np.log(np.exp(true).sum(-1)) - np.take_along_axis(true, targets[..., None], -1)[..., 0]
    assert loss == pytest.approx(rows.mean(), rel=1e-13)
    _, gradients = oracle_training.gradients(weights, inputs, targets, 0.01)

    random = np.random.default_rng(0)
    for key, value in weights.items():
        if key.startswith("blocks.0.") and not key.startswith("blocks.0.ln0"):
            continue  # block 1 has the same kinds
        direction = random.choice([-1.0, 0.0, 0.0, 1.0], value.shape)  # a random half of its entries
        sides: list[float] = []
        for step in (1e-5, -1e-5):
            changed = {**weights, key: value + step * direction}
            sides.append(sum((oracle.forward(changed, r)[0] * p).sum() for r, p in zip(inputs, pull, strict=True)))
        slope = (sides[0] - sides[1]) / 2e-5
        assert (gradients[key] * direction).sum() == pytest.approx(slope, rel=1e-6, abs=1e-9), key


@pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", GENERATIONS)
def test_loss_and_gradients_of_one_step(name: str, dtype: torch.dtype, bound: float) -> None:
    """In fp32 the recurrence itself (backend "reference") is up to 5e-6 away: the rounding of these networks."""
    model, data = network(name, dtype), batch()
    sums = next_token_sums(model, data, l2wrap=RECIPE.l2wrap)
    (sums.loss / int(sums.count)).backward()
    loss, true = oracle_training.gradients(arrays(model), *numbers(data), RECIPE.l2wrap)
    assert sums.entropy.item() / (B * T) == pytest.approx(loss, rel=min(bound, 1e-6))
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert distance(parameter.grad.double().numpy(), true[key]) < bound, key


@pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-13), (torch.float32, 3e-6)])
@pytest.mark.parametrize("name", GENERATIONS)
def test_weights_after_one_and_three_steps(tmp_path: Path, name: str, dtype: torch.dtype, bound: float) -> None:
    """The whole of `train`: groups, schedule, clipping, AdamW. A step moves a weight by 4e-4 to 4e-3."""
    g = torch.Generator().manual_seed(0)
    write_tokens(tmp_path / "data", [torch.randint(1, VOCAB, (200,), generator=g).tolist()], vocab_size=VOCAB)
    data, model = TokenLoader(tmp_path / "data", T, B), network(name, dtype)
    expected = oracle_training.train(arrays(model), [numbers(data.batch_at(s)) for s in range(RECIPE.steps)], RECIPE)
    assert any(step.norm > RECIPE.clip for step in expected), "clipping must be seen at work"
    config = TrainConfig(**asdict(RECIPE), out=str(tmp_path / "run"), log_every=1, peak_flops=1.0)
    seen: list[dict[str, np.ndarray]] = []
    train(model, data, config, progress=lambda _: seen.append(arrays(model)))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for s, (line, step) in enumerate(zip(lines, expected, strict=True)):
        assert line["loss"] == pytest.approx(step.loss, rel=1e-6)  # the log is fp32
        assert line["gradient_norm"] == pytest.approx(step.norm, rel=10 * bound)
        assert line["lr"] == pytest.approx(oracle_training.rate(s, RECIPE), rel=1e-12)
    for s in (0, 2):
        for key, true in expected[s].weights.items():
            assert distance(seen[s][key], true) < bound, (s, key)
