"""What a training run is told: one frozen, flat set of numbers.

Owns: the names of a recipe's keys, their defaults and their checks.
Refuses to know: how a step is made.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import inf, isfinite
from numbers import Real
from typing import Literal, cast, get_args

from roost.checks import choice, instance, whole
from roost.models.parts import Init

Precision = Literal["fp32", "bf16"]
"""Of the products in a step."""


@dataclass(frozen=True)
class TrainConfig:
    """One run. Defaults are the paper's (appendix H) unless said.

    steps            optimiser steps in all
    lr, lr_final     learning rate at the top and at the end of the cosine (by step; every step has the same tokens)
    warmup           steps of linear warm-up from lr / 5, as in the paper
    weight_decay     on matrices and the embedding only; 0.001 in the paper
    beta1, beta2, eps  of AdamW
    clip             largest global gradient norm
    l2wrap           weight of L2Wrap, the pull on the largest logit of every position; 0 turns it off
    precision        "fp32", or "bf16" products with fp32 weights, decays, states and norms
    seed, init       of the data order and of fresh weights, for whoever makes them (recipes); `train` draws nothing
    out              directory of the log, the checkpoints and the final model
    save_every, keep   steps between checkpoints, and how many complete ones stay
    validate_every   steps between validations; 0 = only at the end
    log_every        steps between log lines

    Raises ValueError with the name and the value for anything out of range or of another type.
    """

    steps: int
    lr: float = 6e-4
    lr_final: float = 6e-5
    warmup: int = 10
    weight_decay: float = 0.001
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    clip: float = 1.0
    l2wrap: float = 1e-4
    precision: Precision = "fp32"
    seed: int = 0
    out: str = "runs/run"
    save_every: int = 500
    keep: int = 2
    validate_every: int = 500
    log_every: int = 10
    init: Init = "current"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                least = 1 if field.name in ("steps", "save_every", "keep", "log_every") else None
                object.__setattr__(self, field.name, whole(field.name, value, least))
            elif field.type == "float":
                try:
                    number = float(cast("float", value)) if isinstance(value, Real) else inf
                except OverflowError:
                    number = inf
                if not isfinite(number):
                    raise ValueError(f"{field.name} is {value!r}; it must be a finite number")
                object.__setattr__(self, field.name, number)
        instance("out", self.out, str)
        for name in ("warmup", "weight_decay", "l2wrap", "validate_every", "lr_final", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("lr", "eps", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in 0..1")
        choice("init", self.init, get_args(Init))
        choice("precision", self.precision, get_args(Precision))
