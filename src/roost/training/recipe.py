"""A recipe: a flat TOML file that names a model, data and the numbers of a run.

    model = "nestling"                    a preset (fresh weights) or a checkpoint file (further training)
    data = "corpus/nestling/train"        a .bin/.idx pair
    valid = ["corpus/nestling/valid-x"]   optional held-out pairs, one loss each
    ctx = 512                             tokens per row
    batch = 8                             rows per step
    steps = 1000                          and every other field of TrainConfig

Owns: the keys, and the order defaults < recipe < overrides. An unknown key is an error that names the nearest.
Refuses to know: the loop.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from roost.config import PRESETS
from roost.data.binidx import TokenFile
from roost.data.loader import TokenLoader
from roost.models.rwkv import RWKV
from roost.tokenizer import WorldTokenizer
from roost.training.config import TrainConfig
from roost.training.loop import Progress, train
from roost.training.validation import Held

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Recipe:
    """A recipe whose keys and types are known to be right. Paths are relative to the working directory."""

    model: str
    data: str
    ctx: int
    batch: int
    valid: tuple[str, ...]
    config: TrainConfig


def read_recipe(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file; `overrides` win. Raises ValueError for a missing file, bad TOML, or a wrong key or type."""
    try:
        with Path(path).open("rb") as file:
            given: dict[str, Any] = tomllib.load(file)
    except FileNotFoundError:
        raise ValueError(f"no recipe at {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ValueError(f"{path} is not a recipe: {error}") from error
    given.update(overrides or {})
    numbers = {field.name: field.type for field in fields(TrainConfig)}
    own = {"model": "str", "data": "str", "ctx": "int", "batch": "int", "valid": "list"}
    known = {**own, **{name: str(kind) for name, kind in numbers.items()}}
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0)
            raise ValueError(f"{path}: unknown key {key!r}; did you mean {near[0]!r}?")
        _check_type(path, key, value, known[key])
    for key in ("model", "data", "ctx", "batch", "steps"):
        if key not in given:
            raise ValueError(f"{path}: the key {key!r} is missing")
    config = TrainConfig(**{key: value for key, value in given.items() if key in numbers})
    return Recipe(given["model"], given["data"], given["ctx"], given["batch"], tuple(given.get("valid", ())), config)


def _check_type(path: str | os.PathLike[str], key: str, value: object, kind: str) -> None:
    wanted = {"int": (int,), "float": (int, float), "list": (list, tuple)}.get(kind, (str,))
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise ValueError(f"{path}: {key} is {value!r}; it must be {' or '.join(kind.__name__ for kind in wanted)}")
    if isinstance(value, (list, tuple)) and not all(isinstance(item, str) for item in value):
        raise ValueError(f"{path}: {key} is {value!r}; it must hold strings only")


def run_recipe(
    path: str | os.PathLike[str],
    overrides: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    device: torch.device | str = "cpu",
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Train as the recipe says and return the path of the final model; see `read_recipe` and `train` for errors."""
    recipe = read_recipe(path, overrides)
    model = _model(recipe, device)
    data = TokenLoader(recipe.data, recipe.ctx, recipe.batch, seed=recipe.config.seed)
    for name, file in [("data", data.file), *((f"valid {name}", TokenFile(name)) for name in recipe.valid)]:
        if len(file) < 2:
            raise ValueError(f"{name} has {len(file)} token(s); at least 2 are needed")
        largest = int(file.tokens.max()) if len(file) else 0
        if largest >= model.config.vocab_size:
            raise ValueError(f"{name} holds token id {largest}; the model knows 0..{model.config.vocab_size - 1}")
    lengths = byte_lengths(model.config.vocab_size)
    validation = {
        _short(name, recipe.valid): Held(torch.from_numpy(TokenFile(name).tokens.astype("int64")), lengths)
        for name in recipe.valid
    }
    return train(model, data, recipe.config, validation=validation, resume=resume, progress=progress)


def _short(name: str, names: tuple[str, ...]) -> str:
    """The file name of a validation set, or all of it when two sets share that."""
    shared = [Path(other).name for other in names].count(Path(name).name) > 1
    return name if shared else Path(name).name


def _model(recipe: Recipe, device: torch.device | str) -> RWKV:
    if recipe.model in PRESETS:
        return RWKV(PRESETS[recipe.model], init=recipe.config.init, seed=recipe.config.seed, device=device)
    if not Path(recipe.model).exists():
        near = difflib.get_close_matches(recipe.model, PRESETS, 1, 0)
        raise ValueError(f"model {recipe.model!r} is neither a file nor a preset; did you mean {near[0]!r}?")
    from roost.checkpoint import load

    return load(recipe.model, device=device, dtype=torch.float32)[0]


def byte_lengths(vocab_size: int) -> torch.Tensor:
    """Bytes each id stands for, (V,) int64: 0 for token 0 and for ids without bytes."""
    tokenizer = WorldTokenizer.byte_level() if vocab_size == 257 else WorldTokenizer()
    return torch.tensor([len(tokenizer.token_bytes(i)) if i < tokenizer.vocab_size else 0 for i in range(vocab_size)])
