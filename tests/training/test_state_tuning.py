"""A tuned initial state and fine-tuning with frozen parts. Both generations throughout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from oracle import forward as oracle_forward
from roost import RWKV, TrainConfig, load
from roost.models.rwkv import fingerprint_of
from roost.training.adapter_config import AdapterConfig
from roost.training.adapters import Adapted, apply, merge_files, prepare_model
from roost.training.optim import optimiser
from roost.training.selection import freeze, matches
from tiny import tiny_model

STATE = AdapterConfig(adapter="state")
TOKENS = torch.tensor([[72, 101, 108, 108, 111, 33, 10, 200, 3, 7]])

every_generation = pytest.mark.parametrize("generation", ["eagle-tiny", "finch-tiny"])


def logits(model: RWKV) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)[0]


def loss_of(model: RWKV, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def tuned(model: RWKV, steps: int = 3) -> Adapted:
    """A few steps at the rates for states."""
    adapted = prepare_model(model, STATE)
    adam = optimiser(model, TrainConfig(steps=1, lr=1.0, weight_decay=0.0))
    for _ in range(steps):
        adam.zero_grad()
        loss_of(model, TOKENS).backward()
        adam.step()
    return adapted


@every_generation
def test_an_untouched_state_changes_no_bit_and_remove_leaves_no_trace(generation: str, tmp_path: Path) -> None:
    model = tiny_model(generation)
    model.save(tmp_path / "before.pth")
    before, mark, config = logits(model), model.fingerprint, model.config
    adapted = prepare_model(model, STATE)
    assert torch.equal(logits(model), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapted.whole)
    assert adapted.whole == tuple(f"blocks.{i}.att.time_state" for i in range(3))
    assert adapted.parameters == 3 * 2 * 32 * 32 and model.config.time_state
    with torch.no_grad():
        model.get_parameter("blocks.1.att.time_state").add_(1.0)
    assert not torch.equal(logits(model), before)
    adapted.remove()
    assert torch.equal(logits(model), before) and model.config == config and model.fingerprint == mark
    model.save(tmp_path / "after.pth")
    assert list(torch.load(tmp_path / "after.pth")) == list(torch.load(tmp_path / "before.pth"))


@every_generation
def test_rows_add_up(generation: str) -> None:
    """Four equal rows have four times the gradient of one; different rows, the sum of theirs."""
    model = tiny_model(generation).double()
    adapted = prepare_model(model, STATE)
    other = TOKENS.flip(1)

    def gradients(*rows: Tensor) -> list[Tensor]:
        model.zero_grad()
        loss_of(model, torch.cat(rows)).backward()
        found = [model.get_parameter(name).grad for name in adapted.whole]
        return [gradient.clone() for gradient in found if gradient is not None]

    one, two = gradients(TOKENS), gradients(other)
    assert len(one) == 3 and all(gradient.abs().max() > 1e-4 for gradient in one)
    for single, four in zip(one, gradients(*[TOKENS] * 4), strict=True):
        assert torch.allclose(four, 4 * single, rtol=1e-10, atol=1e-14)
    for a, b, both in zip(one, two, gradients(TOKENS, other), strict=True):
        assert torch.allclose(both, a + b, rtol=1e-10, atol=1e-14)


@every_generation
def test_gradient_against_differences(generation: str) -> None:
    """Central differences in the official layout, [head, value, key]."""
    model = tiny_model(generation).double()
    prepare_model(model, STATE)
    loss_of(model, TOKENS).backward()
    step = 1e-5
    for layer, at in ((0, (1, 3, 7)), (2, (0, 30, 2))):
        parameter = model.get_parameter(f"blocks.{layer}.att.time_state")
        assert parameter.grad is not None
        found: list[float] = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[at] += sign * step
                found.append(loss_of(model, TOKENS).item())
                parameter[at] -= sign * step
        difference = (found[0] - found[1]) / (2 * step)
        assert abs(parameter.grad[at].item() - difference) <= 1e-6 * abs(difference) + 1e-9


@every_generation
def test_only_the_state_learns(generation: str) -> None:
    model = tiny_model(generation)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    start = loss_of(model, TOKENS).item()
    adapted = tuned(model)
    assert loss_of(model, TOKENS).item() < start - 0.5
    for name, value in model.state_dict().items():
        assert name in adapted.whole or torch.equal(value, weights[name])


@every_generation
def test_files_and_the_merged_model(generation: str, tmp_path: Path) -> None:
    """The file is the official one and metadata; merged, an official checkpoint that the NumPy oracle reads alike."""
    base = tmp_path / "base.pth"
    tiny_model(generation).save(base)
    adapted = tuned(load(base)[0])
    trained = logits(adapted.model)
    path = adapted.save_final(tmp_path)
    adapted.save(tmp_path / "state.pth")
    stored = load_file(path)
    assert stored.keys() == torch.load(tmp_path / "state.pth").keys() == set(adapted.whole)
    assert all(value.shape == (2, 32, 32) and value.dtype == torch.float32 for value in stored.values())

    for file in (path, tmp_path / "state.pth"):
        model = load(base)[0]
        applied = apply(model, file)
        assert torch.equal(logits(model), trained) and model.fingerprint
        applied.remove()
        assert not model.config.time_state and torch.equal(logits(model), logits(load(base)[0]))

    merged = load(merge_files(base, path, tmp_path / "merged.pth"))[0]
    assert merged.config.time_state and torch.equal(logits(merged), trained)
    assert merged.fingerprint == fingerprint_of(merged.config, merged.state_dict())
    weights = {name: value.numpy() for name, value in torch.load(tmp_path / "merged.pth").items()}
    exact, _ = oracle_forward(weights, TOKENS[0].tolist())
    np.testing.assert_allclose(trained[0].numpy(), exact, rtol=0, atol=1e-5 * float(np.abs(exact).max()))

    further = prepare_model(merged, STATE)  # a state that is there is tuned on, and given back
    with torch.no_grad():
        merged.get_parameter(further.whole[0]).add_(1.0)
    assert not torch.equal(logits(merged), trained)
    further.remove()
    assert merged.config.time_state and torch.equal(logits(merged), trained)


@every_generation
def test_bf16_base(generation: str) -> None:
    """The state is fp32 over bf16 weights, and learns."""
    model = tiny_model(generation).bfloat16()
    before = logits(model)
    adapted = prepare_model(model, STATE)
    assert torch.equal(logits(model), before)
    assert {model.get_parameter(name).dtype for name in adapted.whole} == {torch.float32}
    loss_of(model, TOKENS).backward()
    gradients = [model.get_parameter(name).grad for name in adapted.whole]
    assert all(g is not None and g.dtype == torch.float32 and g.abs().max() > 0 for g in gradients)


def test_state_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    states = {f"blocks.{i}.att.time_state": torch.zeros(2, 32, 32) for i in range(3)}
    for content, message in (
        ({name: value for name, value in states.items() if "1" not in name}, "has no blocks.1.att.time_state"),
        (
            {**states, "blocks.0.att.time_state": torch.zeros(1, 64, 64)},
            r"is \[1, 64, 64\], the model needs \[2, 32, 32\]",
        ),
        ({**states, "blocks.3.att.time_state": torch.zeros(2, 32, 32)}, "the model has no such place"),
        ({**states, "emb.weight": torch.zeros(1)}, "is not a state file: it holds emb.weight"),
        ([1], "holds no tensors by name"),
    ):
        torch.save(content, tmp_path / "state.pth")
        with pytest.raises(ValueError, match=message):
            apply(model, tmp_path / "state.pth")
    (tmp_path / "state.pth").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is not a readable state file"):
        apply(model, tmp_path / "state.pth")
    assert not model.config.time_state
    with pytest.raises(ValueError, match="needs eagle or finch"):
        prepare_model(tiny_model("dove-tiny"), STATE)


@every_generation
def test_full_fine_tuning_with_frozen_parts(generation: str, tmp_path: Path) -> None:
    model = tiny_model(generation)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = prepare_model(model, AdapterConfig(freeze=("emb", "head", "blocks.0.*", "time_*")))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapted.whole)
    assert trained == {
        name
        for name in weights
        if name.split(".")[0] in ("blocks", "ln_out") and "blocks.0" not in name and "time_" not in name
    }
    adam = optimiser(model, TrainConfig(steps=1, lr=1e-3))
    loss_of(model, TOKENS).backward()
    adam.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])}
    assert changed == trained
    final = adapted.save_final(tmp_path)
    assert final == tmp_path / "final.safetensors" and torch.equal(logits(load(final)[0]), logits(model))
    for refused in (adapted.remove, lambda: adapted.save(tmp_path / "adapter.safetensors")):
        with pytest.raises(ValueError, match="full fine-tuning"):
            refused()


def test_freeze() -> None:
    model = tiny_model()
    everything = [name for name, _ in model.named_parameters()]
    assert freeze(model) == everything
    assert freeze(model, trained=("head",)) == ["head.weight"]
    assert freeze(model, frozen=("ln2",), trained=("blocks.2.ln*",)) == ["blocks.2.ln1.weight", "blocks.2.ln1.bias"]
    for frozen, message in (
        (("*",), "leaves nothing to train"),
        (("hed",), "nothing is called 'hed'; did you mean 'head'"),
    ):
        with pytest.raises(ValueError, match=message):
            freeze(model, frozen)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "blocks.2.ln1.weight",
        "blocks.2.ln1.bias",
    ]


@pytest.mark.parametrize(
    "pattern,fits",
    [
        ("att.key", True),
        ("key", True),
        ("key.weight", True),
        ("blocks.1", True),
        ("blocks.*.att", True),
        ("ke?.w*", True),
        ("ke", False),
        ("ey.weight", False),
        ("blocks.11", False),
        ("ffn", False),
    ],
)
def test_patterns(pattern: str, fits: bool) -> None:
    assert matches("blocks.1.att.key.weight", pattern) == fits
