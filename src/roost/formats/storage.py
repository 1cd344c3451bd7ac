"""Tensors out of files and directories: .pth (zip and legacy), .safetensors, shards with or without an index.

Owns: "a file is recognised by its first bytes, mapped instead of read where its format allows, and never executed".
Refuses to know: what the tensors mean and what their names should be.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from roost.formats.refusals import refuse_keys, refuse_magic

ENDINGS = (".pth", ".safetensors", ".gguf")
"""Of single files that hold a model."""
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ending>\.safetensors|\.bin)")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, or of a directory's weight files, on the CPU, under the names that are stored.

    Zip .pth and .safetensors are memory-mapped (copy on write): nothing is read before it is used. Damage inside the
    numbers of a mapped file is therefore not noticed here; a file that is too short is.
    Raises ValueError for what is missing, empty, truncated, corrupt, of another format, or not made of float tensors.
    """
    if not path.exists():
        raise ValueError(f"no such file or directory: {path}")
    weights: dict[str, Tensor] = {}
    for file in files(path):
        part = _read_file(file)
        twice = sorted(weights.keys() & part.keys())
        if twice:
            raise ValueError(f"{file} holds {twice[0]} again: the shards in {path} do not belong together")
        weights |= part
    for name, value in weights.items():
        if not value.is_floating_point() or value.dtype.itemsize == 1:
            kind = str(value.dtype).removeprefix("torch.")
            raise ValueError(
                f"{path}: {name} is {kind}: only float weights are read, none that are quantised; use the original file"
            )
        if value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{path}: {name} is a {'meta' if value.is_meta else 'sparse'} tensor; store its numbers")
    return weights


def files(path: Path) -> list[Path]:
    """The files that hold the weights of `path`: itself, or those a directory names. Raises ValueError without any."""
    if not path.is_dir():
        return [path]
    names = [entry.name for entry in path.iterdir() if entry.is_file()]
    for index in _INDEXES:
        if index in names:
            chosen = _indexed(path / index)
            break
    else:
        if not any(_is_weights(name) for name in names) and "zero_to_fp32.py" in names:
            raise ValueError(
                f"{path} is a DeepSpeed checkpoint: run its zero_to_fp32.py and load the file that it writes"
            )
        chosen = choose(names, str(path))
    missing = [name for name in chosen if name not in names]
    if missing:
        raise ValueError(
            f"{path} is incomplete: {missing[0]} is missing ({len(missing)} of {len(chosen)} weight files)"
        )
    return [path / name for name in chosen]


def choose(names: Sequence[str], place: str) -> list[str]:
    """Which of a directory's files to read: safetensors before .bin before .pth, all shards of a set.

    Names in folders are ignored. Raises ValueError when there is nothing to read, a shard is missing, or several
    files could be meant.
    """
    top = sorted(name for name in names if "/" not in name)
    for ending in (".safetensors", ".bin", ".pth"):
        shards = [match for name in top if (match := _SHARD.fullmatch(name)) and match["ending"] == ending]
        whole = {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin"}.get(ending)
        if whole in top:
            return [whole]
        if shards and len({(match["stem"], match["count"]) for match in shards}) == 1:
            first = shards[0]
            wanted = range(1, int(first["count"]) + 1)
            wanted_names = [f"{first['stem']}-{n:05d}-of-{first['count']}{ending}" for n in wanted]
            missing = [name for name in wanted_names if name not in top]
            if missing:
                raise ValueError(
                    f"{place} is incomplete: {missing[0]} is missing ({len(missing)} of {len(wanted)} shards)"
                )
            return wanted_names
        single = [
            name for name in top if name.endswith(ending) and (ending != ".bin" or name.startswith("pytorch_model"))
        ]
        if len(single) > 1:
            listed = ", ".join(single[:8]) + (f" and {len(single) - 8} more" if len(single) > 8 else "")
            raise ValueError(f"{place} holds several models: name one, e.g. {place}/{single[0]}; there are {listed}")
        if single:
            return single
    raise ValueError(f"{place} holds no weights: expected .safetensors, pytorch_model*.bin or .pth files")


def _is_weights(name: str) -> bool:
    return name.endswith((".pth", ".safetensors", ".bin"))


def _indexed(index: Path) -> list[str]:
    try:
        document = cast("dict[str, dict[str, str]]", json.loads(index.read_bytes()))
        names = sorted({str(name) for name in document["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of shards: {error}") from error
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{index} names files outside its directory")
    return names


def _read_file(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        head = file.read(64)
    refuse_magic(head, path)
    return _read_torch(path, mapped=True) if head.startswith(b"PK") else _read_other(path, head)


def _read_other(path: Path, head: bytes) -> dict[str, Tensor]:
    if head.startswith(b"\x80"):  # a bare pickle: torch.save before 1.6, which cannot be mapped
        return _read_torch(path, mapped=False)
    if head[8:9] == b"{":
        return _read_safetensors(path)
    raise ValueError(f"{path} is neither a .pth nor a .safetensors file, or its beginning is damaged")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        opened: Any = safe_open(path, "pt")  # the package gives no types for it
        with opened as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path} is truncated or corrupt: {error}; get it again") from error


def _read_torch(path: Path, *, mapped: bool) -> dict[str, Tensor]:
    try:
        found: object = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise ValueError(f"{path} holds Python objects, which can run code; only plain tensors are read") from error
        raise ValueError(f"{path} is truncated or corrupt: {reason[:120]}; get it again") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise anything; all of it means the same
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is truncated or corrupt: {reason[:120]}; get it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; a checkpoint is a dict of names to tensors")
    entries = cast("dict[object, object]", found)
    refuse_keys([str(name) for name in entries], str(path))
    weights: dict[str, Tensor] = {}
    for name, value in entries.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: {name!r} is a {type(name).__name__}: names of tensors must be text")
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: {name!r} is a {type(value).__name__}, not a tensor: this is a trainer's own checkpoint, not a"
                " file of weights; export the weights first"
            )
        weights[name] = value
    return weights
