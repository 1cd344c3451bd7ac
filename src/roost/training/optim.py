"""RWKV's AdamW: which parameters decay, which learn twice as fast, and the learning rate of every step.

    cosine      lr (1/2 + f/2 + (1/2 - f/2) cos(pi q)),   f = lr_final / lr,   q the share of the tokens after warm-up
    wsd         lr, then lr + (lr_final - lr) sqrt(p) over the last `cooldown` of the run (wsd-linear: p), p = 0..1
    warm-up     times a + (1 - a) step / warmup,   a = warmup_from

Owns: RWKV-LM's parameter groups and these schedules (the paper's is cosine by tokens, appendix H).
Refuses to know: losses and data.
"""

from __future__ import annotations

from math import cos, pi, sqrt
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
    """AdamW over the model's trainable parameters in RWKV's groups; each group knows its multiplier as "scale".

    Raises ValueError when nothing is trainable.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(group_of(name, parameter, config.weight_decay), []).append(parameter)
    if not groups:
        raise ValueError("the model has no parameter that requires a gradient: there is nothing to train")
    options: list[dict[str, Any]] = [
        {"params": parameters, "scale": scale, "weight_decay": decay} for (scale, decay), parameters in groups.items()
    ]
    return torch.optim.AdamW(options, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(step: int, config: TrainConfig, length: float = 0.0) -> float:
    """The rate of one step, counted from 0; `length` of the run in steps, by default config.steps.

    Every step has the same tokens, so a share of the steps is a share of the tokens; `length` need not be whole.
    """
    length = length or config.steps
    rate = config.lr
    if config.schedule == "cosine":
        progress = min(max((step - config.warmup) / max(length - config.warmup, 1), 0.0), 1.0)
        floor = config.lr_final / config.lr
        rate = config.lr * ((0.5 + floor / 2) + (0.5 - floor / 2) * cos(pi * progress))
    elif config.schedule != "constant":
        falling = config.cooldown * length
        progress = min(max((step - (length - falling)) / max(falling, 1), 0.0), 1.0)
        rate += (config.lr_final - config.lr) * (sqrt(progress) if config.schedule == "wsd" else progress)
    share = config.warmup_from + (1 - config.warmup_from) * step / config.warmup if step < config.warmup else 1.0
    return rate * share
