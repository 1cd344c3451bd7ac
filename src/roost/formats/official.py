"""The official dialect, the flat state dict of RWKV-LM: which generation a file is, its sizes, and exact upgrades.

The whole key set decides the version, shapes decide every size, and the name decides what the bonus means:
`time_first` of an RWKV-5 file is exp'd, `time_faaaa` is raw. 5.0 and 5.1 have one decay and one bonus per head;
repeating them over the head's channels is exact, so they run as Eagle (5.0 without a gate).

Owns: these rules and "every key is used exactly once".
Refuses to know: files, and foreign names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from roost.config import Generation, ModelConfig
from roost.formats.refusals import refuse_keys

Version = Literal["4", "5.0", "5.1", "5.2", "6"]
LABELS: dict[Version, str] = {
    "4": "RWKV-4 (Dove)",
    "5.0": "RWKV-5.0",
    "5.1": "RWKV-5.1",
    "5.2": "RWKV-5.2 (Eagle)",
    "6": "RWKV-6 (Finch)",
}
SHOWN = 8
"""Keys listed in an error before "and N more"."""

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_NEEDED: dict[Version, tuple[str, ...]] = {
    "4": ("att.key.weight", "ffn.key.weight"),
    "5.0": ("att.key.weight", "ffn.key.weight", "att.time_decay"),
    "5.1": ("att.key.weight", "ffn.key.weight", "att.time_decay"),
    "5.2": ("att.key.weight", "ffn.key.weight", "att.time_decay"),
    "6": ("att.key.weight", "ffn.key.weight", "att.time_faaaa", "att.time_maa_w1", "att.time_decay_w1"),
}


def strip_prefixes(weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Names without `_forward_module.` (DeepSpeed) and `model.` (RWKV-PEFT; fla's `model.layers.` is no prefix)."""
    out: dict[str, Tensor] = {}
    fla = any(name.startswith("model.layers.") for name in weights)
    for name, value in weights.items():
        short = name.removeprefix("_forward_module.")
        short = short if fla else short.removeprefix("model.")
        if short in out:
            raise ValueError(f"{where}: {short} is there twice, with and without a prefix")
        out[short] = value
    return out


def version_of(weights: Mapping[str, Tensor], where: str = "the checkpoint") -> Version:
    """The version of official weights, from all keys at once. Raises ValueError for other networks, naming them."""
    refuse_keys(weights, where)
    parts = {match[2]: name for name in weights if (match := _BLOCK.fullmatch(name))}
    if not any(part.startswith(("att.", "ffn.")) for part in parts):
        names = ", ".join(list(weights)[:3])
        raise ValueError(
            f"{where} is not an RWKV checkpoint: it has no blocks.N.att tensors, but {names};"
            " load it with the library that wrote it"
        )
    if any(part.startswith("att.time_maa") for part in parts):
        return "6"
    if not any(part.startswith(("att.ln_x", "att.gate", "att.time_mix_g", "att.time_faaaa")) for part in parts):
        return "4"
    if any(name.endswith("att.time_first") and not _per_head(value) for name, value in weights.items()):
        raise ValueError(
            f"{where} is a web-rwkv (.st) file (an RWKV-5 with time_first per channel, which is raw there and exp'd"
            " elsewhere): load the original .pth"
        )
    if not any(part.startswith(("att.gate", "att.time_mix_g")) for part in parts):
        return "5.0"
    decays = [value for name, value in weights.items() if name.endswith("att.time_decay")]
    return "5.1" if decays and all(_per_head(value) for value in decays) else "5.2"


def version_for(config: ModelConfig) -> Version:
    """The version that a network of these sizes runs as; 5.1 runs as 5.2."""
    if config.generation == "eagle":
        return "5.2" if config.gate else "5.0"
    return "4" if config.generation == "dove" else "6"


def config_of(weights: Mapping[str, Tensor], version: Version, where: str = "the checkpoint") -> ModelConfig:
    """Every size, from shapes alone. Raises ValueError when a tensor that decides a size is missing or impossible."""
    embedding = weights.get("emb.weight")
    if embedding is None or embedding.dim() != 2 or not embedding.numel():
        raise ValueError(f"{where} does not fit {LABELS[version]}: emb.weight is missing, empty or not a matrix")
    layers = sorted({int(match[1]) for name in weights if (match := _BLOCK.fullmatch(name))})
    if layers != list(range(len(layers))):
        gap = next(n for n, layer in enumerate(layers) if n != layer)
        raise ValueError(
            f"{where} does not fit {LABELS[version]}: missing blocks.{gap}, although blocks.{layers[-1]} is there"
        )
    absent = [f"blocks.N.{part}" for part in _NEEDED[version] if _usual_shape(weights, part) is None]
    if absent:
        raise ValueError(f"{where} does not fit {LABELS[version]}: missing {', '.join(absent)}")

    def size(part: str, axis: int) -> int:
        shape = _usual_shape(weights, part) or ()
        if not -len(shape) <= axis < len(shape) or shape[axis] == 0:
            raise ValueError(f"{where}: blocks.N.{part} has the impossible shape {list(shape)}")
        return shape[axis]

    generation: Generation = "dove" if version == "4" else "finch" if version == "6" else "eagle"
    A = size("att.key.weight", 0)
    heads = 1 if version == "4" else size("att.time_faaaa" if version == "6" else "att.time_decay", 0)
    try:
        return ModelConfig(
            generation,
            len(layers),
            embedding.shape[1],
            vocab_size=embedding.shape[0],
            dim_att=A,
            dim_ffn=size("ffn.key.weight", 0),
            head_size=64 if version == "4" else A // heads,
            shift_rank=max(1, size("att.time_maa_w1", 1) // 5) if version == "6" else 0,
            decay_rank=size("att.time_decay_w1", 1) if version == "6" else 0,
            gate=version != "5.0",
            time_state=any(name.endswith("att.time_state") for name in weights),
        )
    except ValueError as error:
        raise ValueError(f"{where} has impossible sizes: {error}") from error


def upgrade(weights: Mapping[str, Tensor], version: Version, config: ModelConfig) -> dict[str, Tensor]:
    """5.0 and 5.1 with decay and bonus of shape [h, N], the bonus raw and named time_faaaa; the rest as it is.

    exp(time_first) is computed and kept in fp32, because rounding it to the file's dtype would change the model.
    """
    if version not in ("5.0", "5.1"):
        return dict(weights)
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.endswith("att.time_first"):
            name, value = name.replace("time_first", "time_faaaa"), torch.exp(value.float())
        if name.endswith(("att.time_decay", "att.time_faaaa")) and _per_head(value):
            value = value.reshape(-1, 1).expand(-1, config.head_size).contiguous()
        out[name] = value
    return out


def check(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], version: Version, where: str) -> None:
    """Raise ValueError listing missing, unknown and wrong-shaped tensors unless names and shapes equal `expected`."""
    missing = [name for name in expected if name not in weights]
    extra = [name for name in weights if name not in expected]
    wrong = [
        f"{name} {list(weights[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    problems = [
        f"{what} {', '.join(names[:SHOWN])}"
        + (f" and {len(names) - SHOWN} more ({len(names)} in all)" if len(names) > SHOWN else "")
        for what, names in (("missing", missing), ("unknown", extra), ("wrong shape:", wrong))
        if names
    ]
    if problems:
        raise ValueError(f"{where} does not fit {LABELS[version]}: {'; '.join(problems)}")


def _per_head(value: Tensor) -> bool:
    return value.dim() == 1 or (value.dim() == 2 and value.shape[1] == 1)


def _usual_shape(weights: Mapping[str, Tensor], part: str) -> tuple[int, ...] | None:
    """The shape that most blocks have, so that one damaged tensor is the one that gets listed."""
    shapes = Counter(
        tuple(value.shape) for name, value in weights.items() if (match := _BLOCK.fullmatch(name)) and match[2] == part
    )
    return shapes.most_common(1)[0][0] if shapes else None
