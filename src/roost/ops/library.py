"""The chunked backend as a torch.library operator: opaque to torch.compile, but with shapes and gradients.

Owns: registration only. Refuses to know: the algorithm (chunked.py) and the contract (the package's __init__).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from roost.ops import chunked


@torch.library.custom_op("roost::wkv_chunked", mutates_args=())
def wkv_chunked(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor, offsets: list[int] | None
) -> tuple[Tensor, Tensor]:
    """See `roost.wkv`; `state` is given and `offsets` are checked."""
    return chunked.forward(r, k, v, log_w, u, state, offsets)


@torch.library.custom_op("roost::wkv_chunked_backward", mutates_args=())
def wkv_chunked_backward(
    d_out: Tensor, d_state: Tensor, r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor,
    offsets: list[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of r, k, v, log_w, u, state."""
    return chunked.backward(d_out, d_state, r, k, v, log_w, u, state, offsets)


@wkv_chunked.register_fake
def _(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor, offsets: list[int] | None
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape)


@wkv_chunked_backward.register_fake
def _(
    d_out: Tensor, d_state: Tensor, r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor,
    offsets: list[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dr, dk, dv, dw, du, ds = (x.new_empty(x.shape) for x in (r, k, v, log_w, u, state))
    return dr, dk, dv, dw, du, ds


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, offsets = inputs
    ctx.save_for_backward(*tensors)
    ctx.offsets = offsets


def _gradients(ctx: Any, d_out: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
    tensors: tuple[Tensor, ...] = ctx.saved_tensors
    return *wkv_chunked_backward(d_out, d_state, *tensors, ctx.offsets), None


wkv_chunked.register_autograd(_gradients, setup_context=_save)
