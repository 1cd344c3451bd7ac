"""What the tests of adapters share: kinds, a snapshot, and noise in the place of training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from roost import RWKV
from roost.training.adapter_config import AdapterConfig
from roost.training.adapters import Adapted

GENERATIONS = ("eagle-tiny", "finch-tiny")
KINDS = {
    "lora": AdapterConfig(adapter="lora", rank=4, alpha=6),
    "rslora": AdapterConfig(adapter="lora", rank=4, alpha=6, rslora=True, targets=("att.key", "ffn", "head")),
    "dora": AdapterConfig(adapter="dora", rank=4, alpha=6),
    "dora-in": AdapterConfig(adapter="dora", rank=4, dora_axis="in", train_also=("ln1", "time_faaaa")),
    "pissa": AdapterConfig(adapter="pissa", rank=4),
}
TOKENS = torch.tensor([[72, 101, 108, 108, 111, 33, 10, 200, 3, 7], [1, 2, 3, 5, 8, 13, 21, 34, 55, 89]])

every_generation = pytest.mark.parametrize("generation", GENERATIONS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal names in equal order, values and dtypes."""
    pairs = zip(one.values(), other.values(), strict=True)
    return list(one) == list(other) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def snapshot(model: RWKV) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def shake(adapted: Adapted, spread: float = 0.1, seed: int = 1) -> None:
    """As if trained: noise on everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=spread)


def logits(model: RWKV) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)[0]
