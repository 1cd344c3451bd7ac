"""A recipe: a flat TOML file that names a model, data and the numbers of a run.

    model = "nestling"                    a preset (fresh weights) or a checkpoint file (further training)
    data = "corpus/nestling/train"        a .bin/.idx pair; for task "sft" and "dpo" one or more text files
    valid = ["corpus/nestling/valid-x"]   optional held-out pairs, one loss each
    ctx = 512                             tokens per row
    batch = 8                             rows per step, over all ranks
    steps = 1000                          and every other field of TrainConfig, TaskConfig and AdapterConfig
    segment = 4096                        optional: rows longer than this are back-propagated in segments;
    truncate = 0                          ... and the gradient is cut every so many tokens
    order = "shuffle"                     optional, of pretraining windows: or "sequential", or "magic" (RWKV-LM's)
    packing = "windows"                   optional, of pretraining: or "documents", whole ones that leak nothing
    sample = "Once"                       optional: a text to write on from after every validation

Owns: the keys, and the order defaults < rates of the adapter < recipe < overrides. An unknown key is an error that
names the nearest.
Refuses to know: the loop, and how a task or an adapter works.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from roost.checks import choice, nearest, whole
from roost.config import PRESETS, ModelConfig
from roost.data.binidx import TokenFile
from roost.data.loader import PackedLoader, TokenLoader
from roost.data.order import Order
from roost.files import read_toml
from roost.inference.sampling import Sampling
from roost.inference.stream import stream
from roost.models.rwkv import RWKV
from roost.tokenizer import WorldTokenizer
from roost.training.adapter_config import AdapterConfig, default_rates
from roost.training.adapters import prepare_model
from roost.training.config import TrainConfig
from roost.training.loop import Progress, train
from roost.training.loss import Objective
from roost.training.reducer import Reducer
from roost.training.segments import segmented_sums
from roost.training.start import check_start
from roost.training.task import TaskConfig, open_task
from roost.training.validation import Held


@dataclass(frozen=True)
class Recipe:
    """A recipe whose keys and types are known to be right. Paths are relative to the working directory.

    config, task   as their classes say;  adapter   None when the recipe has no such key: the whole model is trained
    """

    model: str
    data: tuple[str, ...]
    ctx: int
    batch: int
    valid: tuple[str, ...]
    segment: int
    truncate: int
    sample: str
    order: Order
    packing: str
    config: TrainConfig
    task: TaskConfig
    adapter: AdapterConfig | None


OWN = {
    **dict.fromkeys(("model", "sample", "order", "packing"), "str"),
    **dict.fromkeys(("ctx", "batch", "segment", "truncate"), "int"),
    "data": "str or list",
    "valid": "list",
}
"""Keys of the recipe itself, and their types."""


def read_recipe(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file; `overrides` win. Raises ValueError for a missing file, bad TOML, or a wrong key or type."""
    given = read_toml(path, "recipe")
    given.update(overrides or {})
    parts: dict[type, dict[str, str]] = {
        kind: {field.name: str(field.type) for field in fields(kind)}
        for kind in (TrainConfig, TaskConfig, AdapterConfig)
    }
    known = {**OWN, **{name: kind for names in parts.values() for name, kind in names.items()}}
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r}; did you mean {nearest(key, known)!r}?")
        _check_type(path, key, value, known[key])
    for key in ("model", "data", "ctx", "batch"):
        if key not in given:
            raise ValueError(f"{path}: the key {key!r} is missing")
    adapter = None
    if parts[AdapterConfig].keys() & given.keys():
        adapter = AdapterConfig(**{key: value for key, value in given.items() if key in parts[AdapterConfig]})
        if given.get("pth") and adapter.adapter != "full":
            raise ValueError(f"{path}: pth is for whole models; this run writes an adapter: see roost merge")
    numbers: dict[str, Any] = {}
    if adapter and "lr" not in given:
        numbers.update(default_rates(adapter.adapter, sizes_of(given["model"])))
    numbers.update({key: value for key, value in given.items() if key in parts[TrainConfig]})
    task = TaskConfig(**{key: value for key, value in given.items() if key in parts[TaskConfig]})
    segment, truncate = (whole(key, given.get(key, 0), 0) for key in ("segment", "truncate"))
    if truncate and not (segment and truncate % segment == 0):
        raise ValueError(f"{path}: truncate is {truncate}; it must be a multiple of segment = {segment}")
    if segment and task.task == "dpo":
        raise ValueError(f"{path}: segment does not go with task 'dpo'")
    data = (given["data"],) if isinstance(given["data"], str) else tuple(given["data"])
    order, packing = given.get("order", "shuffle"), given.get("packing", "windows")
    choice("order", order, get_args(Order))
    choice("packing", packing, ("windows", "documents"))
    if (task.task != "pretrain" or packing == "documents") and order != "shuffle":
        raise ValueError(f"{path}: order is {order!r}; only windows of pretraining have another order than 'shuffle'")
    if task.task != "pretrain" and "packing" in given:
        raise ValueError(f"{path}: packing is {packing!r}; task {task.task!r} always packs whole conversations")
    rest = (tuple(given.get("valid", ())), segment, truncate, given.get("sample", ""), order, packing)
    return Recipe(given["model"], data, given["ctx"], given["batch"], *rest, TrainConfig(**numbers), task, adapter)


def _check_type(path: str | os.PathLike[str], key: str, value: object, kind: str) -> None:
    lists, numbers = (list, tuple), {"int": (int,), "float": (int, float), "bool": (bool,)}
    wanted: tuple[type, ...] = numbers.get(kind, (str,))
    if kind.startswith("tuple") or kind.endswith("list"):
        wanted = (str, *lists) if kind.startswith("str") else lists
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind != "bool"):
        raise ValueError(f"{path}: {key} is {value!r}; it must be {' or '.join(kind.__name__ for kind in wanted)}")
    if isinstance(value, lists) and not all(isinstance(item, str) for item in value):
        raise ValueError(f"{path}: {key} is {value!r}; it must hold strings only")


def run_recipe(
    path: str | os.PathLike[str],
    overrides: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    device: torch.device | str = "cpu",
    progress: Callable[[Progress], None] | None = None,
    reduce: Callable[[RWKV], Reducer] | None = None,
) -> Path:
    """Train as the recipe says and return the path of the final model; see `read_recipe` and `train` for errors.

    `reduce` makes the ranks of a run on several devices from the model.
    """
    recipe = read_recipe(path, overrides)
    config = recipe.config
    model, tokenizer = open_model(recipe, device)
    check_files(recipe, model.config.vocab_size)
    if recipe.sample and tokenizer is None:
        raise ValueError(f"sample is {recipe.sample!r}, but this model's vocabulary is not known")
    check_start(config.out, resume=resume)
    data, objective = open_task(recipe.task, recipe.data, model, tokenizer, config, ctx=recipe.ctx, batch=recipe.batch)
    if recipe.packing == "documents":
        data = PackedLoader(recipe.data[0], recipe.ctx, recipe.batch, seed=config.seed)
    elif recipe.task.task == "pretrain":
        data = TokenLoader(recipe.data[0], recipe.ctx, recipe.batch, seed=config.seed, order=recipe.order)
    identity: dict[str, int | float | str] = {"segment": recipe.segment, "truncate": recipe.truncate}
    adapted = prepare_model(model, recipe.adapter, seed=config.seed) if recipe.adapter else None
    if recipe.adapter:
        identity.update(recipe.adapter.identity)
    whole_model = adapted is None or recipe.adapter is None or recipe.adapter.adapter == "full"
    return train(
        model,
        data,
        config,
        objective=_segmented(objective, recipe),
        validation=held_out(recipe, model.config.vocab_size),
        sample=partial(write_on, tokenizer=tokenizer, prompt=recipe.sample) if recipe.sample and tokenizer else None,
        save_final=None if whole_model or adapted is None else adapted.save_final,
        reduce=reduce(model) if reduce else None,
        identity=identity,
        resume=resume,
        progress=progress,
    )


def open_model(recipe: Recipe, device: torch.device | str) -> tuple[RWKV, WorldTokenizer | None]:
    """The weights that a run starts from, fp32, and their tokenizer where it is known."""
    if recipe.model in PRESETS:
        config = PRESETS[recipe.model]
        model = RWKV(config, init=recipe.config.init, seed=recipe.config.seed, device=device)
        return model, tokenizer_of(config.vocab_size)
    _check_model(recipe.model)
    from roost.checkpoint import load

    return load(recipe.model, device=device, dtype=torch.float32)


def check_files(recipe: Recipe, vocab_size: int) -> None:
    """Raise ValueError for token files that are missing, too short or of a larger vocabulary."""
    named = [("data", recipe.data[0])] if recipe.task.task == "pretrain" and recipe.data else []
    for name, path in (*named, *((f"valid {path}", path) for path in recipe.valid)):
        file = TokenFile(path)
        if len(file) < 2:
            raise ValueError(f"{name} has {len(file)} token(s); at least 2 are needed")
        largest = int(file.tokens.max())
        if largest >= vocab_size:
            raise ValueError(f"{name} holds token id {largest}; the model knows 0..{vocab_size - 1}")


def held_out(recipe: Recipe, vocab_size: int) -> dict[str, Held]:
    """The validation streams, by short names."""
    if not recipe.valid:
        return {}
    lengths = byte_lengths(vocab_size)
    streams = {
        _short(name, recipe.valid): torch.from_numpy(TokenFile(name).tokens.astype("int64")) for name in recipe.valid
    }
    return {name: Held(tokens, lengths) for name, tokens in streams.items()}


def write_on(model: RWKV, tokenizer: WorldTokenizer, prompt: str, tokens: int = 64) -> str:
    """A short text, the same for the same weights."""
    found = stream(model, tokenizer, prompt.encode(), Sampling(temperature=1.0, top_p=0.9, seed=0), max_tokens=tokens)
    return prompt + "".join(found)


def _segmented(objective: Objective, recipe: Recipe) -> Objective:
    if not recipe.segment:
        return objective
    return partial(segmented_sums, segment=recipe.segment, truncate=recipe.truncate or None, objective=objective)


def _short(name: str, names: tuple[str, ...]) -> str:
    """The file name of a validation set, or all of it when two sets share that."""
    shared = [Path(other).name for other in names].count(Path(name).name) > 1
    return name if shared else Path(name).name


def sizes_of(model: str) -> ModelConfig:
    """The sizes of a preset or a checkpoint, without its weights."""
    if model in PRESETS:
        return PRESETS[model]
    _check_model(model)
    from roost.checkpoint import info

    return info(model).config


def _check_model(model: str) -> None:
    if not Path(model).exists():
        raise ValueError(f"model {model!r} is neither a file nor a preset; did you mean {nearest(model, PRESETS)!r}?")


def tokenizer_of(vocab_size: int) -> WorldTokenizer | None:
    """The tokenizer of a fresh model: of bytes, or RWKV's World."""
    if vocab_size == 257:
        return WorldTokenizer.byte_level()
    return WorldTokenizer() if vocab_size >= 65536 else None


def byte_lengths(vocab_size: int) -> torch.Tensor:
    """Bytes each id stands for, (V,) int64: 0 for token 0 and for ids without bytes."""
    tokenizer = WorldTokenizer.byte_level() if vocab_size == 257 else WorldTokenizer()
    return torch.tensor([len(tokenizer.token_bytes(i)) if i < tokenizer.vocab_size else 0 for i in range(vocab_size)])
