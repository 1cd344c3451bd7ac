"""Another number of tokens: a larger embedding and head around the same network.

    rows of old ids are copied; rows of new ids are made by `init`

Owns: that every old row, and so every logit of an old id, stays what it was.
Refuses to know: tokenizers, and what the new ids mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from roost.checks import choice, whole
from roost.models.parts import precise
from roost.models.rwkv import RWKV, fingerprint_of
from roost.training.lora import LowRank

Rows = Callable[[str, Float[Tensor, "old D"], int], Float[Tensor, "new D"]]
"""(name, rows of old ids, n) -> n rows for new ids; the name is "emb.weight" or "head.weight"."""


def resize_vocabulary(
    model: RWKV, size: int, init: Literal["mean", "zero"] | Rows = "mean", *, shrink: bool = False
) -> RWKV:
    """A new model with `size` ids in the embedding and the head, sharing no memory with `model`.

    init    rows of new ids: the mean of the old rows (in the embedding and in the head), zeros (their logits are then
            exactly 0), or a function
    shrink  allow a smaller vocabulary: ids from `size` on are dropped

    The head's input and every old row are unchanged bit for bit. An old logit is the same product of the same numbers;
    libraries that pick another kernel for a wider matrix may round its last bit otherwise. Raises ValueError for a
    smaller size without `shrink`, for rows of another shape or not finite, and for a model with an adapter.
    """
    size = whole("size", size, 1)
    old = model.config.vocab_size
    if any(isinstance(module, LowRank) for module in model.modules()):
        raise ValueError("the model has an adapter: merge or remove it before its vocabulary is resized")
    if size < old and not shrink:
        raise ValueError(f"size is {size}, and the model knows {old} ids: shrink=True drops those from {size} on")
    if isinstance(init, str):
        choice("init", init, ("mean", "zero"))
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name in ("emb.weight", "head.weight"):
        rows = weights[name]
        weights[name] = rows[:size].clone() if size <= old else torch.cat([rows, _rows(name, rows, size - old, init)])
    resized = RWKV(replace(model.config, vocab_size=size), device="meta")
    resized.load_state_dict(weights, assign=True)
    resized.train(model.training)
    resized.fingerprint = fingerprint_of(resized.config, weights)
    return resized


def _rows(name: str, old: Tensor, count: int, init: str | Rows) -> Tensor:
    if init == "mean":
        made = precise(old).mean(0).expand(count, -1)
    elif init == "zero":
        made = old.new_zeros(count, old.shape[1])
    else:
        assert callable(init)
        made = init(name, old, count)
    if made.shape != (count, old.shape[1]) or not bool(torch.isfinite(made).all()):
        raise ValueError(
            f"init gave {tuple(made.shape)} for {name}; it must give {(count, old.shape[1])} finite numbers"
        )
    return made.to(old.device, old.dtype)
