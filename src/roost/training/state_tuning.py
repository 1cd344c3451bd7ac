"""The tuned initial state: one matrix per head in every layer, in the place of zeros, before the first token.

    S_0 = transpose(time_state)      blocks.{l}.att.time_state (H, value, key), as official files have it

Owns: giving a model this parameter, and taking it away again.
Refuses to know: how the state is used (the model: one copy for every row, so gradients add up over rows) and trained.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from roost.models.rwkv import RWKV

SUFFIX = "att.time_state"


def add_time_state(model: RWKV) -> None:
    """Give every layer a `time_state` of zeros, fp32 (fp64 for fp64), which changes no logit; one that is there stays.

    Raises ValueError for Dove, whose state has no heads.
    """
    c = model.config
    if c.generation == "dove":
        raise ValueError("a tuned state needs eagle or finch: dove's state has no heads and no official layout")
    if c.time_state:
        return
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    for block in model.layers:
        zeros = torch.zeros(c.n_head, c.head_size, c.head_size, device=model.device, dtype=dtype)
        block.att.register_parameter("time_state", nn.Parameter(zeros))
    _announce(model, present=True)


def remove_time_state(model: RWKV) -> None:
    """Begin from zeros again."""
    for block in model.layers:
        del block.att.time_state
    _announce(model, present=False)


def _announce(model: RWKV, *, present: bool) -> None:
    model.config = replace(model.config, time_state=present)
    for block in model.layers:
        block.att.config = block.ffn.config = model.config
