"""What a fine-tuning run is told beside TrainConfig: which part of a model is trained, and how.

Owns: the names of a recipe's keys for this, their defaults, their checks, and the learning rates to begin with.
Refuses to know: models' parameters and how an adapter works.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, cast, get_args

from roost.checks import choice, instance, whole
from roost.config import ModelConfig
from roost.training.lora import Axis, Form, LowRankKind

Kind = Literal["full", "lora", "dora", "pissa", "state"]
LOW_RANK = get_args(LowRankKind)
EVERY_MATRIX = ("blocks.*.att", "blocks.*.ffn")
"""The targets without `targets`: every matrix of time and channel mixing, in Eagle as in Finch."""


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained. The names are keys of a recipe; what belongs to another kind is refused.

    adapter     "full": every parameter but frozen ones; "lora", "dora", "pissa": low-rank factors of matrices;
                "state": the initial state of every layer (Eagle and Finch)
    rank, alpha low rank: r (0 = 16); the product is scaled by alpha / r (0 = 2 r; PiSSA has no scale)
    rslora      lora, dora: scale alpha / sqrt(r) instead
    dropout     low rank: of the input of the factors, while training
    dora_axis   dora: norms per "out"put (as the paper's code and PEFT) or per "in"put (as RWKV's trainers)
    targets     low rank: matrices, by patterns (selection.py); () = all of time and channel mixing. Also "head"
    train_also  all but full: parameters trained whole besides, such as "ln1" or "time_*"
    freeze      full: parameters that stay as they are

    Raises ValueError with the name and the value for anything out of range or of another kind.
    """

    adapter: Kind = "full"
    rank: int = 0
    alpha: float = 0.0
    rslora: bool = False
    dropout: float = 0.0
    dora_axis: Axis = "out"
    targets: tuple[str, ...] = ()
    train_also: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        choice("adapter", self.adapter, get_args(Kind))
        choice("dora_axis", self.dora_axis, get_args(Axis))
        instance("rslora", self.rslora, bool)
        object.__setattr__(self, "rank", whole("rank", self.rank, 0))
        for name in ("targets", "train_also", "freeze"):
            patterns: Any = getattr(self, name)
            if not isinstance(patterns, (list, tuple)) or not all(isinstance(one, str) and one for one in patterns):  # pyright: ignore[reportUnknownVariableType]
                raise ValueError(f"{name} is {patterns!r}; it must be a list of names or globs, such as ['att.key']")
            object.__setattr__(self, name, tuple(cast("list[str]", patterns)))
        for name, most in (("alpha", float("inf")), ("dropout", 1.0)):
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < most:
                raise ValueError(f"{name} is {value!r}; it must be a number from 0 to below {most:g}")
            object.__setattr__(self, name, float(value))
        low = self.adapter in LOW_RANK
        belongs = {
            **dict.fromkeys(("rank", "dropout", "targets"), low),
            **dict.fromkeys(("alpha", "rslora"), self.adapter in ("lora", "dora")),
            "dora_axis": self.adapter == "dora",
            "train_also": self.adapter != "full",
            "freeze": self.adapter == "full",
        }
        for one in fields(self):
            if not belongs.get(one.name, True) and getattr(self, one.name) != one.default:
                raise ValueError(
                    f"{one.name} = {getattr(self, one.name)!r} means nothing with adapter {self.adapter!r}"
                )
        if low:
            object.__setattr__(self, "rank", self.rank or 16)
        if self.adapter in ("lora", "dora"):
            object.__setattr__(self, "alpha", self.alpha or 2.0 * self.rank)

    @property
    def form(self) -> Form:
        """What the low-rank modules compute."""
        scale = 1.0 if self.adapter == "pissa" else self.alpha / (self.rank**0.5 if self.rslora else self.rank)
        return Form(cast("LowRankKind", self.adapter), self.rank, scale, self.dropout, self.dora_axis)

    @property
    def identity(self) -> dict[str, int | float | str]:
        """The same as plain values, for the settings that a resumed run must share."""
        return {name: " ".join(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def default_rates(kind: Kind, config: ModelConfig, *, preferences: bool = False) -> dict[str, float | int]:
    """lr, lr_final, warmup and for a state weight_decay, to begin with, as keys of a recipe.

    state: 1 -> 0.01 (RWKV-LM), without the decay that would pull it to zero. full: RWKV-LM's published rates by size,
    held. lora, dora: 2e-4 (the LoRA paper's for GPT-2), pissa: 2e-5 (its paper's), both down to a tenth.
    preferences  a tenth of these, our choice: for whole models of 3 billion it is the 1e-6 of the DPO paper
    """
    less = 10 if preferences else 1
    if kind == "state":
        return {"lr": 1.0 / less, "lr_final": 0.01 / less, "warmup": 10, "weight_decay": 0.0}
    if kind == "full":
        sizes = ((2.5e8, 3e-5), (9e8, 2e-5), (2.3e9, 1.5e-5))
        rate = next((rate for size, rate in sizes if config.parameters < size), 1e-5) / less
        return {"lr": rate, "lr_final": rate, "warmup": 10}
    rate = (2e-5 if kind == "pissa" else 2e-4) / less
    return {"lr": rate, "lr_final": rate / 10, "warmup": 10}
