"""What a packed model consists of: the slot of every tensor, and the formats that its role may have.

Owns: which role gets which format for weights = fp32, bf16, int8, int4, and the names and shapes in a packed model.
Refuses to know: files, and how matrices are laid out and rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import Tensor

from roost.config import ModelConfig
from roost.formats.panels import packed_size
from roost.models.rwkv import RWKV
from roost.native import KINDS

WeightsFormat = Literal["fp32", "bf16", "int8", "int4"]
"""What the weights of a packed model are; see `slots` for what becomes of each tensor."""

_EXACT = ("w16", "f32")  # the first where every number is a bf16 number
_ROWS = ("rows16", "rows32")
_MATRICES: dict[str, dict[str, tuple[str, ...]]] = {
    "fp32": {},
    "bf16": {"": ("bf16",)},
    "int8": {"": ("i8",), "att.output": ("i8 fine",), "head": ("i8 fine",)},
    "int4": {"": ("i4",), "head": ("i8 fine",)},
}  # kinds of the projections, "" for those not named; 8-bit activations hurt att.output and the head most
_LORA = ("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2")  # stored inputs first; y = x W


@dataclass(frozen=True)
class Slot:
    """One tensor of a packed model.

    name    the official name; time_maa_w2 becomes five matrices, `.w` `.k` `.v` `.r` `.g`
    shape   of a matrix (outputs, inputs), whatever way round it is stored in checkpoints
    kinds   the formats it may have: one of `native.KINDS`, or "vector" (fp32), or the rows of the embedding: "rows32"
            (fp32), "rows16" (bf16). Of two, the first where every number is a bf16 number
    """

    name: str
    shape: tuple[int, ...]
    kinds: tuple[str, ...]

    def nbytes(self, kind: str) -> int:
        """Bytes in the file."""
        if kind in KINDS:
            return packed_size(kind, *self.shape)
        return int(np.prod(self.shape, dtype=np.int64)) * (2 if kind == "rows16" else 4)

    def values(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The tensor of this slot out of official weights: vectors flat or as they are, matrices (outputs, inputs)."""
        stem, letter = self.name[:-2], self.name[-1]
        if stem.endswith("time_maa_w2"):
            return weights[stem]["wkvrg".index(letter)].T
        value = weights[self.name]
        return value.T if self.name.endswith(_LORA) else value


def slots(config: ModelConfig, weights: WeightsFormat) -> list[Slot]:
    """Every tensor of a packed model, in the order of the file, which is the order of use.

    Projections are what `weights` says (fp32: exact). Low-rank matrices are exact. Vectors, norms, decay, bonus and
    tuned states are fp32. The embedding is bf16, with fp32 weights only when it is exactly that.
    """
    shapes = {name: tuple(value.shape) for name, value in skeleton(config).items()}
    out: list[Slot] = []
    for name, shape in shapes.items():
        role = ".".join(name.split(".")[2:-1]) if name.startswith("blocks.") else name.split(".")[0]
        if name == "emb.weight":
            out.append(Slot(name, shape, _ROWS if weights == "fp32" else ("rows16",)))
        elif name.endswith("time_maa_w2"):
            out += [Slot(f"{name}.{letter}", (shape[2], shape[1]), _EXACT) for letter in "wkvrg"]
        elif name.endswith(_LORA):
            out.append(Slot(name, shape[::-1], _EXACT))
        elif len(shape) == 2 and name.endswith(".weight"):
            kinds = _MATRICES[weights]
            out.append(Slot(name, shape, kinds.get(role, kinds.get("", _EXACT))))
        else:
            out.append(Slot(name, tuple(size for size in shape if size > 1) or (1,), ("vector",)))
    return out


def skeleton(config: ModelConfig) -> dict[str, Tensor]:
    """The state dict of a model without numbers; all layers but the first are alike, so two are made."""
    made = RWKV(replace(config, n_layer=min(2, config.n_layer)), device="meta").state_dict()
    last = {name: value for name, value in made.items() if name.startswith("blocks.1.")}
    out: dict[str, Tensor] = {}
    for name, value in made.items():
        if name.startswith("ln_out"):
            for layer in range(2, config.n_layer):
                out |= {f"blocks.{layer}.{one.split('.', 2)[2]}": shape for one, shape in last.items()}
            last = {}
        out[name] = value
    return out
