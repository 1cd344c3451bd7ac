"""Low-rank adapters of matrices: LoRA, DoRA and PiSSA as a module in the place of a linear layer.

    LoRA    y = x W^T + s drop(x) A^T B^T          A (r, in) from U(+-1/sqrt(in)), B (out, r) zero; s = alpha / r
                                                   (rsLoRA: alpha / sqrt(r))       (Hu et al. 2021; Kalajdzievski 2023)
    DoRA    W' = m C / ||C||,  C = W + s B A       m starts as ||W||; no gradient through ||C||   (Liu et al. 2024)
    PiSSA   y = x W^T + drop(x) (B A - B_0 A_0)^T  A_0 = sqrt(S) V^T, B_0 = U sqrt(S) of the largest r singular values;
                                                   A, B start there                (Meng et al. 2024)

Norms of DoRA are per row of W (an output; axis "out") or per column (an input; axis "in", as RWKV's trainers do). PiSSA
keeps W and subtracts the first product, so every kind begins with the base's values bit for bit, W is never changed,
and A_0 and B_0 are all that a merge needs besides.

Owns: these equations, that factors are fp32 (fp64 for fp64) whatever W is, and that `state_dict` of the model stays the
base's: factors are parameters, but not part of it.
Refuses to know: which matrices are adapted, files, optimisers.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from roost.models.parts import precise
from roost.ops.product import linear

LowRankKind = Literal["lora", "dora", "pissa"]
Axis = Literal["out", "in"]


class Form(NamedTuple):
    """What a low-rank adapter computes: its equation, rank r, scale s, dropout of its input, and the norms of DoRA."""

    kind: LowRankKind
    rank: int
    scale: float
    dropout: float = 0.0
    axis: Axis = "out"


class LowRank(nn.Module):
    """A frozen matrix W (out, in) with trained factors: (..., in) -> (..., out), in the place of a bias-free Linear.

    The factors are `lora_A` (r, in), `lora_B` (out, r), for DoRA `lora_m` (out) or (in); for PiSSA also the first
    values `lora_A0`, `lora_B0`, which are buffers. Dropout draws from torch's global generator, because that is the one
    that recomputation of activations and of segments winds back.
    """

    def __init__(self, weight: nn.Parameter, form: Form, factors: dict[str, Tensor]) -> None:
        super().__init__()
        self.form = form
        self.weight = weight
        self.names = tuple(factors)
        for name, value in factors.items():
            if name.endswith("0"):
                self.register_buffer(name, value, persistent=False)
            else:
                self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        gain = self.gain() if self.form.kind == "dora" else None
        if gain is not None and self.form.axis == "in":
            x = (x * gain).to(x.dtype)
        kept = F.dropout(x, self.form.dropout, self.training) if self.form.dropout else x
        delta = self._product(kept, "lora_A", "lora_B")
        if self.form.kind == "pissa":
            delta = delta - self._product(kept, "lora_A0", "lora_B0")
        y = linear(x, self.weight)
        y = y + (delta if self.form.scale == 1 else delta * self.form.scale)
        return y if gain is None or self.form.axis == "in" else (y * gain).to(y.dtype)

    def _product(self, x: Tensor, first: str, second: str) -> Tensor:
        low = linear(x, getattr(self, first).to(x.dtype))
        return linear(low, getattr(self, second).to(x.dtype))

    def gain(self) -> Tensor:
        """m / ||C||, (out) or (in): exactly 1 before training."""
        return self.get_parameter("lora_m") / norms(self.weight, self.factors(), self.form)

    def factors(self) -> dict[str, Tensor]:
        """Every tensor of the adapter by its name, first values included."""
        return {name: getattr(self, name).detach() for name in self.names}

    def merged(self) -> Tensor:
        """The one matrix that computes the same without dropout; added up in fp64, rounded once to the dtype of W."""
        W = self.weight.detach()
        f = {name: value.cpu().double() for name, value in self.factors().items()}
        C = W.cpu().double() + self.form.scale * (f["lora_B"] @ f["lora_A"])
        if self.form.kind == "pissa":
            C -= f["lora_B0"] @ f["lora_A0"]
        elif self.form.kind == "dora":
            along = _along(self.form.axis)
            C *= (f["lora_m"] / torch.linalg.vector_norm(C, dim=along)).unsqueeze(along)
        return C.to(W.device, W.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys.extend(key for key in missing if key.removeprefix(prefix) not in self.names)


def fresh_factors(
    weight: Float[Tensor, "out in"], form: Form, generator: torch.Generator, name: str
) -> dict[str, Tensor]:
    """The factors before training, for a matrix called `name`; with them the module computes what W alone does.

    Raises ValueError when the rank exceeds the matrix, and for DoRA of a matrix with a row (column) of zeros.
    """
    check_rank(weight, form, name)
    (outputs, inputs), rank = weight.shape, form.rank
    W = precise(weight.detach())
    if form.kind == "pissa":
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        root = S[:rank].sqrt()
        first = {"lora_A": root[:, None] * V[:rank], "lora_B": U[:, :rank] * root}
        first = {name: value.contiguous() for name, value in first.items()}  # LAPACK's are transposed
        return {**first, **{f"{name}0": value.clone() for name, value in first.items()}}
    A = torch.empty(rank, inputs, dtype=W.dtype).uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
    factors = {"lora_A": A.to(W.device), "lora_B": W.new_zeros(outputs, rank)}
    if form.kind == "dora":
        factors["lora_m"] = norms(weight, factors, form)
        if not bool((factors["lora_m"] > 0).all()):
            lines = "rows" if form.axis == "out" else "columns"
            raise ValueError(f"dora cannot adapt {name}, which has {lines} of zeros (fresh weights?): use 'lora'")
    return factors


def check_rank(weight: Tensor, form: Form, name: str) -> None:
    """Raise ValueError when the rank exceeds the matrix called `name`."""
    outputs, inputs = weight.shape
    if form.rank > min(outputs, inputs):
        raise ValueError(
            f"rank is {form.rank}, but {name} is a {outputs} x {inputs} matrix: the rank must not exceed it"
        )


def factor_shapes(weight: Tensor, form: Form) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the factors of a matrix."""
    outputs, inputs = weight.shape
    shapes: dict[str, tuple[int, ...]] = {"lora_A": (form.rank, inputs), "lora_B": (outputs, form.rank)}
    if form.kind == "pissa":
        shapes |= {f"{name}0": shape for name, shape in shapes.items()}
    elif form.kind == "dora":
        shapes["lora_m"] = (outputs,) if form.axis == "out" else (inputs,)
    return shapes


@torch.no_grad()
def norms(weight: Tensor, factors: dict[str, Tensor], form: Form) -> Tensor:
    """||C|| of DoRA, (out) or (in), in the dtype of the factors; without gradient (paper section 4.3)."""
    with torch.autocast(weight.device.type, enabled=False):
        C = precise(weight) + form.scale * (factors["lora_B"] @ factors["lora_A"])
        return torch.linalg.vector_norm(C, dim=_along(form.axis))


def _along(axis: Axis) -> int:
    """The dimension of W (out, in) that a norm per output or per input sums over."""
    return 1 if axis == "out" else 0
