"""WKV in the native library (src/native/wkv*): CPU tensors, fp32 or bf16, heads of 32, 64 or 128 channels.

Four tokens share one sweep over the state, their decays meet in the dyadic tree of chunked.py, and one thread computes
one head of one row, or some of its value columns (forward, with fewer heads than threads; the columns are independent):
neither the number of threads nor the other rows can change a bit of a result. The forward pass keeps the state before
every 64 tokens (except the first) for the backward pass.

Owns: which calls it can serve and why it cannot serve others; memory and strides of the native calls.
Refuses to know: the equations (wkv_body.inl), registration (library.py), the choice of a backend (the package).
"""

from __future__ import annotations

import ctypes
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from roost import native

SIZES = (32, 64, 128)
"""Head sizes K = V that have kernels."""

BLOCK = 64
"""Tokens between two saved states."""


class _View(ctypes.Structure):
    """(B, T, H, N) with contiguous N: the data, and how many elements lie between rows, tokens and heads."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("row", "token", "head")))


class _Call(ctypes.Structure):
    """One call, field for field the struct of src/native/wkv.cpp. A forward call leaves the last fields empty."""

    _fields_ = (
        *((name, _View) for name in ("r", "k", "v", "log_w", "out")),
        *((name, ctypes.c_void_p) for name in ("u", "state", "saved", "offsets")),
        *((name, ctypes.c_int64) for name in ("rows", "tokens", "heads", "size")),
        *((name, ctypes.c_int32) for name in ("bf16", "threads")),
        ("after", ctypes.c_void_p),
        *((name, _View) for name in ("dr", "dk", "dv", "d_log_w")),
        *((name, ctypes.c_void_p) for name in ("du", "d_state")),
    )


@cache
def _function(name: str) -> Any:
    return native.function(name, [ctypes.c_void_p])


def why_not(r: Tensor, v: Tensor) -> str:
    """Why these inputs (of one device, checked by `roost.wkv`) cannot be served natively; "" when they can."""
    size = r.shape[-1]
    if r.device.type != "cpu":
        return f"the tensors are on {r.device}; it runs on CPUs"
    if r.dtype not in (torch.float32, torch.bfloat16):
        return f"r, k, v are {r.dtype}; it takes fp32 and bf16"
    if size not in SIZES or v.shape[-1] != size:
        return f"the heads are {size} x {v.shape[-1]}; it has kernels for K = V in {SIZES}"
    return _missing()


@torch.compiler.assume_constant_result
def _missing() -> str:
    return native.why_not()


def _readable(x: Tensor) -> Tensor:
    """`x` as it is when its last dimension is contiguous, otherwise a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _view(x: Tensor) -> tuple[int, int, int, int]:
    row, token, head, _ = x.stride()
    return x.data_ptr(), row, token, head


def _decay(log_w: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """log_w, and its view: a step of 0 between tokens stands for a static decay and for nothing else."""
    log_w = _readable(log_w)
    if log_w.dim() == 2:
        return log_w, (log_w.data_ptr(), 0, 0, log_w.stride(0))
    if log_w.stride(1) == 0 and log_w.shape[1] > 1:
        log_w = log_w.contiguous()
    data, row, token, head = _view(log_w)
    return log_w, (data, row, token or 1, head)


def _threads() -> int:
    return min(torch.get_num_threads(), native.MOST_THREADS)


def _bounds(offsets: list[int] | None) -> Any:
    return None if offsets is None else (ctypes.c_int64 * len(offsets))(*offsets)


def saved_shape(r: Tensor, state: Tensor, offsets: list[int] | None) -> tuple[int, int, int, int]:
    """(blocks, H, K, V): room for the states before every block of tokens but the first."""
    _, tokens, heads, size = r.shape
    if offsets is None:
        blocks = state.shape[0] * max(0, (tokens - 1) // BLOCK)
    else:
        blocks = sum(max(0, (b - a - 1) // BLOCK) for a, b in pairwise(offsets))
    return blocks, heads, size, size


def forward(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor, offsets: list[int] | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B,T,H,V) in v's dtype, the state after the last token, and what `backward` wants kept if `keep`, else empty.

    `offsets`: checked bounds of documents.
    """
    _, tokens, heads, size = r.shape
    r, k, v, state = _readable(r), _readable(k), _readable(v), state.contiguous()
    log_w, decay = _decay(log_w)
    bonus, bounds = u.float().contiguous(), _bounds(offsets)
    out = torch.empty(v.shape, dtype=v.dtype)
    after = torch.empty(state.shape)
    saved = torch.empty(saved_shape(r, state, offsets) if keep else 0)
    call = _Call(
        _view(r), _view(k), _view(v), decay, _view(out), bonus.data_ptr(), state.data_ptr(),
        saved.data_ptr() if keep else None, None if bounds is None else ctypes.addressof(bounds),
        state.shape[0], tokens, heads, size, r.dtype == torch.bfloat16, _threads(), after.data_ptr(),
    )  # fmt: skip
    native.check(_function("roost_wkv_forward")(ctypes.addressof(call)))
    return out, after, saved


def backward(
    d_out: Tensor, d_state: Tensor, saved: Tensor, r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor,
    state: Tensor, offsets: list[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of all six inputs, in their dtypes; inputs as in `forward`, `saved` as it kept it."""
    _, tokens, heads, size = r.shape
    r, k, v, d_out = _readable(r), _readable(k), _readable(v), _readable(d_out)
    state, d_state = state.contiguous(), d_state.contiguous()
    log_w, decay = _decay(log_w)
    bonus, bounds = u.float().contiguous(), _bounds(offsets)
    dr, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (r, k, v))
    dw, du, ds = torch.empty(log_w.shape), torch.empty(u.shape), torch.empty(state.shape)
    call = _Call(
        _view(r), _view(k), _view(v), decay, _view(d_out), bonus.data_ptr(), state.data_ptr(), saved.data_ptr(),
        None if bounds is None else ctypes.addressof(bounds), state.shape[0], tokens, heads, size,
        r.dtype == torch.bfloat16, _threads(), d_state.data_ptr(), _view(dr), _view(dk), _view(dv),
        _view(dw) if dw.dim() == 4 else (dw.data_ptr(), 0, 0, size), du.data_ptr(), ds.data_ptr(),
    )  # fmt: skip
    native.check(_function("roost_wkv_backward")(ctypes.addressof(call)))
    return dr, dk, dv, dw, du.to(u.dtype), ds
