"""GGUF files of llama.cpp, arch rwkv6: Finch under other names, and Eagle as the Finch that it equals.

    blocks.L.att.receptance, key, value, gate, output     blk.L.time_mix_*
    blocks.L.att.time_maa_w1 [D, 5 Rm], _w2 [5, Rm, D]    blk.L.time_mix_w1, _w2: last two axes swapped
    blocks.L.att.time_decay_w1 [D, Rd], _w2 [Rd, A]       blk.L.time_mix_decay_w1, _w2: transposed
    blocks.L.att.time_maa_{w,k,v,r,g}                     blk.L.time_mix_lerp_fused [5, 1, 1, D]; older: one by one
    blocks.L.ffn.*                                        blk.L.channel_mix_*

A file with rescale_every_n_layers = r > 0 holds output and value of layer L divided by 2^(L // r), because llama.cpp
then halves the residual every r layers. That is undone here, and r = 0 is written. llama.cpp keeps vectors, the bonus
and the low-rank matrices in fp32; so do files written here. Embedding and head of a q4_0 file are q8_0.

Owns: these names, shapes and kinds, the keys that llama.cpp needs, and the vocabulary's form in such a file.
Refuses to know: the bytes of the file (container, ggml), and how official weights are checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from roost.config import ModelConfig
from roost.formats.container import MAGIC, Container, Stored, Value, write
from roost.formats.ggml import FLOATS, KINDS
from roost.models.rwkv import LAYER_NORM_EPS
from roost.tokenizer import WorldTokenizer

Quantised = Literal["q8_0", "q4_0"]
"""The kinds with blocks that can be written."""
QUANTISED: tuple[Quantised, ...] = get_args(Quantised)
ENDING = ".gguf"

_WHOLE = {"emb": "token_embd", "blocks.0.ln0": "token_embd_norm", "ln_out": "output_norm", "head": "output"}
_PARTS = {
    "ln1": "attn_norm",
    "ln2": "attn_norm_2",
    "att.ln_x": "time_mix_ln",
    "att.time_maa_x": "time_mix_lerp_x",
    "att.time_maa_w1": "time_mix_w1",
    "att.time_maa_w2": "time_mix_w2",
    "att.time_faaaa": "time_mix_first",
    "att.time_decay": "time_mix_decay",
    "att.time_decay_w1": "time_mix_decay_w1",
    "att.time_decay_w2": "time_mix_decay_w2",
    "ffn.time_maa_k": "channel_mix_lerp_k",
    "ffn.time_maa_r": "channel_mix_lerp_r",
    **{f"att.time_maa_{x}": f"time_mix_lerp_{x}" for x in "wkvrg"},
    **{f"att.{x}": f"time_mix_{x}" for x in ("receptance", "key", "value", "gate", "output")},
    **{f"ffn.{x}": f"channel_mix_{x}" for x in ("receptance", "key", "value")},
}
_OURS = {theirs: ours for ours, theirs in _PARTS.items()}
_FUSED = "time_mix_lerp_fused"
_TURNED = re.compile(r".*\.time_(maa|decay)_w[12]")
_VECTOR = re.compile(r".*\.(att\.time_(maa_[xwkvrg]|decay)|ffn\.time_maa_[kr])")  # [1, 1, n] here, [n] there
_SCALED = re.compile(r"blocks\.(\d+)\.(att\.output|ffn\.value)\.weight")
_FILE_TYPES = {"fp32": 0, "fp16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
_ESCAPE = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5  # kinds of tokens


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


class GGUF:
    """An open GGUF file of arch rwkv6; `weights` are official names. Raises ValueError for any other."""

    def __init__(self, path: Path) -> None:
        self.file = Container(path)
        self.where = str(path)
        arch = self.file.keys.get("general.architecture")
        if arch != "rwkv6":
            hint = "roost does not run RWKV-7" if arch == "rwkv7" else "run it with llama.cpp"
            raise ValueError(f"{path} is a GGUF file of {str(arch)[:40]!r}, and only rwkv6 is read; {hint}")
        if self.file.keys.get("split.count", 1) not in (0, 1):
            raise ValueError(f"{path} is one part of several: join them with llama-gguf-split --merge")
        eps = self.file.keys.get("rwkv6.attention.layer_norm_epsilon", LAYER_NORM_EPS)
        if not isinstance(eps, float) or abs(eps - LAYER_NORM_EPS) > 1e-9:
            raise ValueError(f"{path} wants a layer norm eps of {eps!r}; RWKV-6 has {LAYER_NORM_EPS}")
        rescale: object = self.file.keys.get("rwkv6.rescale_every_n_layers", 0)
        if not isinstance(rescale, int) or not 0 <= rescale < 1 << 16:
            raise ValueError(f"{path}: rescale_every_n_layers is {rescale!r}; it must be 0 or a number of layers")
        self.rescale: int = rescale

    def shapes(self) -> dict[str, Tensor]:
        """Official names with tensors on the meta device: nothing is read."""
        return self._official({name: torch.empty(e.shape, device="meta") for name, e in self.file.entries.items()})

    def weights(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Official names and values: blocks in `dtype` (None: fp32), floats as they are stored.

        In a file that is mostly bf16, what the format has to store in fp32 comes back as bf16 where that loses nothing.
        """
        narrow = max(self.dtypes().items(), key=lambda item: item[1])[0] == "bf16"
        values: dict[str, Tensor] = {}
        for name, entry in self.file.entries.items():
            value = self.file.tensor(name, dtype or torch.float32)
            if narrow and entry.kind == "fp32" and bool((value.bfloat16().float() == value).all()):
                value = value.bfloat16()
            values[name] = value
        return {name: self._unscaled(name, value) for name, value in self._official(values).items()}

    def dtypes(self) -> dict[str, int]:
        """Numbers stored in each kind ("fp32", "q8_0" ..)."""
        counts: dict[str, int] = {}
        for entry in self.file.entries.values():
            numbers = entry.size // KINDS[entry.kind].size * KINDS[entry.kind].block
            counts[entry.kind] = counts.get(entry.kind, 0) + numbers
        return counts

    def tokenizer(self, vocab: int) -> WorldTokenizer | None:
        """The vocabulary in the file for a model of `vocab` tokens, None without one. Raises ValueError if damaged."""
        if self.file.keys.get("tokenizer.ggml.model") != "rwkv":
            return None
        texts: Any = self.file.keys.get("tokenizer.ggml.tokens")
        kinds: Any = self.file.keys.get("tokenizer.ggml.token_type")
        if not isinstance(texts, list) or not isinstance(kinds, list) or not len(texts) == len(kinds) == vocab:
            raise ValueError(f"{self.where}: the vocabulary has not {vocab} tokens, as the model has, with their types")
        tokens: dict[int, bytes] = {}
        for id, (text, kind) in enumerate(zip(cast("list[object]", texts), cast("list[object]", kinds), strict=True)):
            if kind == _NORMAL:
                tokens[id] = _unescape(text, f"{self.where}: token {id}")
        try:
            return WorldTokenizer(tokens, vocab)
        except ValueError as error:
            raise ValueError(f"{self.where}: the vocabulary is damaged: {error}") from error

    def _official(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, value in values.items():
            for ours, part in _split(name, value):
                if ours in out:
                    raise ValueError(f"{self.where}: {ours} is there twice, fused and alone")
                turned = _TURNED.fullmatch(ours) and part.dim() > 1
                out[ours] = (
                    part.mT.contiguous() if turned else part.reshape(1, 1, -1) if _VECTOR.fullmatch(ours) else part
                )
        return out

    def _unscaled(self, name: str, value: Tensor) -> Tensor:
        match = _SCALED.fullmatch(name)
        if self.rescale == 0 or match is None or int(match[1]) < self.rescale:
            return value
        value = value.float() if value.dtype == torch.float16 else value  # what was halved need not fit when doubled
        return value * 2.0 ** (int(match[1]) // self.rescale)


def save(
    path: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer: WorldTokenizer | None,
    kind: str | None = None,
) -> None:
    """Write official Finch weights (Eagle: after `upcycle`) as a GGUF file that llama.cpp runs.

    kind       "fp32", "fp16", "bf16", "q8_0" or "q4_0" for the matrices; None keeps each one's dtype
    tokenizer  None writes a file without vocabulary: llama.cpp then takes and gives ids

    Matrices whose rows are no multiple of 32 are fp16 in a quantised file. Memory: some megabytes beside the weights.
    Raises ValueError for what rwkv6 cannot express, and for numbers that do not fit their kind.
    """
    _check(config)
    if kind is not None and kind not in _FILE_TYPES:
        raise ValueError(f"{kind} is no kind of GGUF file that is written; use {', '.join(_FILE_TYPES)}")
    tensors = {
        name: Stored(value, _kind(name, value, kind)) for name, value in _theirs(weights).items()
    }  # views: nothing is converted before it is written
    keys: dict[str, Value] = {
        "general.architecture": "rwkv6",
        "general.name": path.stem,
        "general.file_type": _FILE_TYPES[kind or tensors["token_embd.weight"].kind],
        "general.quantization_version": 2,
        "rwkv6.context_length": 1 << 20,
        "rwkv6.embedding_length": config.n_embd,
        "rwkv6.block_count": config.n_layer,
        "rwkv6.feed_forward_length": config.dim_ffn,
        "rwkv6.attention.layer_norm_epsilon": LAYER_NORM_EPS,
        "rwkv6.attention.head_count": 0,  # what llama.cpp wants of a network without attention
        "rwkv6.rescale_every_n_layers": 0,
        "rwkv6.wkv.head_size": config.head_size,
        "rwkv6.time_mix_extra_dim": config.shift_rank,
        "rwkv6.time_decay_extra_dim": config.decay_rank,
        **_vocabulary(tokenizer, config.vocab_size),
    }
    write(path, keys, tensors)


def _check(config: ModelConfig) -> None:
    problems: list[str] = []
    if config.generation != "finch":
        problems.append(f"it is {config.generation}")
    if config.dim_att != config.n_embd:
        problems.append(f"time mixing has width {config.dim_att}, the residual {config.n_embd}")
    if config.time_state:
        problems.append("it has a tuned initial state (time_state)")
    if problems:
        raise ValueError(f"GGUF's rwkv6 cannot express this model: {'; '.join(problems)}. Write .pth or .safetensors")


def _theirs(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """GGUF's names and shapes, as views where that is possible."""
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        stem, dot, ending = name.rpartition(".")
        if ending not in ("weight", "bias"):
            stem, dot, ending = name, ".", "weight"
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
        if stem in _WHOLE or match is None:
            out[_WHOLE[stem] + dot + ending] = value
            continue
        if _TURNED.fullmatch(stem):
            value = value.mT
        elif _VECTOR.fullmatch(stem):
            value = value.reshape(-1)
        out[f"blk.{match[1]}.{_PARTS[match[2]]}{dot}{ending}"] = value
    for layer in [name.split(".")[1] for name in out if name.endswith("time_mix_lerp_g.weight")]:
        parts = [out.pop(f"blk.{layer}.time_mix_lerp_{x}.weight").float() for x in "wkvrg"]
        out[f"blk.{layer}.{_FUSED}.weight"] = torch.stack(parts).reshape(5, 1, 1, -1)
    return out


def _kind(name: str, value: Tensor, wanted: str | None) -> str:
    matrix = value.dim() == 2 and not re.search(r"\.time_mix_(w[12]|decay_w[12]|first)\.", name)
    if not matrix:
        return "fp32"
    if wanted is None:
        return next((kind for kind, dtype in FLOATS.items() if dtype == value.dtype), "fp32")
    if value.shape[-1] % KINDS[wanted].block:
        return "fp16"
    return "q8_0" if wanted == "q4_0" and name in ("token_embd.weight", "output.weight") else wanted


def _split(name: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """Official names for one of GGUF's; a name without a counterpart stays and is refused later."""
    stem, dot, ending = name.rpartition(".")
    for ours, theirs in _WHOLE.items():
        if stem == theirs:
            return [(ours + dot + ending, value)]
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
    if match is None:
        return [(name, value)]
    block, part = f"blocks.{int(match[1])}.", match[2]
    if part == _FUSED and value.dim() > 1 and value.shape[0] == 5:
        return [(f"{block}att.time_maa_{x}", one.clone()) for x, one in zip("wkvrg", value, strict=True)]
    ours = block + _OURS.get(part, part)
    return [(ours if ".time_" in ours else ours + dot + ending, value)]


def _vocabulary(tokenizer: WorldTokenizer | None, vocab: int) -> dict[str, Value]:
    if tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab", "rwkv6.vocab_size": vocab}
    texts, kinds = ["<s>"], [_CONTROL]
    for id in range(1, vocab):
        token = tokenizer.token_bytes(id) if id < tokenizer.vocab_size else b""
        texts.append(repr(token)[2:-1] if token else f"[PAD{id}]")
        kinds.append(_NORMAL if token else _UNUSED)
    keys: dict[str, Value] = {
        "tokenizer.ggml.model": "rwkv",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }
    blank = tokenizer.encode("\n\n")
    if len(blank) == 1:  # a blank line ends a turn of the chat that World models know
        keys |= {"tokenizer.ggml.eot_token_id": blank[0], "tokenizer.chat_template": "rwkv-world"}
    return keys


def _unescape(text: object, where: str) -> bytes:
    """The bytes of a token, by llama.cpp's rule: an escape that it does not know stands for its letter."""
    if not isinstance(text, str):
        raise ValueError(f"{where} is {text!r}, which is no text")
    return _ESCAPE.sub(_unescaped, text.encode("utf-8", "surrogateescape"))


def _unescaped(match: re.Match[bytes]) -> bytes:
    if match[1]:
        return bytes.fromhex(match[1].decode())
    return {b"n": b"\n", b"r": b"\r", b"t": b"\t"}.get(match[2], match[2])
