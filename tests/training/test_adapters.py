"""LoRA, DoRA and PiSSA: bits of the base, gradients, NumPy's formulas, merging. Both generations throughout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from adapted import KINDS, TOKENS, every_generation, every_kind, logits, same, shake, snapshot
from roost import PRESETS, RWKV, TrainConfig
from roost.models.rwkv import fingerprint_of
from roost.training.adapter_config import AdapterConfig, default_rates
from roost.training.adapters import Adapted, prepare_model
from roost.training.lora import LowRank
from roost.training.optim import optimiser
from tiny import tiny_model

Array = NDArray[np.float64]


def factors_of(adapted: Adapted) -> Iterator[tuple[str, dict[str, Array]]]:
    for name, layer in adapted.layers.items():
        yield f"{name}.weight", {key: value.double().numpy() for key, value in layer.factors().items()}


def by_hand(config: AdapterConfig, W: Array, f: dict[str, Array]) -> Array:
    """The merged matrix, from the definitions (training.md section 10)."""
    if config.adapter == "pissa":
        return W + f["lora_B"] @ f["lora_A"] - f["lora_B0"] @ f["lora_A0"]
    scale = config.alpha / (np.sqrt(config.rank) if config.rslora else config.rank)
    C = W + scale * f["lora_B"] @ f["lora_A"]
    if config.adapter == "lora":
        return C
    if config.dora_axis == "out":
        return np.diag(f["lora_m"] / np.sqrt((C**2).sum(1))) @ C
    return C @ np.diag(f["lora_m"] / np.sqrt((C**2).sum(0)))


@every_generation
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untouched_adapter_changes_no_bit(kind: str, generation: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = KINDS[kind] if dtype == torch.float32 else replace(KINDS[kind], train_also=())
    model = tiny_model(generation).to(dtype)
    before, weights = logits(model), snapshot(model)
    model.save(tmp_path / "base.safetensors")
    adapted = prepare_model(model, config)
    assert torch.equal(logits(model), before)
    assert same(snapshot(model), weights)
    assert {layer.get_parameter("lora_A").dtype for layer in adapted.layers.values()} == {torch.float32}
    model.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "base.safetensors").read_bytes()
    model.load_state_dict(weights)  # strict
    assert torch.equal(logits(model), before)


@every_generation
def test_targets(generation: str) -> None:
    """By default every matrix of both mixers; patterns are names, parts of names, or globs."""

    def targets(*patterns: str) -> list[str]:
        return list(prepare_model(tiny_model(generation), AdapterConfig(adapter="lora", targets=patterns)).layers)

    expected = [f"blocks.{i}.att.{name}" for i in range(3) for name in ("receptance", "key", "value", "output", "gate")]
    expected += [f"blocks.{i}.ffn.{name}" for i in range(3) for name in ("key", "receptance", "value")]
    assert sorted(targets()) == sorted(expected)
    assert targets("att.k*") == [f"blocks.{i}.att.key" for i in range(3)]
    assert targets("blocks.1.ffn.value.weight", "head") == ["blocks.1.ffn.value", "head"]
    assert len(targets("key")) == 6 and len(targets("blocks.0")) == 8
    with pytest.raises(ValueError, match=r"targets: nothing is called 'att.kez'; did you mean 'att.key'"):
        targets("att.kez")


@every_generation
@every_kind
def test_only_the_adapter_learns(kind: str, generation: str) -> None:
    """Gradients, RWKV's groups without weight decay for factors, and the base's weights after real steps."""
    model = tiny_model(generation)
    weights = snapshot(model)
    adapted = prepare_model(model, KINDS[kind])
    adam = optimiser(model, TrainConfig(steps=1, lr=1e-2, weight_decay=0.1))
    first = 0.0
    for step in range(3):
        loss = F.cross_entropy(model(TOKENS[:, :-1])[0].flatten(0, 1), TOKENS[:, 1:].flatten())
        first = first or loss.item()
        adam.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            trained = "lora_" in name or name in adapted.whole
            assert parameter.requires_grad == trained == (parameter.grad is not None), name
            if trained and (step or not name.endswith("lora_A") or kind == "pissa"):  # while B = 0, A has no gradient
                assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        adam.step()
    assert loss.item() < first
    decays = {group["weight_decay"] for group in adam.param_groups}
    assert decays == {0.0}
    in_groups = sum(p.numel() for group in adam.param_groups for p in group["params"])
    assert adapted.parameters == in_groups == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapted.tensors().keys() >= {name for name, p in model.named_parameters() if p.requires_grad}
    kept = {name: value for name, value in snapshot(model).items() if name not in adapted.whole}
    assert same(kept, {name: value for name, value in weights.items() if name not in adapted.whole})


@every_generation
@every_kind
def test_merged_is_what_was_trained(kind: str, generation: str) -> None:
    """The merged matrix is NumPy's; its logits are the adapter's; unmerge and remove give back every bit."""
    model = tiny_model(generation)
    base, mark, start = snapshot(model), model.fingerprint, logits(model)
    adapted = prepare_model(model, KINDS[kind])
    shake(adapted)
    trained = logits(model)
    assert (trained - start).abs().max() > 0.1
    whole = {name: model.get_parameter(name).detach().clone() for name in adapted.whole}

    merged = adapted.merge()
    assert merged is model and not any(isinstance(module, LowRank) for module in model.modules())
    values = snapshot(model)
    assert list(values) == list(base) and model.fingerprint == fingerprint_of(model.config, values) != mark
    expected = dict(factors_of(adapted))
    for name, value in values.items():
        if name in expected:
            matrix = by_hand(adapted.config, base[name].double().numpy(), expected[name])
            np.testing.assert_allclose(value.numpy(), matrix, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(value, whole.get(name, base[name])), name
    assert (logits(model) - trained).abs().max() <= 1e-5 * trained.abs().max()

    assert all(parameter.requires_grad for parameter in model.parameters())  # a plain model, to be trained whole

    adapted.unmerge()
    assert torch.equal(logits(model), trained) and model.fingerprint == ""
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapted.parameters
    adapted.merge()
    assert same(snapshot(model), values)
    assert adapted.remove() is model
    assert same(snapshot(model), base) and torch.equal(logits(model), start) and model.fingerprint == mark
    assert all(parameter.requires_grad for parameter in model.parameters())


@every_generation
@every_kind
def test_gradients_are_those_of_the_merged_formula(kind: str, generation: str) -> None:
    """Autograd of the plain formula through `functional_call`, in fp64; the norm of DoRA is a constant."""
    config = replace(KINDS[kind], train_also=())
    model = tiny_model(generation).double()
    base = snapshot(model)
    adapted = prepare_model(model, config)
    shake(adapted)
    weight = torch.randn(2, 10, 257, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (model(TOKENS)[0] * weight).sum().backward()

    plain = tiny_model(generation).double()
    leaves: dict[str, Tensor] = {}
    matrices: dict[str, Tensor] = {}
    for name, layer in adapted.layers.items():
        f = {key: value.clone().requires_grad_(not key.endswith("0")) for key, value in layer.factors().items()}
        leaves |= {f"{name}.{key}": value for key, value in f.items()}
        W = base[f"{name}.weight"]
        if config.adapter == "pissa":
            matrices[f"{name}.weight"] = W + f["lora_B"] @ f["lora_A"] - f["lora_B0"] @ f["lora_A0"]
            continue
        C = W + config.alpha / (4**0.5 if config.rslora else 4) * f["lora_B"] @ f["lora_A"]
        if config.adapter == "dora":
            axis = 1 if config.dora_axis == "out" else 0
            C = f["lora_m"].unsqueeze(axis) * C / C.detach().norm(dim=axis, keepdim=True)
        matrices[f"{name}.weight"] = C
    output, _ = torch.func.functional_call(plain, matrices, (TOKENS,))
    (output * weight).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = leaves[name].grad
            assert expected is not None and parameter.grad is not None
            assert torch.allclose(parameter.grad, expected, rtol=1e-9, atol=1e-9 * expected.abs().max()), name


@every_generation
def test_dropout_only_while_training(generation: str) -> None:
    """drop(x) on the way into the factors: twice another result in training, with the right mean; none otherwise."""
    model = tiny_model(generation)
    adapted = prepare_model(model, AdapterConfig(adapter="lora", rank=4, dropout=0.5, targets=("head",)))
    shake(adapted)
    model.eval()
    exact = logits(model)
    assert torch.equal(logits(model), exact)
    model.train()
    assert adapted.layers["head"].training
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = torch.stack([logits(model) for _ in range(200)])
    assert not torch.equal(draws[0], draws[1])
    distance = (draws.mean(0) - exact).abs().max() / draws.std(0).max()
    assert distance < 5 / 200**0.5


@every_generation
def test_bf16_base(generation: str) -> None:
    """Factors stay fp32; the merged bf16 matrix is the nearest to NumPy's."""
    model = tiny_model(generation).bfloat16()
    base = snapshot(model)
    adapted = prepare_model(model, KINDS["lora"])
    shake(adapted)
    trained = logits(model).float()
    loss = model(TOKENS)[0].float().logsumexp(-1).sum()
    loss.backward()
    for layer in adapted.layers.values():
        gradient = layer.get_parameter("lora_B").grad
        assert gradient is not None and gradient.dtype == torch.float32 and gradient.abs().max() > 0
    expected = dict(factors_of(adapted))
    adapted.merge()
    for name, value in snapshot(model).items():
        assert value.dtype == torch.bfloat16
        if name in expected:
            matrix = by_hand(adapted.config, base[name].double().numpy(), expected[name])
            assert torch.equal(value, torch.from_numpy(matrix).to(torch.bfloat16)), name
    spread = (logits(model).float() - trained).std() / trained.std()
    assert spread < 0.05  # two ways of rounding to 8 bits, through three layers


@pytest.mark.parametrize(
    "keys,message",
    [
        ({"adapter": "lorra"}, "adapter is 'lorra'; did you mean 'lora'"),
        ({"adapter": "lora", "rank": -1}, "rank is -1; it must be at least 0"),
        ({"adapter": "lora", "alpha": -1.0}, "alpha is -1.0"),
        ({"adapter": "lora", "alpha": float("nan")}, "alpha is nan"),
        ({"adapter": "lora", "dropout": 1.0}, "dropout is 1.0; it must be a number from 0 to below 1"),
        ({"adapter": "lora", "targets": "key"}, "targets is 'key'; it must be a list"),
        ({"adapter": "lora", "dora_axis": "in"}, "dora_axis = 'in' means nothing with adapter 'lora'"),
        ({"adapter": "lora", "freeze": ["emb"]}, "freeze = .* means nothing with adapter 'lora'"),
        ({"adapter": "pissa", "alpha": 8.0}, "alpha = 8.0 means nothing with adapter 'pissa'"),
        ({"adapter": "state", "rank": 8}, "rank = 8 means nothing with adapter 'state'"),
        ({"adapter": "full", "train_also": ["ln1"]}, "train_also = .* means nothing with adapter 'full'"),
        ({"rslora": 1}, "rslora is 1; it must be a bool"),
    ],
)
def test_wrong_keys(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**keys)  # pyright: ignore[reportArgumentType]


def test_defaults() -> None:
    assert AdapterConfig(adapter="lora").form[1:3] == (16, 2.0)
    assert AdapterConfig(adapter="lora", rank=4, alpha=8, rslora=True).form.scale == 4.0
    assert AdapterConfig(adapter="pissa").form.scale == 1.0
    assert set(map(type, AdapterConfig(adapter="lora", targets=("a", "b")).identity.values())) <= {
        int,
        float,
        str,
        bool,
    }
    config = tiny_model().config
    assert default_rates("state", config) == {"lr": 1.0, "lr_final": 0.01, "warmup": 10, "weight_decay": 0.0}
    assert default_rates("full", PRESETS["finch-3b"], preferences=True)["lr"] == pytest.approx(1e-6)  # the DPO paper's
    published = {"finch-0.1b": 3e-5, "eagle-0.4b": 2e-5, "finch-1.6b": 1.5e-5, "eagle-3b": 1e-5, "finch-7b": 1e-5}
    assert {name: default_rates("full", PRESETS[name])["lr"] for name in published} == published


def test_what_cannot_be_adapted_is_refused() -> None:
    """And the model is as it was."""
    model = RWKV(tiny_model().config)  # fresh: att.output is zero
    before = snapshot(model)
    for config, message in (
        (AdapterConfig(adapter="dora"), "dora cannot adapt blocks.0.att.output, which has rows of zeros"),
        (AdapterConfig(adapter="lora", rank=65), "rank is 65, but blocks.0.att.receptance is a 64 x 64 matrix"),
        (
            AdapterConfig(adapter="lora", train_also=("att.key",)),
            "train_also names blocks.0.att.key, which the adapter",
        ),
        (AdapterConfig(adapter="lora", train_also=("lnn",)), "train_also: nothing is called 'lnn'; did you mean 'ln"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_model(model, config)
    coarse = RWKV(model.config, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"blocks.0.ln1.weight is torch.bfloat16: to train it, load the model in fp32"):
        prepare_model(coarse, AdapterConfig(adapter="lora", train_also=("ln1",)))
    assert same(snapshot(model), before) and all(p.requires_grad for p in model.parameters())
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]


def test_seed_decides_the_factors() -> None:
    one, again, other = (
        prepare_model(tiny_model(), AdapterConfig(adapter="lora"), seed=seed).tensors() for seed in (3, 3, 4)
    )
    assert same(one, again) and not same(one, other)
    A = one["blocks.0.ffn.value.lora_A"]  # U(-1/sqrt(in), 1/sqrt(in))
    assert A.shape == (16, 224) and 0.95 < A.abs().max() * 224**0.5 <= 1
