"""Inputs of WKV in every decay regime, the cases of every backend, and the comparison with the recurrence in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import roost
from roost import native

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
NAMES = ("out", "state", "dr", "dk", "dv", "dlog_w", "du", "dstate")
Inputs = list[Tensor]

needs_native = pytest.mark.skipif(not native.available(), reason=f"no native library: {native.why_not()}")
FAST = ["chunked", pytest.param("native", marks=needs_native)]
CASES = [  # backend, dtype of r, k, v, head size
    ("reference", torch.float64, 8),
    ("chunked", torch.float64, 8),
    pytest.param("native", torch.float32, 32, marks=needs_native),
    pytest.param("native", torch.bfloat16, 64, marks=needs_native),
]


def uniform(low: float, high: float) -> Callable[..., Tensor]:
    return lambda shape, g: -torch.empty(shape, dtype=torch.float64).uniform_(low, high, generator=g).exp()


def constant(value: float) -> Callable[..., Tensor]:
    return lambda shape, g: torch.full(shape, value, dtype=torch.float64)


def resets(depth: float) -> Callable[..., Tensor]:
    def make(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
        hit = torch.rand(shape, generator=g, dtype=torch.float64) < 0.05
        return torch.where(hit, depth, -0.01).double()

    return make


REGIMES = {
    "U(-6,-1)": uniform(-6, -1),
    "U(-8,2)": uniform(-8, 2),
    "U(-10,5)": uniform(-10, 5),
    "5 % at -1e4": resets(-1e4),
    "5 % at -inf": resets(-torch.inf),
    "all -1e-6": constant(-1e-6),
    "all -30": constant(-30.0),
    "w = 1": constant(0.0),
    "w = 0": constant(-torch.inf),
    "w = 1e-10": constant(-23.02585),
}


def inputs(
    T: int, B: int = 2, H: int = 2, K: int = 8, V: int = 8, *, log_w=None, static=False, rows=None, seed=0
) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    normal = lambda *s: torch.randn(s, generator=g, dtype=torch.float64)  # noqa: E731
    w = (log_w or uniform(-8, 2))((H, K) if static else (B, T, H, K), g)
    return [normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V), w, normal(H, K), normal(rows or B, H, K, V)]


def cast(x: Inputs, dtype: torch.dtype) -> Inputs:
    """r, k, v in dtype; the rest in fp32 (fp64 for fp64), as the contract asks."""
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    return [t.to(dtype) for t in x[:3]] + [t.to(precise) for t in x[3:]]


def run(x: Inputs, backend: str, rounded_to: Inputs | None = None, **options: object) -> list[Tensor]:
    """out, state and the six gradients, with a gradient on both results (rounded to the dtypes of other inputs)."""
    leaves = [t.detach().clone().requires_grad_() for t in x]
    with roost.wkv_backend(backend):
        out, state = roost.wkv(*leaves, **options)
    g = torch.Generator().manual_seed(1)
    via = rounded_to or x
    cotangents = [
        torch.randn(t.shape, generator=g, dtype=torch.float64).to(like.dtype).to(t.dtype)
        for t, like in ((out, via[2]), (state, via[5]))
    ]
    gradients = torch.autograd.grad((out, state), leaves, cotangents, allow_unused=True)
    pairs = zip(gradients, leaves, strict=True)
    return [out.detach(), state.detach(), *(torch.zeros_like(t) if d is None else d for d, t in pairs)]


def close(got: list[Tensor], true: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(NAMES, got, true, strict=True):
        assert a.shape == b.shape, name
        assert torch.isfinite(a).all(), name
        error, size = (a.double() - b.double()).norm(), b.double().norm()
        assert error <= tolerance * size + 1e-30, f"{name}: {error / size:.1e}"


def exact(x: Inputs, **options: object) -> list[Tensor]:
    """What the recurrence gives in fp64 for these very inputs and gradients."""
    return run([t.double() for t in x], "reference", rounded_to=x, **options)
