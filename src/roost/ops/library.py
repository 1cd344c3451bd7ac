"""The chunked and native backends as torch.library operators: opaque to torch.compile, but with shapes and gradients.

Owns: registration only. Refuses to know: the algorithms (chunked.py, native.py) and the contract (the package's
__init__).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from roost.ops import chunked, native


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


@torch.library.custom_op("roost::wkv_native", mutates_args=())
def wkv_native(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor, offsets: list[int] | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `roost.wkv`; also returns what the backward pass needs when `keep` says that there will be one."""
    return native.forward(r, k, v, log_w, u, state, offsets, keep)


@torch.library.custom_op("roost::wkv_native_backward", mutates_args=())
def wkv_native_backward(
    d_out: Tensor, d_state: Tensor, saved: Tensor, r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor,
    state: Tensor, offsets: list[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of r, k, v, log_w, u, state."""
    return native.backward(d_out, d_state, saved, r, k, v, log_w, u, state, offsets)


@wkv_native.register_fake
def _(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor, offsets: list[int] | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    saved = native.saved_shape(r, state, offsets) if keep else (0,)
    return v.new_empty(v.shape), state.new_empty(state.shape), state.new_empty(saved)


@wkv_native_backward.register_fake
def _(
    d_out: Tensor, d_state: Tensor, saved: Tensor, r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor,
    state: Tensor, offsets: list[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dr, dk, dv, dw, du, ds = (x.new_empty(x.shape) for x in (r, k, v, log_w, u, state))
    return dr, dk, dv, dw, du, ds


def _save_native(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, offsets, _ = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.offsets = offsets
    ctx.set_materialize_grads(False)  # no zeros of the size of the kept states
    ctx.mark_non_differentiable(output[2])


def _gradients_native(
    ctx: Any, d_out: Tensor | None, d_state: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved, *tensors = ctx.saved_tensors
    d_out = torch.zeros_like(tensors[2]) if d_out is None else d_out
    d_state = torch.zeros_like(tensors[5]) if d_state is None else d_state
    return *wkv_native_backward(d_out, d_state, saved, *tensors, ctx.offsets), None, None


wkv_native.register_autograd(_gradients_native, setup_context=_save_native)
