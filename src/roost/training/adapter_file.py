"""The file of an adapter: one self-contained safetensors, or for a tuned state alone also the `.pth` of RWKV-LM.

    tensors     `blocks.0.att.key.lora_A` .. (fp32), and official names of what was trained whole
    metadata    "roost": JSON of format, base (fingerprint of the model it belongs to), every key of AdapterConfig, and
                sha256 of all of it; one key, because the order of several is random, and equal runs write equal bytes

Owns: these bytes, that a damaged file is noticed, that an old file survives any failure.
Refuses to know: what the tensors do.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roost.files import disk_errors, replacing
from roost.models.rwkv import save_weights

_FORMAT = "roost-adapter-1"


@dataclass(frozen=True)
class AdapterFile:
    """What is in the file: the keys of AdapterConfig, the fingerprint of the base ("": unknown), and the tensors."""

    config: Mapping[str, Any]
    base: str
    tensors: Mapping[str, Tensor]

    def description(self) -> dict[str, Any]:
        """What the file says about itself, before its checksum."""
        return {"format": _FORMAT, "base": self.base, **self.config}

    def checksum(self) -> str:
        """64 hex digits over everything."""
        digest = hashlib.sha256(json.dumps(self.description(), sort_keys=True).encode())
        for name in sorted(self.tensors):
            value = self.tensors[name].detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        return digest.hexdigest()


def write_adapter(path: str | os.PathLike[str], file: AdapterFile) -> None:
    """Write a `.safetensors`, or a `.pth` of tuned states; atomic.

    Raises ValueError for another ending, for a `.pth` of anything else, and for a missing directory.
    """
    ending = Path(path).suffix
    if ending == ".pth":
        others = [name for name in file.tensors if not name.endswith("att.time_state")]
        if others:
            raise ValueError(f"cannot write {path}: a .pth holds tuned states only, not {others[0]}; use .safetensors")
        save_weights(file.tensors, path)
        return
    if ending != ".safetensors":
        raise ValueError(f"cannot write {path}: an adapter ends in .safetensors (a tuned state also in .pth)")
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous() for name, value in file.tensors.items()}
    with replacing(path) as temporary, disk_errors(path):
        save_file(tensors, temporary, {"roost": json.dumps({**file.description(), "sha256": file.checksum()})})


def read_adapter(path: str | os.PathLike[str]) -> AdapterFile:
    """Read what `write_adapter` wrote, or a state file of RWKV-LM. Raises ValueError when it is none, or damaged."""
    if not Path(path).is_file():
        raise ValueError(f"no adapter at {os.fspath(path)!r}")
    if Path(path).suffix == ".pth":
        return _read_state(path)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as opened:
            file: Any = opened  # safetensors leaves it untyped
            metadata: dict[str, str] = dict(file.metadata() or {})
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about: Any = json.loads(metadata.get("roost", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable adapter: {error}") from error
    if not isinstance(about, dict) or about.pop("format", "") != _FORMAT:
        raise ValueError(f"{path} is not an adapter that roost wrote (it does not say {_FORMAT})")
    checksum, base = about.pop("sha256", ""), about.pop("base", "")
    found = AdapterFile(about, base, tensors)
    if found.checksum() != checksum:
        raise ValueError(f"{path} is damaged: its checksum does not match")
    return found


def _read_state(path: str | os.PathLike[str]) -> AdapterFile:
    try:
        tensors: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a readable state file: {error}") from error
    if not isinstance(tensors, dict) or not tensors:
        raise ValueError(f"{path} is not a state file: it holds no tensors by name")
    named: dict[str, Any] = tensors  # pyright: ignore[reportUnknownVariableType]
    for name, value in named.items():
        if not (str(name).endswith("att.time_state") and isinstance(value, Tensor)):
            raise ValueError(f"{path} is not a state file: it holds {name}; only .safetensors hold other adapters")
    return AdapterFile({"adapter": "state"}, "", named)
