"""Packed models, `.roost`: every matrix in the panels that the native model reads, ready to be mapped into memory.

Owns: the layout of the file, little endian:

    b"roost\\r\\n\\x1a", u32 version 1, u32 length of the header, first 8 bytes of its SHA-256, the header: JSON
    from 2 MiB on: the tensors in the header's order, each at the next multiple of 4096, each with a 64-bit checksum

Config and kinds decide every name, shape, size and offset, so a header that says anything else is damaged.
Refuses to know: what becomes of each tensor (slots.py), how matrices are laid out (panels.py), and how models run.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from roost import native
from roost.checks import choice, instance
from roost.config import ModelConfig, check_config
from roost.files import clear_abandoned, replacing
from roost.formats import storage
from roost.formats.panels import checksum, file_checksums, pack_matrix
from roost.formats.slots import Slot, WeightsFormat, skeleton, slots
from roost.models.native import PackedTensor
from roost.models.rwkv import fingerprint_of
from roost.native import KINDS

ENDING = ".roost"

_MAGIC = b"roost\r\n\x1a"
_VERSION = 1
_HEAD = struct.Struct("<8sII8s")
_FIRST, _ALIGN = 2 << 20, 4096

Source = dict[str, list[int]]
"""Of every file of a checkpoint, by name: bytes, and nanoseconds of the last change."""


@dataclass(frozen=True)
class Packed:
    """A packed model: numbers of the network, its fingerprint, the weights' format, the tensors, and its source.

    source  what `source_of` said of the checkpoint it was made from, or None
    """

    path: Path
    config: ModelConfig
    fingerprint: str
    weights: WeightsFormat
    tensors: dict[str, PackedTensor]
    source: Source | None


def format_of(path: str | os.PathLike[str], asked: str | None = None) -> WeightsFormat:
    """The format that is asked for, or that a name like `model.int8.roost` says.

    Raises ValueError for a name without one where none is asked for, and for a name that says another.
    """
    named = Path(path).stem.rpartition(".")[2]
    if named not in get_args(WeightsFormat):
        if asked is not None:
            return cast(WeightsFormat, asked)
        raise ValueError(
            f"{path}: say which weights, in the name (such as {Path(path).stem}.int8{ENDING}) or with --weights"
            f" (weights_format): {', '.join(get_args(WeightsFormat))}"
        )
    if asked not in (None, named):
        raise ValueError(f"{path} is the name of {named} weights, and {asked} are asked for: choose one of them")
    return cast(WeightsFormat, named)


def source_of(path: str | os.PathLike[str]) -> Source:
    """What tells whether a checkpoint is still the one a packed model was made from.

    Neither inode nor time of the inode's change: a directory that is copied whole keeps its packed models.
    """
    found = {file.name: file.stat() for file in storage.files(Path(path))}
    return {name: [one.st_size, one.st_mtime_ns] for name, one in found.items()}


def pack(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    path: str | os.PathLike[str],
    *,
    weights_format: WeightsFormat,
    source: Source | None = None,
    threads: int = 1,
) -> Path:
    """Write a packed model and return its path; a file is there whole or not at all, and one tensor at a time is made.

    weights  the state dict of an Eagle or Finch of this config, any float dtype, on the CPU
    source   from `source_of`, so that a cache can be told to be out of date

    Raises ValueError for Dove, for weights that do not fit the config, for NaN and infinity (naming the tensor), and
    without the native library.
    """
    choice("weights_format", weights_format, get_args(WeightsFormat))
    check_config(config)
    if config.generation == "dove":
        raise ValueError(f"cannot write {path}: only Eagle and Finch are packed, this is RWKV-4 (Dove)")
    native.library()
    expected = skeleton(config)
    wrong = [name for name in expected if name not in weights or weights[name].shape != expected[name].shape]
    wrong += [name for name in weights if name not in expected]
    if wrong:
        raise ValueError(
            f"cannot write {path}: {wrong[0]} is missing, unknown or of another shape than the config says"
        )
    plan = slots(config, weights_format)
    entries: list[dict[str, Any]] = []
    clear_abandoned(Path(path).parent)
    with replacing(path) as temporary, temporary.open("wb") as file:
        for slot in plan:
            kind, data = _packed(slot, slot.values(weights), threads)
            offset = _next(entries)
            file.seek(offset)
            file.write(memoryview(cast(Any, data)))
            entries.append({"name": slot.name, "kind": kind, "shape": slot.shape, "offset": offset})
            entries[-1] |= {"nbytes": data.nbytes, "checksum": f"{checksum(data):016x}"}
        document = {"config": asdict(config), "weights": weights_format, "fingerprint": fingerprint_of(config, weights)}
        header = json.dumps(document | {"source": source, "tensors": entries}).encode()
        assert len(header) <= _FIRST - _HEAD.size
        file.seek(0)
        file.write(_HEAD.pack(_MAGIC, _VERSION, len(header), hashlib.sha256(header).digest()[:8]) + header)
    return Path(path)


def _next(entries: list[dict[str, Any]]) -> int:
    """Where the tensor after these begins."""
    end = entries[-1]["offset"] + entries[-1]["nbytes"] if entries else _FIRST
    return -(-end // _ALIGN) * _ALIGN


def _packed(slot: Slot, value: Tensor, threads: int) -> tuple[str, NDArray[Any]]:
    kind = slot.kinds[0]
    if len(slot.kinds) > 1 and not bool((value.to(torch.bfloat16).to(value.dtype) == value).all()):
        kind = slot.kinds[1]
    if kind in KINDS:
        try:
            return kind, pack_matrix(kind, value, threads=threads)
        except ValueError as error:
            raise ValueError(f"{slot.name} cannot be packed as {kind}: {error}") from error
    value = value.detach().to(torch.bfloat16 if kind == "rows16" else torch.float32).contiguous()
    if not all(one.isfinite() for one in value.aminmax()):
        raise ValueError(f"{slot.name} cannot be packed as {kind}: it holds NaN, infinity or a number too large")
    return kind, (value.view(torch.int16) if kind == "rows16" else value).numpy()


def open_packed(path: str | os.PathLike[str], *, verify: bool = True, threads: int = 1) -> Packed:
    """Map a packed model into memory, read-only: processes share it, and nothing is read before it is used.

    verify  compare every tensor with its checksum first (the whole file is read, but not kept); False trusts the disk

    The file may be replaced while it is open, but not overwritten in place. Raises ValueError for a file that is not a
    packed model, of another version, truncated or damaged, naming what is wrong, and without the native library.
    """
    native.library()
    where = Path(path)
    with _opened(where) as file:
        document, plan = _read_header(file, where)
        entries: list[dict[str, Any]] = document["tensors"]
        if verify:
            offsets, sizes = ([entry[key] for entry in entries] for key in ("offset", "nbytes"))
            found = file_checksums(file.fileno(), offsets, sizes, threads=threads)
            pairs = zip(entries, found, strict=True)
            bad = [entry["name"] for entry, one in pairs if entry["checksum"] != f"{one:016x}"]
            if bad:
                raise ValueError(f"{where} is damaged: {bad[0]} does not match its checksum; make the file again")
        mapped = np.memmap(file, np.uint8, "r")
    tensors: dict[str, PackedTensor] = {}
    for slot, entry in zip(plan, entries, strict=True):
        data: NDArray[Any] = mapped[entry["offset"] : entry["offset"] + entry["nbytes"]].view(np.ndarray)
        if entry["kind"] not in KINDS:
            data = data.view(np.uint16 if entry["kind"] == "rows16" else np.float32).reshape(slot.shape)
        tensors[slot.name] = PackedTensor(entry["kind"], slot.shape, data)
    config = ModelConfig(**document["config"])
    return Packed(where, config, document["fingerprint"], document["weights"], tensors, document["source"])


@dataclass(frozen=True)
class Summary:
    """What a packed model is, without its numbers; `numbers` counts them by kind."""

    config: ModelConfig
    weights: WeightsFormat
    fingerprint: str
    source: Source | None
    numbers: dict[str, int]


def summary(path: str | os.PathLike[str]) -> Summary:
    """Read and check the header alone; errors as `open_packed`, but no native library is needed."""
    with _opened(Path(path)) as file:
        document, plan = _read_header(file, Path(path))
    numbers: dict[str, int] = {}
    for slot, entry in zip(plan, document["tensors"], strict=True):
        numbers[entry["kind"]] = numbers.get(entry["kind"], 0) + int(np.prod(slot.shape, dtype=np.int64))
    config = ModelConfig(**document["config"])
    return Summary(config, document["weights"], document["fingerprint"], document["source"], numbers)


def replaceable(path: Path) -> bool:
    """Whether a file is a mere copy, to be made again: a packed model with a source, or one damaged beyond saying.

    False for what lacks the first bytes of a packed model, is of a newer version, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD.size)
            if len(head) < _HEAD.size:
                return head.startswith(_MAGIC)
            magic, version, length, digest = _HEAD.unpack(head)
            if magic != _MAGIC or version > _VERSION:
                return False
            header = file.read(length) if length <= _FIRST - _HEAD.size else b""
            if hashlib.sha256(header).digest()[:8] != digest:
                return True
            document = json.loads(header)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and cast("dict[str, object]", document).get("source") is not None


def _opened(path: Path) -> BinaryIO:
    if not path.is_file():
        raise ValueError(f"{path} is a directory" if path.is_dir() else f"no such file: {path}")
    return path.open("rb")


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], list[Slot]]:
    """The header of a file that is whole, checked against the config that it holds."""
    head, size = file.read(_HEAD.size), os.fstat(file.fileno()).st_size
    if not head.startswith(_MAGIC):
        raise ValueError(f"{path} is not a packed model; make one with: roost convert MODEL NAME.int8{ENDING}")
    if len(head) < _HEAD.size:
        raise ValueError(f"{path} is truncated: {size:,} bytes; make the file again")
    _, version, length, digest = _HEAD.unpack(head)
    if version != _VERSION:
        raise ValueError(f"{path} has version {version}, this roost reads version {_VERSION}; make the file again")
    header = file.read(length) if length <= _FIRST - _HEAD.size else b""
    if len(header) != length or hashlib.sha256(header).digest()[:8] != digest:
        raise ValueError(f"{path} is truncated or its header is damaged; make the file again")
    try:
        document: Any = json.loads(header)
        plan = _checked(document)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} has an impossible header ({error or type(error).__name__}); make it again") from error
    end = document["tensors"][-1]["offset"] + document["tensors"][-1]["nbytes"]
    if size != end:
        what = "truncated" if size < end else "too long"
        raise ValueError(f"{path} is {what}: {size:,} bytes instead of {end:,}; make the file again")
    return document, plan


def _checked(document: Any) -> list[Slot]:
    """The slots that a header describes. Raises anything for a header that is not exactly what `pack` writes."""
    instance("the header", document, dict)
    entries = cast("list[dict[str, Any]]", document["tensors"])
    config = ModelConfig(**document["config"])
    check_config(config)
    choice("weights", document["weights"], get_args(WeightsFormat))
    instance("fingerprint", document["fingerprint"], str)
    if config.generation == "dove" or config.n_layer > len(entries):
        raise ValueError("its config is no Eagle or Finch, or has more layers than tensors")
    if json.dumps(document["config"]) != json.dumps(asdict(config)):  # such as a 0 that stands for a default
        raise ValueError("its config is not written out")
    if not (document["source"] is None or _is_source(document["source"])):
        raise ValueError(f"source is {document['source']!r}")
    plan = slots(config, document["weights"])
    if len(plan) != len(entries):
        raise ValueError(f"it names {len(entries)} tensors instead of {len(plan)}")
    for slot, entry, offset in zip(plan, entries, _offsets(entries), strict=True):
        choice(f"kind of {slot.name}", entry["kind"], slot.kinds)
        found = (entry["name"], tuple(entry["shape"]), entry["offset"], entry["nbytes"], type(entry["checksum"]))
        wanted = (slot.name, slot.shape, offset, slot.nbytes(entry["kind"]), str)
        if found != wanted or {type(entry["offset"]), type(entry["nbytes"])} != {int}:
            raise ValueError(f"{slot.name} is described by {found[:4]} instead of {wanted[:4]}")
    return plan


def _is_source(value: Any) -> bool:
    files = list(value.values()) if isinstance(value, dict) else []
    return bool(files) and all(isinstance(one, list) and [type(x) for x in one] == [int, int] for one in files)


def _offsets(entries: list[dict[str, Any]]) -> Iterator[int]:
    """Where each tensor has to begin, given the sizes of those before it."""
    for i in range(len(entries)):
        yield _next(entries[max(0, i - 1) : i])
