"""Trust, measured: a loaded model against the NumPy oracle, layer by layer, on real text.

Owns: the comparison and its verdict. The oracle (oracle.py) is written from the equations in fp64 and shares no code
with the models. Refuses to know: how either computes.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from roost.checkpoint import load, stored_weights
from roost.evaluation import oracle
from roost.models.parts import precise
from roost.models.rwkv import RWKV

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4, torch.bfloat16: 0.1}
"""Largest |difference| / standard deviation of the oracle's tensor that counts as equal, per dtype computed in.

fp64 is bounded by exp(time_first) of an RWKV-5.0 or 5.1 file, which is computed and kept in fp32."""


class Compared(NamedTuple):
    """One tensor: its name, max |model - oracle| / std(oracle), and whether that is within tolerance."""

    name: str
    error: float
    agrees: bool


class Verdict(NamedTuple):
    """All tensors in the order they are computed; `first` is the first that differs, None when all agree."""

    tensors: list[Compared]
    first: Compared | None
    argmax_agrees: bool


def verify(path: str | os.PathLike[str], tokens: Sequence[int], dtype: torch.dtype = torch.float32) -> Verdict:
    """Load `path` in `dtype` and compare every layer with the oracle, which reads the same file's raw tensors in fp64.

    Raises ValueError as `roost.load`, and when `tokens` is empty or holds ids the model does not have.
    """
    if not tokens:
        raise ValueError("verify needs at least one token")
    model, _ = load(path, dtype=dtype)
    traced: dict[str, np.ndarray] = {}
    weights = {name: precise(value).numpy() for name, value in stored_weights(path).items()}
    logits, _ = oracle.forward(weights, tokens, trace=traced.__setitem__)
    with torch.no_grad(), _recording(model) as seen:
        seen["logits"] = model(torch.tensor([list(tokens)]))[0]
    tensors = [_compare(name, seen[name], value, TOLERANCE[dtype]) for name, value in traced.items()]
    first = next((one for one in tensors if not one.agrees), None)
    same = bool((seen["logits"][0].float().argmax(-1).numpy() == logits.argmax(-1)).all())
    return Verdict(tensors, first, same)


def _compare(name: str, seen: Tensor, wanted: np.ndarray, tolerance: float) -> Compared:
    difference = float(np.abs(seen[0].double().numpy() - wanted).max())
    spread = float(wanted.std())
    error = difference / spread if spread > 0 else difference
    return Compared(name, error, error <= tolerance)  # NaN never agrees


@contextmanager
def _recording(model: RWKV) -> Generator[dict[str, Tensor], None, None]:
    """Collect the output of every named part of the model under the oracle's names."""
    seen: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return module.register_forward_hook(hook)

    handles = [note("ln_out", model.ln_out)]
    for i, block in enumerate(model.layers):
        if i == 0:
            handles.append(note("ln0", block.ln0))
            handles.append(block.ln0.register_forward_pre_hook(lambda _m, inputs: seen.__setitem__("emb", inputs[0])))
        handles += [note(f"blocks.{i}.att", block.att), note(f"blocks.{i}.ffn", block.ffn), note(f"blocks.{i}", block)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
