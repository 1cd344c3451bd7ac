"""`roost.load`: one name, two ways to run it: torch, or the native CPU model over packed weights.

Owns: which backend a call means, and the packed file that is kept beside a checkpoint, made once and made again when
the checkpoint changes.
Refuses to know: how checkpoints are read (checkpoint), what is in a packed file (formats.packed), and how models run.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from roost import checkpoint
from roost.checks import choice, usable_device, whole
from roost.formats import packed
from roost.formats.locate import ASSETS, resolve
from roost.formats.packed import Packed
from roost.formats.slots import WeightsFormat
from roost.models.native import NativeModel
from roost.models.rwkv import RWKV
from roost.native import MOST_THREADS
from roost.tokenizer import WorldTokenizer

Backend = Literal["torch", "native"]


@overload
def load(
    x: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    backend: Literal["torch"] | None = None,
    endpoint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[RWKV, WorldTokenizer | None]: ...


@overload
def load(
    x: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    backend: Literal["native"],
    weights: WeightsFormat | None = None,
    threads: int | None = None,
    keep: bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[NativeModel, WorldTokenizer | None]: ...


def load(
    x: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    backend: Backend | None = None,
    weights: WeightsFormat | None = None,
    threads: int | None = None,
    keep: bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[RWKV | NativeModel, WorldTokenizer | None]:
    """A model and its tokenizer from a path or a name; with backend "native" the CPU model over packed weights.

    x        as in `roost.checkpoint.load`: .pth, .safetensors, .gguf, a directory, a model that ships, a hub name; or a
             packed .roost file, which is always native
    device, dtype   torch: where and in which dtype; the native model is on the CPU, its dtypes follow from `weights`
    backend  "torch" (None: the same, but for .roost files) or "native"
    weights  native: "fp32" (exact), "bf16" (default), "int8" or "int4"
    threads  native: 1 to 256, by default torch's number; results do not depend on it
    keep     native: keep the packed file beside the checkpoint (model.pth -> model.int8.roost) and use it again; the
             default, but for models that ship. False, a directory that cannot be written and another's file of that
             name: a temporary file, gone afterwards. A .roost file is used as it is, whatever `keep` says

    Raises ValueError for what cannot be loaded, for arguments of the other backend, and for "native" without the native
    library.
    """
    path = resolve(x, endpoint, cache_dir)
    is_packed = path.suffix == packed.ENDING and not path.is_dir()
    if backend is not None:
        choice("backend", backend, get_args(Backend))
    if backend == "torch" and is_packed:
        raise ValueError(
            f"{path} is packed for the native model; load the checkpoint it was made from, or drop backend"
        )
    if not is_packed and backend != "native":
        if weights is not None or threads is not None or keep is not None:
            raise ValueError("weights, threads and keep belong to the native model: add backend='native'")
        return checkpoint.load(x, device, dtype, endpoint=endpoint, cache_dir=cache_dir)
    if usable_device(device).type != "cpu":
        raise ValueError(f"device is {device}; the native model runs on the CPU only")
    if dtype is not None:
        raise ValueError(f"dtype is {dtype}; the native model takes weights={weights or 'bf16'!r} in its place")
    if weights is not None:
        choice("weights", weights, get_args(WeightsFormat))
    threads = (
        min(torch.get_num_threads(), MOST_THREADS) if threads is None else whole("threads", threads, 1, MOST_THREADS)
    )
    if is_packed:
        opened = packed.open_packed(path, threads=threads)
        if weights not in (None, opened.weights):
            raise ValueError(f"{path} holds {opened.weights} weights, not {weights}: pack the checkpoint again")
        tokenizer = checkpoint.tokenizer_of(opened.config.vocab_size)
    else:
        opened, tokenizer = _from_checkpoint(path, weights or "bf16", threads, keep is not False)
    model = NativeModel(
        opened.config, opened.tensors, fingerprint=opened.fingerprint, weights=opened.weights, threads=threads
    )
    return model, tokenizer


def _from_checkpoint(
    path: Path, weights: WeightsFormat, threads: int, keep: bool
) -> tuple[Packed, WorldTokenizer | None]:
    """The packed form of a checkpoint: the file kept beside it when it is still right, else made now."""
    stem = (
        path / path.resolve().name if path.is_dir() else path.with_suffix("" if path.suffix == ".pth" else path.suffix)
    )
    kept = stem.with_name(f"{stem.name}.{weights}{packed.ENDING}")
    keep = keep and path.parent != ASSETS
    source = packed.source_of(path)
    if keep and os.path.lexists(kept):
        with suppress(ValueError, OSError):  # damaged, unreadable, of another version
            opened = packed.open_packed(kept, threads=threads)
            if opened.source == source and opened.weights == weights:
                return opened, checkpoint.tokenizer_of(opened.config.vocab_size, path)
        keep = kept.is_file() and packed.replaceable(kept)
    model, tokenizer = checkpoint.load(path)
    values: Mapping[str, Tensor] = model.state_dict()
    if keep:
        with suppress(OSError):  # a directory that is read-only or a disk that is full: a copy is a convenience
            packed.pack(values, model.config, kept, weights_format=weights, source=source, threads=threads)
            return packed.open_packed(kept, verify=False, threads=threads), tokenizer
    with tempfile.TemporaryDirectory(prefix="roost-") as place:  # the mapping outlives the name
        file = Path(place) / f"model.{weights}{packed.ENDING}"
        packed.pack(values, model.config, file, weights_format=weights, source=source, threads=threads)
        return packed.open_packed(file, verify=False, threads=threads), tokenizer
