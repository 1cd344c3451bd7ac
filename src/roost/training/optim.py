"""RWKV's AdamW: which parameters decay, which learn twice as fast, and the learning rate of every step.

Owns: RWKV-LM's parameter groups and the paper's schedule (appendix H).
Refuses to know: losses and data.
"""

from __future__ import annotations

from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn

from roost.training.config import TrainConfig


def group_of(name: str, parameter: Tensor, weight_decay: float) -> tuple[float, float]:
    """(learning-rate multiplier, weight decay) of one parameter by its official name; the first rule that fits wins."""
    if "_w1" in name or "_w2" in name:
        return 1.0, 0.0
    if "time_sta" in name:
        return 1.0, weight_decay
    if "time_mix" in name or "time_maa" in name or "time_faaaa" in name:
        return 1.0, 0.0
    if "time_decay" in name:
        return 2.0, 0.0
    if "time_first" in name:
        return 3.0, 0.0
    if parameter.squeeze().dim() >= 2 and ".weight" in name:
        return 1.0, weight_decay
    return 1.0, 0.0


def optimiser(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the model's trainable parameters in RWKV's groups; each group knows its multiplier as "scale"."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(group_of(name, parameter, config.weight_decay), []).append(parameter)
    options: list[dict[str, Any]] = [
        {"params": parameters, "scale": scale, "weight_decay": decay} for (scale, decay), parameters in groups.items()
    ]
    return torch.optim.AdamW(options, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Cosine from lr to lr_final over all steps, times the paper's warm-up 0.2 + 0.8 step / warmup. `step` from 0."""
    progress = min(max((step - config.warmup) / max(config.steps - config.warmup, 1), 0.0), 1.0)
    floor = config.lr_final / config.lr
    rate = config.lr * ((0.5 + floor / 2) + (0.5 - floor / 2) * cos(pi * progress))
    return rate * (0.2 + 0.8 * step / config.warmup) if step < config.warmup else rate
