"""Models in and out of files: load, look inside, convert.

Everything about a model is read from its tensors: configuration files are written, never believed.

Owns: the order "names, then version, then sizes, then strict check", and the dtypes of a loaded model.
Refuses to know: where a name leads and what the names of each dialect are (roost.formats), and what the tensors do
(roost.models).
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from roost.checks import usable_device
from roost.config import ModelConfig
from roost.formats import fla, gguf, huggingface, official, packed, storage
from roost.formats.locate import ASSETS, resolve
from roost.formats.official import LABELS, Version
from roost.formats.upcycle import upcycle
from roost.models.rwkv import RWKV, fingerprint_of, official_weights, save_weights
from roost.tokenizer import WorldTokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
"""The dtypes a model can have, by their usual short names."""

_PRECISE = re.compile(
    r".*\.(att\.(time_decay(_w[12])?|time_faaaa|time_first|time_state|time_maa_[xwkvrg]|ln_x\.(weight|bias))"
    r"|ffn\.time_maa_[kr])"
)  # used in fp32 whatever the model's dtype is, so they may be stored finer than the rest


@dataclass(frozen=True)
class Info:
    """What a checkpoint is, found without reading its numbers.

    path          the file or directory
    version       "4", "5.0", "5.1", "5.2" or "6";  label: the same in words, e.g. "RWKV-6 (Finch)"
    dialect       "official", "huggingface", "fla" or "gguf"
    config        the sizes of the model it loads as
    dtypes        parameters stored in each dtype ("fp32", in GGUF files also "q8_0" ..), most first
    parameters    numbers in the file
    file_bytes    size of all weight files
    state_bytes   fp32 state of one sequence
    memory        bytes needed to run one sequence (weights and state), for each dtype
    """

    path: Path
    version: Version
    label: str
    dialect: str
    config: ModelConfig
    dtypes: dict[str, int]
    parameters: int
    file_bytes: int
    state_bytes: int
    memory: dict[str, int]

    def lines(self) -> list[tuple[str, str]]:
        """(what, value) pairs for printing, e.g. ("state", "1.6 MB per sequence")."""
        c = self.config
        shape = f"{c.n_layer} layers, width {c.n_embd}, channel mixing {c.dim_ffn}, vocabulary {c.vocab_size}"
        if c.dim_att != c.n_embd:
            shape += f", time mixing {c.dim_att}"
        if c.n_head:
            shape += f", {c.n_head} heads of {c.head_size}"
        if c.generation == "finch":
            shape += f", ranks {c.shift_rank} and {c.decay_rank}"
        if c.time_state:
            shape += ", tuned initial state"
        total = sum(self.dtypes.values())
        kinds = ", ".join(name if count == total else f"{name} ({count:,})" for name, count in self.dtypes.items())
        return [
            ("file", f"{self.path} ({_size(self.file_bytes)})"),
            ("generation", self.label),
            ("names", self.dialect),
            ("sizes", shape),
            ("dtype", kinds),
            ("parameters", f"{self.parameters:,}"),
            ("state", f"{_size(self.state_bytes)} per sequence"),
            ("memory to run", ", ".join(f"{_size(size)} in {name}" for name, size in self.memory.items())),
        ]


@dataclass(frozen=True)
class _Opened:
    """A checkpoint in official names, checked against the model it belongs to; nothing is read yet."""

    path: Path
    version: Version
    dialect: str
    config: ModelConfig
    dtypes: dict[str, int]  # numbers stored in each
    named: dict[str, Tensor]  # official names, before upgrades
    weights: dict[str, Tensor]  # after upgrades, in the trainer's key order
    model: RWKV  # on the meta device
    gguf: gguf.GGUF | None = None  # the file itself, where it is one of these

    def tokenizer(self) -> WorldTokenizer | None:
        """The file's own vocabulary, or the one that the number of ids tells."""
        return tokenizer_of(self.config.vocab_size, self.gguf)


def tokenizer_of(vocab: int, file: gguf.GGUF | Path | None = None) -> WorldTokenizer | None:
    """The vocabulary in the file when it is GGUF and has one, or the one that a number of ids tells: World from 65536
    on, bytes for 257, None for others (Pile models)."""
    if isinstance(file, Path):
        file = gguf.GGUF(file) if gguf.is_gguf(file) else None
    own = None if file is None else file.tokenizer(vocab)
    if own is not None:
        return own
    if vocab == 257:
        return WorldTokenizer.byte_level()
    return WorldTokenizer() if vocab >= 65536 else None


def load(
    x: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    endpoint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[RWKV, WorldTokenizer | None]:
    """A model and its tokenizer from a path or a name.

    x       a .pth, .safetensors or .gguf (rwkv6) file; a directory with Hugging Face (rwkv, rwkv5, rwkv6) or fla
            weights, sharded or not, or with one .pth; a model that ships ("nestling"); or a hub name: "owner/name",
            "owner/name@revision", "owner/name/file.pth". A path that exists comes first.
    dtype   None keeps the file's: decay, bonus, maa, ln_x and time_state as they are stored (they are used in fp32
            anyway), all other tensors in the widest dtype found among them. Otherwise every tensor is converted.
            A model that ships is stored in bf16 and loads in fp32: many CPUs have no bf16 arithmetic. fp16 files load
            in fp32 too, and fp16 is refused: without rescaling, the residual stream of real models overflows there.
            Quantised GGUF tensors become numbers of `dtype`, by default fp32.
    endpoint, cache_dir   the hub to ask and where to keep its files; None = huggingface_hub's own

    RWKV-5.0 and 5.1 load as Eagle, exactly. Tokenizer: the one in the file (GGUF), else the World tokenizer for 65536
    ids or more, bytes for 257, and None for others (the Pile models'). On the CPU in the file's dtype the weights are
    mapped, not read: the file may be replaced (as roost does) while the model is used, but not overwritten in place.

    Raises ValueError for anything that cannot be loaded, naming the file, the variant or the tensors, and what to do.
    """
    target = usable_device(device)
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype}; it must be one of {', '.join(str(known) for known in DTYPES.values())}")
    if dtype == torch.float16:
        raise ValueError("a model does not run in fp16: its residual stream overflows there; use bf16 or fp32")
    path = resolve(x, endpoint, cache_dir)
    if dtype is None and path.parent == ASSETS:
        dtype = torch.float32
    opened = _open(path, dtype)
    model = opened.model
    wanted = _dtypes(opened.weights) if dtype is None else dict.fromkeys(opened.weights, dtype)
    weights = {name: value.to(target, wanted[name]) for name, value in opened.weights.items()}
    model.load_state_dict(weights, assign=True)
    model.fingerprint = fingerprint_of(opened.config, opened.weights)
    return model, opened.tokenizer()


def stored_weights(x: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint under official names, shapes and dtypes as stored, nothing upgraded; see `load`."""
    return _open(resolve(x, None, None)).named


def info(
    x: str | os.PathLike[str], *, endpoint: str | None = None, cache_dir: str | os.PathLike[str] | None = None
) -> Info:
    """What `load` would load, without reading the weights (an old non-zip .pth has to be read). Errors as in `load`."""
    path = resolve(x, endpoint, cache_dir)
    if path.suffix == packed.ENDING and not path.is_dir():
        return _packed_info(path)
    opened = _open(path, numbers=False)
    state, parameters = opened.config.state_bytes, sum(opened.dtypes.values())
    return Info(
        path=opened.path,
        version=opened.version,
        label=LABELS[opened.version],
        dialect=opened.dialect,
        config=opened.config,
        dtypes=dict(sorted(opened.dtypes.items(), key=lambda item: -item[1])),
        parameters=parameters,
        file_bytes=sum(file.stat().st_size for file in storage.files(opened.path)),
        state_bytes=state,
        memory={name: parameters * DTYPES[name].itemsize + state for name in ("fp32", "bf16")},
    )


def _packed_info(path: Path) -> Info:
    found = packed.summary(path)
    version = official.version_for(found.config)
    state, size = found.config.state_bytes, path.stat().st_size
    numbers, memory = dict(sorted(found.numbers.items(), key=lambda item: -item[1])), {found.weights: size + state}
    about = (path, version, LABELS[version], f"packed, {found.weights}", found.config)
    return Info(*about, numbers, sum(numbers.values()), size, state, memory)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str | None = None,
    dtype: torch.dtype | gguf.Quantised | None = None,
    weights_format: packed.WeightsFormat | None = None,
    threads: int = 1,
    endpoint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a checkpoint in another form and return where it is.

    source  whatever `load` takes
    target  a name that ends in .pth or .safetensors (official names), in .gguf (for llama.cpp; RWKV-5.1 and 5.2 are
            written as the RWKV-6 that they equal), in .roost (packed for the native model), or a directory: Hugging
            Face names, model.safetensors, config.json
    to      "finch" turns RWKV-5.1 and 5.2 into RWKV-6 with the same logits; its maa stay fp32 whatever `dtype` says,
            because 1 - mix does not fit 16 bits
    dtype   None keeps each tensor's. In .gguf it is that of the matrices, and may be "q8_0" or "q4_0"
    weights_format  of a .roost file: "fp32", "bf16", "int8", "int4"; None: as in NAME.int8.roost. threads: to pack it

    Files are replaced only when the new one is complete. Warns when the result has one layer (the rwkv package takes
    such a file for another version). Raises ValueError as `load` does, for another ending, and for what the Hugging
    Face classes or GGUF cannot express.
    """
    if to not in (None, "finch"):
        raise ValueError(f"to is {to!r}; the only generation to convert to is 'finch'")
    path = Path(target)
    form = _form(path, dtype, weights_format)
    found = resolve(source, endpoint, cache_dir)
    opened = _open(found)
    config, weights = opened.config, opened.weights
    if to == "finch" or (form == "gguf" and config.generation == "eagle"):
        config, weights = upcycle(config, weights)
    if form == "packed":
        kind, identity = packed.format_of(path, weights_format), packed.source_of(found)
        return packed.pack(weights, config, path, weights_format=kind, source=identity, threads=threads)
    if not isinstance(dtype, str) and dtype is not None and form != "gguf":
        weights = {
            name: value if to == "finch" and re.fullmatch(r".*\.time_maa_[xwkvrg]", name) else value.to(dtype)
            for name, value in weights.items()
        }
    weights = official_weights(config, {name: weights[name] for name in RWKV(config, device="meta").state_dict()})
    if form == "gguf":
        kind = dtype if isinstance(dtype, str) else next((name for name, one in DTYPES.items() if one == dtype), None)
        gguf.save(path, config, weights, opened.tokenizer(), kind)
    elif form == "directory":
        huggingface.save(config, weights, path)
    else:
        save_weights(weights, path)
    if config.n_layer == 1 and config.generation != "dove" and form != "gguf":
        warnings.warn(
            f"{path} has one layer: the rwkv package guesses the version of such a file from the order of its keys and"
            " may take it for another one",
            stacklevel=2,
        )
    return path


def _form(path: Path, dtype: object, weights_format: str | None) -> str:
    """What a target's name asks for: "packed", "gguf", "directory" or "file". ValueError for what that cannot hold."""
    ending = "" if path.is_dir() else path.suffix
    form = {packed.ENDING: "packed", gguf.ENDING: "gguf", ".pth": "file", ".safetensors": "file"}.get(ending, "")
    if not form and path.exists() and not path.is_dir():
        raise ValueError(
            f"cannot write {path}: the name must end in .pth, .safetensors, .gguf or .roost, or be a directory"
        )
    if not form and ending and not ending[1].isdigit():  # "v6-1.6B" is the name of a directory
        raise ValueError(
            f"cannot write {path}: {ending} is no format that roost writes; use .pth, .safetensors, .gguf, .roost,"
            " or a directory for Hugging Face names"
        )
    known = gguf.QUANTISED if isinstance(dtype, str) else DTYPES.values()
    if dtype is not None and dtype not in known:
        raise ValueError(f"dtype is {dtype}; it must be one of {', '.join(str(one) for one in known)}")
    if dtype is not None and form == "packed":
        raise ValueError(f"dtype is {dtype}, but a {packed.ENDING} file has weights_format in its place (--weights)")
    if isinstance(dtype, str) and form != "gguf":
        raise ValueError(f"cannot write {dtype} to {path}: only .gguf files hold it")
    if weights_format is not None and form != "packed":
        raise ValueError(f"weights_format is {weights_format!r}, but {path} does not end in {packed.ENDING}")
    if form == "packed":
        packed.format_of(path, weights_format)
    return form or "directory"


def _open(path: Path, dtype: torch.dtype | None = None, *, numbers: bool = True) -> _Opened:
    """`dtype` is what quantised tensors become; without `numbers` the tensors of a GGUF file are not read at all."""
    where = str(path)
    file = gguf.GGUF(path) if gguf.is_gguf(path) else None
    if file is not None:
        dialect, weights, dtypes = "gguf", file.shapes(), file.dtypes()
    else:
        stored = official.strip_prefixes(storage.read(path), where)
        dialect, weights, dtypes = "official", stored, _count(stored)
        if huggingface.is_huggingface(stored):
            dialect, weights = "huggingface", huggingface.to_official(stored)
        elif fla.is_fla(stored):
            dialect, weights = "fla", fla.to_official(stored, where)
    version = "6" if file is not None else official.version_of(weights, where)
    config = official.config_of(weights, version, where)
    named, weights = weights, official.upgrade(weights, version, config)
    model = RWKV(config, device="meta")
    expected = model.state_dict()
    official.check(weights, expected, version, where)
    if file is not None and numbers:  # only now, when every size has been found right
        named = weights = file.weights(dtype)
    if dialect == "huggingface" and huggingface.looks_rescaled(weights, config.n_layer):
        warnings.warn(
            f"{path}: att.output and ffn.value look halved every 6 layers, as the Hugging Face classes leave them when"
            " a 16-bit model is saved after generating. If so, multiply those of layer l by 2 ** (l // 6)",
            stacklevel=3,
        )
    weights = {name: weights[name] for name in expected}
    return _Opened(path, version, dialect, config, dtypes, named, weights, model, file)


def _count(weights: dict[str, Tensor]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in weights.values():
        name = next((short for short, dtype in DTYPES.items() if dtype == value.dtype), str(value.dtype))
        counts[name] = counts.get(name, 0) + value.numel()
    return counts


def _dtypes(weights: dict[str, Tensor]) -> dict[str, torch.dtype]:
    """The dtype of each tensor when the file decides (see `load`)."""
    main = reduce(torch.promote_types, (value.dtype for name, value in weights.items() if not _PRECISE.fullmatch(name)))
    main = torch.float32 if main == torch.float16 else main
    out = dict.fromkeys(weights, main)
    for name, value in weights.items():
        if _PRECISE.fullmatch(name) and main != torch.float64:
            wide = torch.promote_types(main, value.dtype)
            out[name] = torch.float32 if wide == torch.float64 else wide
    return out


def _size(count: int) -> str:
    """Bytes in decimal units, three digits."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
