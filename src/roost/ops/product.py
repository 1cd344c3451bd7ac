"""Products with a matrix of weights, x W^T, where torch's own are slow: fp32 on an x86 CPU.

torch gives them to MKL, which on CPUs that are not Intel's leaves half of the vector width unused; oneDNN, which torch
brings along and uses for bf16, does not (measured: docs/measurements.md). Everything else is torch's own product.

Owns: which library multiplies, and the gradients of its product.
Refuses to know: modules, models, the meaning of the matrices.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

FEW = 16
"""Rows of x below which torch's own product is as fast: decoding."""

ONEDNN = (
    platform.machine().lower() in ("x86_64", "amd64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
"""Whether this machine has what `linear` uses in place of torch's product."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) and weight (out, in) -> (..., out): `torch.nn.functional.linear` to fp32 rounding."""
    if (
        not ONEDNN
        or not (x.dtype == weight.dtype == torch.float32)
        or not (x.device.type == weight.device.type == "cpu")
        or x.numel() < FEW * x.shape[-1]
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or not torch.backends.mkldnn.enabled
    ):
        return F.linear(x, weight)
    return _Linear.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


class _Linear(torch.autograd.Function):
    """y = x W^T of matrices; dL/dx = dL/dy W; dL/dW = (dL/dy)^T x, with the smaller side of W as rows: faster so."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:  # without ctx, so that torch.func.grad works too
        return _product(x, weight.t())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (what the decorator returns)
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows: Tensor = grad_outputs[0]
        dx = _product(rows, weight) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None
        narrow = len(weight) <= weight.shape[1]
        return dx, _product(rows.t(), x) if narrow else _product(x.t(), rows).t()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a (m, k) times b (k, n) by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b.t()), None, "none", [], "")


def _dense(x: Tensor) -> Tensor:
    """A matrix without gaps between its rows or columns: with gaps oneDNN can take a thousand times longer."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()
