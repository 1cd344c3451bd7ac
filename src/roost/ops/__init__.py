"""The WKV operator: one contract for Eagle and Finch, whose decays differ only in shape.

    out_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T)          S_t = diag(exp(log_w_t)) S_{t-1} + k_t v_t^T

Owns: the contract, its checks, and the choice of a backend.
Refuses to know: models, tokens, files.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from roost.checks import choice, instance, integers
from roost.ops import chunked, library, native
from roost.ops.reference import wkv_reference

BACKENDS = ("reference", "chunked", "native")
"""Names that `wkv_backend` accepts."""

_forced: str | None = None
_around: Callable[..., tuple[Tensor, Tensor]] | None = None


@contextmanager
def wkv_backend(name: str) -> Generator[None, None, None]:
    """Force one backend for every `wkv` call inside the block: "reference", "chunked" or "native".

    It holds for the whole process, all threads included. Raises ValueError for an unknown name; a `wkv` call that the
    forced backend cannot serve raises ValueError with the reason.
    """
    global _forced
    choice("WKV backend", name, BACKENDS)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@contextmanager
def wkv_around(outer: Callable[..., tuple[Tensor, Tensor]]) -> Generator[None, None, None]:
    """Inside the block every `wkv` call is answered by `outer`, with the same arguments; what it calls is plain `wkv`.

    It holds for the whole process: for a recurrence that is spread over processes (training/context_parallel.py).
    """
    global _around

    def enter(*args: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        global _around
        _around = None
        try:
            return outer(*args, **options)
        finally:
            _around = enter

    before, _around = _around, enter
    try:
        yield
    finally:
        _around = before


def wkv(
    r: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_w: Float[Tensor, "..."],
    u: Float[Tensor, "H K"],
    state: Float[Tensor, "n H K V"] | None = None,
    *,
    cu_seqlens: Int[Tensor, " offsets"] | Sequence[int] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "n H K V"]]:
    """The recurrence over T tokens; T = 1 is decoding, T large is prefill or training (paper equations 5, 6, 18, 19).

    r, k   (B, T, H, K) fp32, bf16, fp16 or fp64, one dtype for r, k, v
    v      (B, T, H, V)
    log_w  (H, K) static decay (Eagle) or (B, T, H, K) per token (Finch), fp32 (fp64 with fp64 inputs). It must be
           <= 0 and may be -inf; the sign is a precondition, not checked.
    u      (H, K) bonus of the current token
    state  (B, H, K, V) fp32 (fp64 with fp64 inputs), rows = key channel; None = zeros. With cu_seqlens (n, H, K, V).
    cu_seqlens  n + 1 increasing offsets from 0 to T, with B = 1: n separate documents; empty ones are legal.

    Returns out (B, T, H, V) in the dtype of v, and the state after the last token, always a new tensor. No scale is
    applied. Any T >= 0 and B >= 0. Differentiable once in all six inputs and through the returned state; a gradient has
    the dtype of its input. Autocast changes nothing inside. Raises ValueError for impossible shapes or dtypes.
    """
    if _around is not None:
        return _around(r, k, v, log_w, u, state, cu_seqlens=cu_seqlens)
    B, T, H, K = _checked(r, k, v, log_w, u)
    offsets = None if cu_seqlens is None else document_offsets(cu_seqlens, B, T)
    rows = B if offsets is None else len(offsets) - 1
    precise = torch.float64 if r.dtype == torch.float64 else torch.float32
    if state is not None:
        instance("state", state, Tensor)
    if state is None:
        state = torch.zeros(rows, H, K, v.shape[-1], dtype=precise, device=r.device)
    elif state.shape != (rows, H, K, v.shape[-1]) or state.dtype != precise:
        raise ValueError(
            f"state is {state.dtype} {tuple(state.shape)}; it must be {precise} {(rows, H, K, v.shape[-1])}"
        )
    if _forced == "reference":
        return _reference(r, k, v, log_w, u, state, offsets)
    reason = "another backend is forced" if _forced == "chunked" else native.why_not(r, v)
    if _forced == "native" and reason:
        raise ValueError(f"the native WKV backend cannot serve this call: {reason}")
    # inference skips the registration's overhead
    registered = torch.is_grad_enabled() or torch.compiler.is_compiling() or type(r) is not Tensor
    if reason:
        run = library.wkv_chunked if registered else chunked.forward
        return run(r, k, v, log_w, u, state, offsets)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (r, k, v, log_w, u, state))
    run = library.wkv_native if registered else native.forward
    out, after, _ = run(r, k, v, log_w, u, state, offsets, keep)
    return out, after


def _checked(r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor) -> tuple[int, int, int, int]:
    for name, x in (("r", r), ("k", k), ("v", v), ("log_w", log_w), ("u", u)):
        instance(name, x, Tensor)
    if r.dim() != 4:
        raise ValueError(f"r has shape {tuple(r.shape)}; it must be (B, T, H, K)")
    B, T, H, K = r.shape
    if k.shape != r.shape or v.dim() != 4 or v.shape[:3] != r.shape[:3]:
        raise ValueError(f"r {tuple(r.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together")
    if not r.dtype == k.dtype == v.dtype or not r.is_floating_point():
        raise ValueError(f"r, k, v have dtypes {r.dtype}, {k.dtype}, {v.dtype}; they must share one float dtype")
    if log_w.shape != (H, K) and log_w.shape != r.shape:
        raise ValueError(f"log_w has shape {tuple(log_w.shape)}; it must be {(H, K)} or {tuple(r.shape)}")
    precise = torch.float64 if r.dtype == torch.float64 else torch.float32
    if log_w.dtype != precise:
        raise ValueError(f"log_w is {log_w.dtype}; with {r.dtype} inputs it must be {precise}: decays near 1 need it")
    if u.shape != (H, K):
        raise ValueError(f"u has shape {tuple(u.shape)}; it must be {(H, K)}")
    return B, T, H, K


def document_offsets(cu_seqlens: Tensor | Sequence[int], B: int, T: int) -> list[int]:
    """`cu_seqlens` as checked integers. Raises ValueError unless it rises from 0 to T and B is 1."""
    offsets = integers("cu_seqlens", cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens)
    if B != 1:
        raise ValueError(f"cu_seqlens packs documents into one row, but B is {B}")
    if not offsets or offsets[0] != 0 or offsets[-1] != T or any(b < a for a, b in pairwise(offsets)):
        raise ValueError(f"cu_seqlens {offsets} must rise from 0 to T = {T}")
    return offsets


def _reference(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor, offsets: list[int] | None
) -> tuple[Tensor, Tensor]:
    if offsets is None:
        return wkv_reference(r, k, v, log_w, u, state)
    parts = [
        wkv_reference(
            r[:, a:b], k[:, a:b], v[:, a:b], log_w if log_w.dim() == 2 else log_w[:, a:b], u, state[d : d + 1]
        )
        for d, (a, b) in enumerate(pairwise(offsets))
    ]
    if not parts:
        return v.clone(), state.clone()
    return torch.cat([out for out, _ in parts], 1), torch.cat([after for _, after in parts])
