"""A model of seconds: the tiny preset of a generation with weights that matter, over single bytes."""

from __future__ import annotations

import torch

from roost.config import PRESETS
from roost.models.rwkv import RWKV, fingerprint_of


def tiny_model(name: str = "finch-tiny", seed: int = 0) -> RWKV:
    """Fresh weights leave output matrices at zero; these are shaken so that every part has an effect."""
    model = RWKV(PRESETS[name], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.5 / parameter.shape[-1] ** 0.5
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=spread)
        model.head.weight.mul_(3)
    model.fingerprint = fingerprint_of(model.config, model.state_dict())
    return model
