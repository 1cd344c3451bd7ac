"""Blocks compiled and recomputed from outside the model, for the length of a run.

Owns: torch.compile and activation recomputation (non-reentrant, so that it also works where no input needs a gradient:
frozen embeddings, a tuned state), block by block.
Refuses to know: what is inside a block.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from roost.models.rwkv import RWKV
from roost.training.config import TrainConfig


@contextmanager
def prepared(model: RWKV, config: TrainConfig) -> Generator[None, None, None]:
    """Inside the block every layer runs as `config.compile` and `config.recompute` say; afterwards as before."""
    changed = model.layers if config.compile or config.recompute else []
    for layer in changed:
        forward: Callable[..., Any] = layer.forward
        if config.compile:
            forward = torch.compile(forward)
        if config.recompute:
            forward = partial(_recomputed, forward)
        layer.forward = forward  # an attribute of the module, before the method of its class
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward


def _recomputed(forward: Callable[..., Any], *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False)
