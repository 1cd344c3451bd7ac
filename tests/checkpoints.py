"""Random checkpoints that look trained: official names, raw shapes, the trainer's key order, fp32.

Owns: one table of names and shapes for RWKV-4, 5.0, 5.1, 5.2 and 6 (the checkpoint format, not a model).
Refuses to know: roost. Sizes are free so that tests can use A != D, F = 4D, unusual ranks and head sizes.

Values are chosen so that every tensor matters and a wrong formula shows: decays from almost 0 to almost 1, non-zero
low-rank paths, norm weights around 1 with non-zero biases, head loudness over two decades (the quiet heads are those
where the group norm's eps counts), mixing vectors over [0, 1] and a little outside, asymmetric `time_state`.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch

Version = Literal["4", "5.0", "5.1", "5.2", "6"]
BonusName = Literal["time_first", "time_faaaa"]

VERSIONS: tuple[Version, ...] = ("4", "5.0", "5.1", "5.2", "6")

READABLE: dict[str, tuple[Version, BonusName | None, bool]] = {
    "4": ("4", None, False),
    "5.0": ("5.0", "time_first", False),
    "5.0-raw": ("5.0", "time_faaaa", False),
    "5.1": ("5.1", "time_faaaa", False),
    "5.1-exp": ("5.1", "time_first", False),
    "5.2": ("5.2", None, False),
    "6": ("6", None, False),
    "6-state": ("6", None, True),
}
"""Everything the `rwkv` package reads: the version, the name of its bonus, and whether a state was tuned."""


def make_checkpoint(
    version: Version,
    *,
    n_layer: int = 2,
    n_embd: int = 128,
    head_size: int = 64,
    vocab: int = 300,
    seed: int = 0,
    bonus_name: BonusName | None = None,
    dim_att: int | None = None,
    dim_ffn: int | None = None,
    shift_rank: int = 32,
    decay_rank: int = 64,
    time_state: bool = False,
) -> dict[str, torch.Tensor]:
    """A state dict as the trainer would write it, fp32, the same for the same arguments.

    `bonus_name` is only free for 5.0 (default time_first, meaning exp) and 5.1 (default time_faaaa, meaning raw).
    `dim_att` defaults to `n_embd`, `dim_ffn` to 4D (4, 5.0) or 3.5D. `time_state` (5.x and 6) adds `att.time_state`,
    [h, value, key]. The `rwkv` package needs n_layer >= 2, dim_att = n_embd and at least two heads.
    """
    maker = _Maker(torch.Generator().manual_seed(seed))
    att_width = dim_att or n_embd
    ffn_width = dim_ffn or (4 * n_embd if version in ("4", "5.0") else 7 * n_embd // 64 * 32)
    out: dict[str, torch.Tensor] = {"emb.weight": maker.normal(vocab, n_embd, std=0.3)}
    for layer in range(n_layer):
        block: dict[str, torch.Tensor] = {}
        for norm in ("ln1", "ln2", "ln0") if layer == 0 else ("ln1", "ln2"):
            block |= maker.norm(norm, n_embd)
        att = maker.mixing(version, n_embd, shift_rank)
        att |= maker.decay_and_bonus(version, bonus_name, n_embd, att_width, head_size, decay_rank)
        if time_state:
            n_head = att_width // head_size
            att["time_state"] = maker.normal(n_head, head_size, head_size) * _loudness(n_head)[:, None, None]
        att |= maker.projections(version, n_embd, att_width, head_size)
        block |= {f"att.{name}": value for name, value in att.items()}
        block |= {f"ffn.{name}": value for name, value in maker.channel_mix(version, n_embd, ffn_width).items()}
        out |= {f"blocks.{layer}.{name}": value for name, value in block.items()}
    out |= maker.norm("ln_out", n_embd)
    out["head.weight"] = maker.linear(n_embd, vocab)
    return out


def small_arrays(
    version: Version,
    bonus_name: BonusName | None = None,
    *,
    time_state: bool = False,
    dim_att: int | None = None,
    dim_ffn: int | None = None,
) -> dict[str, np.ndarray]:
    """A two-layer checkpoint for the oracle: D 64, four heads of 16, every rank another number; fp32 arrays."""
    made = make_checkpoint(
        version,
        n_embd=64,
        head_size=16,
        shift_rank=8,
        decay_rank=12,
        bonus_name=bonus_name,
        time_state=time_state,
        dim_att=dim_att,
        dim_ffn=dim_ffn,
    )
    return {name: value.numpy() for name, value in made.items()}


def _loudness(heads: int) -> torch.Tensor:
    """(h,) scale of each head's values."""
    return torch.logspace(-2, 0, heads)


class _Maker:
    """Draws the parts of a checkpoint from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def normal(self, *shape: int, std: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return mean + std * torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.generator)

    def linear(self, n_in: int, n_out: int, gain: float = 1.0) -> torch.Tensor:
        """[out, in]; a unit-variance input gives outputs of standard deviation `gain`."""
        return self.normal(n_out, n_in, std=gain / math.sqrt(n_in))

    def norm(self, name: str, width: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": self.normal(width, mean=1.0, std=0.2), f"{name}.bias": self.normal(width, std=0.1)}

    def mixing(self, version: Version, D: int, rank: int) -> dict[str, torch.Tensor]:
        if version != "6":
            letters = "kvrg" if version in ("5.1", "5.2") else "kvr"
            return {f"time_mix_{x}": self.uniform(1, 1, D, low=-0.1, high=1.2) for x in letters}
        out = {f"time_maa_{x}": self.uniform(1, 1, D, low=-0.3, high=1.0) for x in "xwkvrg"}
        out["time_maa_w1"] = self.normal(D, 5 * rank, std=0.7 / math.sqrt(D))
        out["time_maa_w2"] = self.normal(5, rank, D, std=0.5 / math.sqrt(rank))
        return out

    def decay_and_bonus(
        self, version: Version, bonus_name: BonusName | None, D: int, A: int, N: int, rank: int
    ) -> dict[str, torch.Tensor]:
        h = A // N
        if version == "4":
            return {"time_decay": self.uniform(A, low=-6.0, high=2.0), "time_first": self.normal(A, mean=-1.2, std=0.7)}
        if version in ("5.0", "5.1"):
            name = bonus_name or ("time_first" if version == "5.0" else "time_faaaa")
            spread = torch.linspace(-6.0, 0.5, h) + self.normal(h, std=0.3)
            return {"time_decay": spread, name: self.normal(h, mean=-0.5, std=0.7)}
        if version == "5.2":
            return {"time_decay": self.uniform(h, N, low=-8.0, high=2.0), "time_faaaa": self.normal(h, N, std=0.7)}
        return {
            "time_decay": self.uniform(1, 1, A, low=-8.0, high=2.0),
            "time_decay_w1": self.normal(D, rank, std=1 / math.sqrt(D)),
            "time_decay_w2": self.normal(rank, A, std=1 / math.sqrt(rank)),
            "time_faaaa": self.normal(h, N, std=0.7),
        }

    def projections(self, version: Version, D: int, A: int, N: int) -> dict[str, torch.Tensor]:
        out = {f"{name}.weight": self.linear(D, A) for name in ("receptance", "key", "value")}
        out["output.weight"] = self.linear(A, D, gain=0.7)
        if version == "4":
            return out
        out["value.weight"] *= _loudness(A // N).repeat_interleave(N)[:, None]
        if version != "5.0":
            out["gate.weight"] = self.linear(D, A, gain=1.5)
        return out | self.norm("ln_x", A)

    def channel_mix(self, version: Version, D: int, F: int) -> dict[str, torch.Tensor]:
        name, low, high = ("time_maa", -0.3, 1.0) if version == "6" else ("time_mix", -0.1, 1.2)
        return {
            f"{name}_k": self.uniform(1, 1, D, low=low, high=high),
            f"{name}_r": self.uniform(1, 1, D, low=low, high=high),
            "key.weight": self.linear(D, F),
            "receptance.weight": self.linear(D, D),
            "value.weight": self.linear(F, D, gain=0.5),
        }
