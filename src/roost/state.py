"""The state: everything a model remembers of a sequence, as one value of constant size.

Owns: the invariant that a state is never changed once made (a snapshot is the object itself, a fork costs nothing),
its layout, and its file. Per layer: the last normalised input of time mixing, the recurrence, the last normalised
input of channel mixing (paper section 4; 66 L D floats at head size 64).
Refuses to know: how a model computes the next state.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from roost.checks import integers, whole
from roost.config import ModelConfig, check_bytes, check_config
from roost.files import disk_errors, replacing

_FORMAT = "roost-state-1"


class LayerState(NamedTuple):
    """What one layer remembers for B sequences.

    att_shift  (B, D)  the input of time mixing at the previous token (after ln1), in the model's dtype
    wkv        (B, H, K, V) fp32, rows = key channel; dove: (B, 3, A) fp32 with rows aa, bb, pp
    ffn_shift  (B, D)  the input of channel mixing at the previous token (after ln2), in the model's dtype
    """

    att_shift: Tensor
    wkv: Tensor
    ffn_shift: Tensor


class State(NamedTuple):
    """The state of B sequences: a tuple of layers, how many tokens each row has read, and the model they belong to.

    layers       one LayerState per block
    tokens       tokens read so far, one integer per row
    fingerprint  of the model that made it ("" when that model was never loaded or saved)
    """

    layers: tuple[LayerState, ...]
    tokens: tuple[int, ...]
    fingerprint: str = ""

    @staticmethod
    def zeros(
        config: ModelConfig,
        batch: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        fingerprint: str = "",
    ) -> State:
        """The state before the first token: zeros (dove: pp = -1e30, the exponent of an empty sum).

        Raises ValueError for absurd sizes.
        """
        check_config(config)
        batch = whole("batch", batch, 0)
        check_bytes(f"a state of {batch} row(s)", batch * config.state_bytes)
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        layers: list[LayerState] = []
        for _ in range(config.n_layer):
            shift = torch.zeros(batch, config.n_embd, device=device, dtype=dtype)
            if config.generation == "dove":
                wkv = torch.zeros(batch, 3, config.dim_att, device=device, dtype=precise)
                wkv[:, 2] = -1e30
            else:
                N = config.head_size
                wkv = torch.zeros(batch, config.n_head, N, N, device=device, dtype=precise)
            layers.append(LayerState(shift, wkv, shift.clone()))
        return State(tuple(layers), (0,) * batch, fingerprint)

    def __repr__(self) -> str:
        rows = f"{self.batch} row{'s' * (self.batch != 1)}, {', '.join(f'{n:,}' for n in self.tokens[:4])}"
        more = ", ..." if self.batch > 4 else ""
        return f"<State of {rows}{more} tokens read, {len(self.layers)} layers, {self.nbytes:,} bytes>"

    @property
    def batch(self) -> int:
        """B, the number of sequences (rows)."""
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes held by the tensors; the same after one token and after a million."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    def select(self, rows: int | Sequence[int]) -> State:
        """The given rows as a new state, in that order; a row may repeat (a fork). Raises ValueError out of range."""
        wanted = integers("rows", rows if isinstance(rows, Iterable) else [rows])
        for row in wanted:
            if not 0 <= row < self.batch:
                raise ValueError(f"row {row} does not exist: the state has {self.batch} row(s)")
        return State(
            tuple(LayerState(*(tensor[wanted] for tensor in layer)) for layer in self.layers),
            tuple(self.tokens[row] for row in wanted),
            self.fingerprint,
        )

    @staticmethod
    def cat(states: Sequence[State]) -> State:
        """The rows of all states, in order. Raises ValueError when empty or made by different models."""
        if not states:
            raise ValueError("State.cat needs at least one state")
        marks = {state.fingerprint for state in states if state.fingerprint}
        kinds = {tuple((t.shape[1:], t.dtype, t.device) for layer in s.layers for t in layer) for s in states}
        if len(marks) > 1 or len(kinds) > 1:
            raise ValueError("these states differ in model, dtype or device and cannot share a batch")
        layers = zip(*(state.layers for state in states), strict=True)
        return State(
            tuple(LayerState(*(torch.cat(parts) for parts in zip(*same, strict=True))) for same in layers),
            tuple(count for state in states for count in state.tokens),
            marks.pop() if marks else "",
        )

    def detach(self) -> State:
        """The same values without gradient history (truncated back-propagation)."""
        return self._replace(layers=tuple(LayerState(*(t.detach() for t in layer)) for layer in self.layers))

    def to(self, device: torch.device | str) -> State:
        """The same values on another device."""
        return self._replace(layers=tuple(LayerState(*(t.to(device) for t in layer)) for layer in self.layers))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file with fingerprint, token counts and a checksum; an old file survives any failure.

        Raises ValueError when the directory does not exist.
        """
        from safetensors.torch import save_file

        tensors = {
            f"layers.{i}.{name}": value.detach().cpu().contiguous()
            for i, layer in enumerate(self.layers)
            for name, value in layer._asdict().items()
        }
        metadata = {
            "format": _FORMAT,
            "tokens": json.dumps(self.tokens),
            "fingerprint": self.fingerprint,
        }
        metadata["sha256"] = _checksum(tensors, metadata)
        with replacing(path) as temporary, disk_errors(path):
            save_file(tensors, temporary, metadata)

    @staticmethod
    def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> State:
        """Read a file written by `save`. Raises ValueError when it is missing, not a state, or damaged."""
        from safetensors import SafetensorError, safe_open

        if os.fspath(path) and Path(path).is_dir():
            raise ValueError(f"{path} is a directory; name a state file")
        if not os.fspath(path) or not Path(path).is_file():
            raise ValueError(f"no state file at {os.fspath(path)!r}")
        try:
            with safe_open(path, "pt") as opened:
                file: Any = opened  # safetensors leaves it untyped
                metadata: dict[str, str] = dict(file.metadata() or {})
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a readable state file: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a roost state (format {metadata.get('format')!r}, wanted {_FORMAT!r})")
        stored = metadata.pop("sha256", "")
        if stored != _checksum(tensors, metadata):
            raise ValueError(f"{path} is damaged: its checksum does not match; make the state again from its text")
        count = len(tensors) // 3
        layers = tuple(
            LayerState(*(tensors[f"layers.{i}.{name}"] for name in LayerState._fields)) for i in range(count)
        )
        return State(layers, tuple(json.loads(metadata["tokens"])), metadata["fingerprint"]).to(device)


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()
