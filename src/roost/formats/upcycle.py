"""Eagle as Finch: a v6 network that computes exactly what a v5.2 network does, to run or to train further.

Finch with w1 = 0 has no data-dependent part, its maa is 1 - mix, and its decay is the same number in another shape.
1 - mix does not fit 16 bits (measured: 2e-2 of the logits), so maa is fp32 whatever the rest is.

Owns: this map and the values of what the map leaves free (RWKV-LM's initial values).
Refuses to know: files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from roost.config import ModelConfig
from roost.models.parts import depth, ramp


def upcycle(config: ModelConfig, weights: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Official v5.2 weights -> official v6 weights with the same logits (fp32: to 1e-6 of their scale).

    Ranks are 32 and 64, or 64 and 128 from D = 4096 on. time_maa_x and time_maa_w are 1 - (i/D)^rho_1 and the second
    low-rank matrices are drawn from U(-0.01, 0.01): they have no effect until the first ones, which are 0, are trained.
    Raises ValueError for RWKV-4, for RWKV-5.0 (no gate of a v6 network equals none), and for what is v6 already.
    """
    if config.generation != "eagle" or not config.gate:
        name = {"dove": "RWKV-4", "eagle": "RWKV-5.0 (it has no gate)", "finch": "RWKV-6 already"}[config.generation]
        raise ValueError(f"only RWKV-5.1 and 5.2 can become RWKV-6; this is {name}")
    finch = replace(config, generation="finch", shift_rank=0, decay_rank=0)
    generator = torch.Generator().manual_seed(0)
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        if ".time_mix_" in name:
            out[name.replace("time_mix", "time_maa")] = 1 - value.float()
        elif name.endswith(".time_decay"):
            out[name] = value.reshape(1, 1, -1)
            out |= _dynamic(finch, name.removesuffix("time_decay"), value.dtype, generator)
        else:
            out[name] = value
    return finch, out


def _dynamic(config: ModelConfig, att: str, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    D, A, Rm, Rd = config.n_embd, config.dim_att, config.shift_rank, config.decay_rank
    _, rho1 = depth(int(att.split(".")[1]), config.n_layer)

    def small(*shape: int) -> Tensor:
        return torch.zeros(shape).uniform_(-0.01, 0.01, generator=generator).to(dtype)

    maa = (1 - ramp(D) ** rho1).reshape(1, 1, D)
    return {
        f"{att}time_maa_x": maa,
        f"{att}time_maa_w": maa.clone(),
        f"{att}time_maa_w1": torch.zeros(D, 5 * Rm, dtype=dtype),
        f"{att}time_maa_w2": small(5, Rm, D),
        f"{att}time_decay_w1": torch.zeros(D, Rd, dtype=dtype),
        f"{att}time_decay_w2": small(Rd, A),
    }
