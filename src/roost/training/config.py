"""What a training run is told: one frozen, flat set of numbers.

Owns: the names of a recipe's keys, their defaults and their checks.
Refuses to know: how a step is made.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import inf, isfinite, isnan, nan
from numbers import Real
from typing import Literal, cast, get_args

from roost.checks import choice, instance, whole
from roost.models.parts import Init

Precision = Literal["fp32", "bf16", "fp16"]
"""Of the products in a step."""

Schedule = Literal["cosine", "wsd", "wsd-linear", "constant"]
"""Of the learning rate after the warm-up."""

FREE = frozenset(
    (
        *("out", "save_every", "save_minutes", "keep", "pth"),
        *("validate_every", "log_every", "tensorboard", "wandb", "peak_flops"),
        *("accumulate", "recompute", "compile", "max_bad_steps"),
    )
)
"""Fields that a resume may change: they decide neither the data nor what a step computes, beyond rounding."""


@dataclass(frozen=True)
class TrainConfig:
    """One run. Defaults are the paper's (appendix H) unless said. One of steps, tokens and epochs says when it ends.

    steps, tokens, epochs   optimiser steps; tokens read (to the end of the step that reaches them); passes of the data
    lr, lr_final     learning rate at the top and at the end (of the cosine by tokens, or of wsd's cooldown); without
                     lr_final (nan) a tenth of lr
    schedule         "cosine", "wsd" (constant, then 1 - sqrt), "wsd-linear" (constant, then a line), "constant"
    cooldown         wsd: the share of the run in which the rate falls
    warmup, warmup_from   steps of linear warm-up, once in a run, from this share of the rate (the paper: a fifth)
    weight_decay     on matrices and the embedding only; 0.001 in the paper
    beta1, beta2, eps  of AdamW
    clip             largest global gradient norm
    l2wrap           weight of L2Wrap, the pull on the largest logit of every position; 0 turns it off
    accumulate       parts a batch is computed in, one after the other; the step is the same to rounding
    recompute        activations inside a block are made again in the backward pass: less memory, a third more time
    compile          torch.compile, block by block
    precision        "fp32"; "bf16" products with fp32 weights, decays, states and norms; "fp16", with scaled losses
    seed, init       of the data order, dropout and fresh weights (of the last two: whoever makes them)
    out              directory of the log, the checkpoints and the final model
    save_every, save_minutes, keep   steps and minutes between checkpoints (0 minutes: by steps only), how many stay
    pth              also write final.pth
    max_bad_steps    steps with a loss or gradient that is not finite that a run may skip
    validate_every   steps between validations; 0 = only at the end
    log_every        steps between log lines
    tensorboard      also write the log for TensorBoard, into `out`
    wandb            also send the log to this project of Weights & Biases; "" = do not
    peak_flops       FLOP/s that count as all of the device; 0 = measured by a matrix product when the run begins

    Raises ValueError with the name and the value for anything out of range or of another type; lr_final above lr is.
    """

    steps: int = 0
    tokens: int = 0
    epochs: float = 0.0
    lr: float = 6e-4
    lr_final: float = nan
    schedule: Schedule = "cosine"
    cooldown: float = 0.2
    warmup: int = 10
    warmup_from: float = 0.2
    weight_decay: float = 0.001
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    clip: float = 1.0
    l2wrap: float = 1e-4
    accumulate: int = 1
    recompute: bool = False
    compile: bool = False
    precision: Precision = "fp32"
    seed: int = 0
    out: str = "runs/run"
    save_every: int = 500
    save_minutes: float = 0.0
    keep: int = 2
    pth: bool = False
    max_bad_steps: int = 10
    validate_every: int = 500
    log_every: int = 10
    tensorboard: bool = False
    wandb: str = ""
    peak_flops: float = 0.0
    init: Init = "current"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                least = 1 if field.name in ("accumulate", "save_every", "keep", "log_every") else 0
                object.__setattr__(self, field.name, whole(field.name, value, least))
            elif field.type == "float":
                if field.name == "lr_final" and isinstance(value, float) and isnan(value):
                    value = self.lr / 10  # lr comes before it and is checked
                try:
                    number = float(cast("float", value)) if isinstance(value, Real) else inf
                except OverflowError:
                    number = inf
                if not isfinite(number):
                    raise ValueError(f"{field.name} is {value!r}; it must be a finite number")
                if number < 0:
                    raise ValueError(f"{field.name} is {number}; it must not be negative")
                object.__setattr__(self, field.name, number)
            elif field.type in ("str", "bool"):
                instance(field.name, value, str if field.type == "str" else bool)
        ends = [name for name in ("steps", "tokens", "epochs") if getattr(self, name)]
        if len(ends) != 1:
            given = " and ".join(f"{name} = {getattr(self, name)}" for name in ends) or "none of them is given"
            raise ValueError(f"a run ends after 'steps', 'tokens' or 'epochs', one of them above 0: {given}")
        for name in ("lr", "eps", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.lr_final > self.lr:
            raise ValueError(f"lr_final is {self.lr_final:g}, above lr = {self.lr:g}: the rate would rise")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in 0..1")
        for name in ("cooldown", "warmup_from"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in 0..1")
        choice("init", self.init, get_args(Init))
        choice("precision", self.precision, get_args(Precision))
        choice("schedule", self.schedule, get_args(Schedule))
