"""The few pieces all generations share: the token shift, products, the per-head norm, and initial values.

Owns: "previous token" across calls, chunks and packed documents; ramps and matrices of RWKV's initialisation.
Refuses to know: any generation's equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roost.ops import product

Init = Literal["current", "legacy", "paper"]
"""RWKV-LM today, RWKV-LM in early 2024, the paper's appendix I taken literally."""


def precise(x: Tensor) -> Tensor:
    """x in fp32, or as it is when it is fp64: the dtype of decays, states and norms."""
    return x if x.dtype == torch.float64 else x.float()


def token_shift(x: Tensor, last: Tensor, offsets: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """The input one token earlier, and the input at the last token.

    x (B, T, D); last (B, D) is what the call before this one returned (zeros before the first token). With `offsets`
    (B = 1) every document starts from its own row of last (n, D), so nothing leaks between documents.
    Returns previous (B, T, D) and the new last, of the shape of last.
    """
    last = last.to(x.dtype)
    if offsets is None:
        both = torch.cat([last[:, None], x], 1)
        return both[:, :-1], both[:, -1].clone()  # a view would keep the whole text alive in the state
    filled = [d for d, (a, b) in enumerate(pairwise(offsets)) if b > a]
    starts = torch.tensor([offsets[d] for d in filled], dtype=torch.long, device=x.device)
    ends = torch.tensor([offsets[d + 1] - 1 for d in filled], dtype=torch.long, device=x.device)
    rows = torch.tensor(filled, dtype=torch.long, device=x.device)
    previous = F.pad(x, (0, 0, 1, 0))[:, :-1]
    return (
        previous.index_copy(1, starts, last.index_select(0, rows)[None]),
        last.index_copy(0, rows, x[0].index_select(0, ends)),
    )


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Normalise each head of x (B, T, A) with the weight, bias and eps of `norm`, in fp32 (fp64 for fp64)."""
    heads: Tensor = precise(x).unflatten(-1, (norm.num_groups, -1))
    y = F.layer_norm(heads, heads.shape[-1:], eps=norm.eps).flatten(-2)
    return y * precise(norm.weight) + precise(norm.bias)


class Matrix(nn.Linear):
    """A linear layer without bias, multiplied by the faster of torch's libraries (ops/product.py)."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return product.linear(input, self.weight)


def matmul(x: Tensor, w: Tensor) -> Tensor:
    """x (..., in) times w (in, out), multiplied as a `Matrix` is."""
    return product.linear(x, w.t())


def linear(inputs: int, outputs: int, device: torch.device | str | None, dtype: torch.dtype) -> nn.Linear:
    """A bias-free linear layer whose weight is set later."""
    layer = Matrix(inputs, outputs, bias=False, device="meta", dtype=dtype)
    return layer.to_empty(device=device or torch.get_default_device())


def empty(*shape: int, device: torch.device | str | None, dtype: torch.dtype) -> nn.Parameter:
    """A parameter whose value is set later."""
    return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))


def depth(layer: int, n_layer: int) -> tuple[float, float]:
    """rho_0 = l / (L - 1) and rho_1 = 1 - l / L; rho_0 = 0 for a single layer, where RWKV-LM divides by zero."""
    return (layer / (n_layer - 1) if n_layer > 1 else 0.0), 1 - layer / n_layer


def ramp(size: int) -> Tensor:
    """d_i = i / size."""
    return torch.arange(size, dtype=torch.float32) / size


def unit_ramp(size: int) -> Tensor:
    """i / (size - 1), from 0 to 1; 0 for a single element."""
    return torch.arange(size, dtype=torch.float32) / max(size - 1, 1)


def zigzag(size: int) -> Tensor:
    """((i + 1) mod 3) - 1: 0, 1, -1, 0, 1, -1, .."""
    return (torch.arange(size) + 1) % 3 - 1.0


def fill(parameter: Tensor, value: Tensor | float) -> None:
    """Set a parameter, whatever its shape and dtype, from as many numbers or from one."""
    with torch.no_grad():
        if isinstance(value, Tensor):
            parameter.copy_(value.reshape(parameter.shape))
        else:
            parameter.fill_(value)


def orthogonal(parameter: Tensor, gain: float, generator: torch.Generator) -> None:
    """An orthogonal matrix times gain, built in fp32 on the CPU and then cast."""
    value = torch.empty(parameter.shape, dtype=torch.float32)
    fill(parameter, nn.init.orthogonal_(value, gain, generator=generator))


def uniform(parameter: Tensor, bound: float, generator: torch.Generator) -> None:
    """Independent draws from U(-bound, bound)."""
    fill(parameter, torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


def widening(weight: Tensor) -> float:
    """sqrt(out / in) where a matrix widens, else 1: the gain of RWKV-LM in 2023 and early 2024."""
    outputs, inputs = weight.shape
    return max(1.0, outputs / inputs) ** 0.5


def decay_and_bonus(decay: Tensor, bonus: Tensor, rho0: float, init: Init) -> None:
    """The same for Eagle and Finch: decays from w = 0.9975 to 0.692, the bonus a ramp with a zigzag."""
    i = unit_ramp(decay.numel())
    fill(decay, -6 + 5 * i ** (0.7 + 1.3 * rho0))
    fill(bonus, rho0 * (1 - i) + 0.1 * (zigzag(bonus.numel()) + (init == "paper")))


def projections(full: Sequence[nn.Linear], small: Sequence[nn.Linear], init: Init, generator: torch.Generator) -> None:
    """Matrices into time mixing, the same for Eagle and Finch; those of `small` have gain 0.1 today."""
    for layer in (*full, *small):
        weight = layer.weight
        if init == "paper":
            uniform(weight, weight.shape[1] ** -0.5, generator)
        elif init == "legacy":
            orthogonal(weight, widening(weight), generator)
        else:
            orthogonal(weight, 0.1 if layer in small else 1.0, generator)


def channel_mixing(
    key: nn.Linear, value: nn.Linear, receptance: nn.Linear, init: Init, generator: torch.Generator
) -> None:
    """Matrices of channel mixing, the same for Eagle and Finch."""
    wide = widening(key.weight)
    orthogonal(key.weight, {"current": 1.0, "legacy": wide, "paper": wide**2}[init], generator)
    for zero in (value, receptance):
        fill(zero.weight, 0.0)
