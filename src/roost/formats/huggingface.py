"""The Hugging Face dialects rwkv (4), rwkv5 (5.2) and rwkv6 (6): other names, the same tensors.

    rwkv.embeddings                       emb
    rwkv.blocks.0.pre_ln                  blocks.0.ln0
    rwkv.blocks.L.attention, feed_forward blocks.L.att, ffn
    time_mix_key, _value, ..              time_mix_k, _v, ..          (4 and 5; the names of 6 are the official ones)

Owns: this renaming in both directions, the directory that is written, its config.json, what that cannot express, and
the check for weights that were saved after the halving those classes do in place.
Refuses to know: how official weights are checked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from roost.config import ModelConfig
from roost.files import replacing
from roost.formats import storage
from roost.models.rwkv import save_weights

RESCALE_EVERY = 6
_MIX = {"key": "k", "value": "v", "receptance": "r", "gate": "g"}
_NAMES = ((".attention.", ".att."), (".feed_forward.", ".ffn."), (".pre_ln.", ".ln0."))


def is_huggingface(names: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of the rwkv, rwkv5 and rwkv6 classes."""
    return any(name.startswith("rwkv.blocks.") for name in names)


def to_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names for Hugging Face ones; a name without a counterpart stays and is refused later.

    `time_decay` of the rwkv6 class may be [h, N], as its own initialisation makes it; it becomes [1, 1, A].
    """
    out: dict[str, Tensor] = {}
    six = any(name.endswith("time_maa_x") for name in weights)
    for name, value in weights.items():
        short = name.removeprefix("rwkv.").replace("embeddings.", "emb.", 1)
        for theirs, ours in _NAMES:
            short = short.replace(theirs, ours)
        if match := re.fullmatch(r"(.*\.time_mix_)(key|value|receptance|gate)", short):
            short = match[1] + _MIX[match[2]]
        out[short] = value.reshape(1, 1, -1) if six and short.endswith("time_decay") else value
    return out


def from_official(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face names for official ones. Raises ValueError when those classes cannot express the model."""
    refuse_inexpressible(config)
    long = {letter: name for name, letter in _MIX.items()}
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        for theirs, ours in _NAMES:
            name = name.replace(ours, theirs)
        if match := re.fullmatch(r"(.*\.time_mix_)([kvrg])", name):
            name = match[1] + long[match[2]]
        name = name if name.startswith("head.") else "rwkv." + name.replace("emb.", "embeddings.", 1)
        out[name] = value
    return out


def refuse_inexpressible(config: ModelConfig) -> None:
    """Raise ValueError when the rwkv5 or rwkv6 class would build a network of other sizes than these."""
    D = config.n_embd
    problems: list[str] = []
    if not config.gate:
        problems.append("it has no gate (RWKV-5.0)")
    if config.time_state:
        problems.append("it has a tuned initial state (time_state)")
    if config.generation != "dove" and config.dim_ffn != 7 * D // 64 * 32:
        problems.append(f"dim_ffn is {config.dim_ffn}, the class always takes {7 * D // 64 * 32}")
    ranks = (64, 128) if D == 4096 else (32, 64)
    if config.generation == "finch" and (config.shift_rank, config.decay_rank) != ranks:
        problems.append(f"the ranks are {config.shift_rank} and {config.decay_rank}, the class always takes {ranks}")
    if problems:
        raise ValueError(
            f"the Hugging Face class cannot express this model: {'; '.join(problems)}. Write .pth or"
            " .safetensors instead"
        )


def config_json(config: ModelConfig, dtype: torch.dtype) -> dict[str, object]:
    """The config.json of the exported model (without auto_map: the remote code is not part of this project)."""
    kind = {"dove": "rwkv", "eagle": "rwkv5", "finch": "rwkv6"}[config.generation]
    heads = {} if config.generation == "dove" else {"head_size": config.head_size, "head_size_divisor": 8}
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "attention_hidden_size": config.dim_att,
        **heads,
        "num_hidden_layers": config.n_layer,
        "intermediate_size": config.dim_ffn if config.generation == "dove" else None,
        "layer_norm_epsilon": 1e-5,
        "rescale_every": RESCALE_EVERY,
        "context_length": 4096,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def looks_rescaled(weights: Mapping[str, Tensor], n_layer: int) -> bool:
    """Whether official weights look halved every 6 layers, as the classes leave them after generating in 16 bits.

    Compares sizes of att.output and ffn.value: a step of about 2 at every sixth layer and next to none elsewhere. 64
    rows of each matrix are read. A model of fewer than 7 layers is never rescaled.
    """
    if n_layer <= RESCALE_EVERY:
        return False
    steps: dict[bool, list[float]] = {True: [], False: []}
    for part in ("att.output.weight", "ffn.value.weight"):
        sizes = [float(weights[f"blocks.{layer}.{part}"][:64].float().square().mean()) for layer in range(n_layer)]
        if min(sizes) == 0.0:
            return False
        for layer in range(1, n_layer):
            step = 0.5 * math.log2(sizes[layer - 1] / sizes[layer])
            steps[layer % RESCALE_EVERY == 0].append(step)
    return min(steps[True]) > 0.5 and max(steps[True]) < 1.5 and abs(median(steps[False])) < 0.25


def save(config: ModelConfig, weights: Mapping[str, Tensor], path: Path) -> None:
    """Write official weights as a directory: Hugging Face names in model.safetensors, and config.json.

    Raises ValueError when the directory cannot be made or already holds another model.
    """
    renamed = from_official(config, weights)
    document = json.dumps(config_json(config, weights["emb.weight"].dtype), indent=2) + "\n"
    if path.is_dir():
        ours = {"model.safetensors", "config.json"}
        other = sorted(
            p.name for p in path.iterdir() if p.name not in ours and p.suffix in (*storage.ENDINGS, ".bin", ".json")
        )
        if other:
            raise ValueError(f"{path} already holds {other[0]}: give a new directory, so that two models do not mix")
    elif not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: the directory {path.parent} does not exist")
    path.mkdir(exist_ok=True)
    save_weights(renamed, path / "model.safetensors")
    with replacing(path / "config.json") as temporary:
        temporary.write_text(document, encoding="utf-8")
