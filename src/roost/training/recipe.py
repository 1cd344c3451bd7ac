"""A recipe: a flat TOML file that names a model, data and the numbers of a run.

    model = "nestling"                    a preset (fresh weights) or a checkpoint file (further training)
    data = "corpus/nestling/train"        a .bin/.idx pair; for task "sft" and "dpo" one or more text files
    valid = ["corpus/nestling/valid-x"]   optional held-out pairs, one loss each, and one per domain and language:
                                          from the pair's report, or {path = ..., domain = ..., language = ...}
    vocabulary = "words.txt"              optional, in the official text form; else the file's own, World or bytes
    ctx = 512                             tokens per row
    batch = 8                             rows per step, over all ranks
    steps = 1000                          and every other field of TrainConfig, TaskConfig and AdapterConfig
    segment = 4096                        optional: rows longer than this are back-propagated in segments;
    truncate = 0                          ... and the gradient is cut every so many tokens
    order = "shuffle"                     optional, of pretraining windows: or "sequential", or "magic" (RWKV-LM's)
    packing = "windows"                   optional, of pretraining: or "documents", whole ones that leak nothing
    sample = "Once"                       optional: a text to write on from after every validation

Owns: the keys, and the order defaults < rates to begin with < recipe < overrides; that all which can be refused is
refused before weights are read. An unknown key is an error that names the nearest.
Refuses to know: the loop, and how a task or an adapter works.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from roost.checkpoint import info, load, tokenizer_of
from roost.checks import choice, nearest, usable_device, whole
from roost.config import PRESETS, ModelConfig
from roost.data.batch import check_parts
from roost.data.order import Order
from roost.data.pairs import PairLoader
from roost.data.sft import SftLoader
from roost.files import read_toml, replacing
from roost.inference.sampling import Sampling
from roost.inference.stream import stream
from roost.models.rwkv import RWKV
from roost.tokenizer import WorldTokenizer
from roost.training.adapter_config import AdapterConfig, default_rates
from roost.training.adapters import count_parameters, prepare_model
from roost.training.config import TrainConfig
from roost.training.loop import Progress, train
from roost.training.loss import Objective
from roost.training.reducer import Reducer
from roost.training.segments import segmented_sums
from roost.training.start import check_packages, check_precision, check_start
from roost.training.streams import Valid, held_out
from roost.training.task import Data, TaskConfig, begin, open_data, summary
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
    valid: tuple[Valid, ...]
    vocabulary: str
    segment: int
    truncate: int
    sample: str
    order: Order
    packing: str
    config: TrainConfig
    task: TaskConfig
    adapter: AdapterConfig | None


OWN = {
    **dict.fromkeys(("model", "sample", "order", "packing", "vocabulary"), "str"),
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
    task = TaskConfig(**{key: value for key, value in given.items() if key in parts[TaskConfig]})
    numbers = {key: value for key, value in given.items() if key in parts[TrainConfig]}
    config = _config(numbers, given["model"], task, adapter)
    segment, truncate = (whole(key, given.get(key, 0), 0) for key in ("segment", "truncate"))
    if truncate and not (segment and truncate % segment == 0):
        raise ValueError(f"{path}: truncate is {truncate}; it must be a multiple of segment = {segment}")
    if segment and task.task == "dpo":
        raise ValueError(f"{path}: segment does not go with task 'dpo'")
    if config.compile and (task.task != "pretrain" or given.get("packing") == "documents"):
        raise ValueError(f"{path}: compile is for windows; packed documents would be compiled anew at every step")
    if not given["data"]:
        raise ValueError(f"{path}: data is empty; name at least one file")
    data = (given["data"],) if isinstance(given["data"], str) else tuple(given["data"])
    order, packing = given.get("order", "shuffle"), given.get("packing", "windows")
    choice("order", order, get_args(Order))
    choice("packing", packing, ("windows", "documents"))
    if (task.task != "pretrain" or packing == "documents") and order != "shuffle":
        raise ValueError(f"{path}: order is {order!r}; only windows of pretraining have another order than 'shuffle'")
    if task.task != "pretrain" and "packing" in given:
        raise ValueError(f"{path}: packing is {packing!r}; task {task.task!r} always packs whole conversations")
    valid = tuple(_valid(path, entry) for entry in given.get("valid", ()))
    rest = (valid, given.get("vocabulary", ""), segment, truncate, given.get("sample", ""), order, packing)
    return Recipe(given["model"], data, given["ctx"], given["batch"], *rest, config, task, adapter)


def _config(numbers: dict[str, Any], model: str, task: TaskConfig, adapter: AdapterConfig | None) -> TrainConfig:
    """The numbers of a run. Only a fresh model that is pretrained begins at TrainConfig's rates."""
    if (adapter is None or adapter.adapter == "full") and task.task == "pretrain" and model in PRESETS:
        return TrainConfig(**numbers)
    kind = adapter.adapter if adapter else "full"
    rates: dict[str, Any] = dict(default_rates(kind, sizes_of(model), preferences=task.task == "dpo"))
    if "lr" not in numbers or "lr_final" in numbers:
        return TrainConfig(**{**rates, **numbers})
    share = rates.pop("lr_final") / rates["lr"]
    config = TrainConfig(**{**rates, **numbers})
    return replace(config, lr_final=config.lr * share)


def _valid(path: str | os.PathLike[str], entry: Any) -> Valid:
    table: dict[str, Any] = entry if isinstance(entry, dict) else {"path": entry}
    if not ({"path"} <= table.keys() <= set(Valid._fields) and all(isinstance(one, str) for one in table.values())):
        raise ValueError(
            f"{path}: valid holds {entry!r}; it must hold strings, or tables {{path = .., domain = .., language = ..}}"
        )
    return Valid(**table)


def _check_type(path: str | os.PathLike[str], key: str, value: object, kind: str) -> None:
    lists, numbers = (list, tuple), {"int": (int,), "float": (int, float), "bool": (bool,)}
    wanted: tuple[type, ...] = numbers.get(kind, (str,))
    if kind.startswith("tuple") or kind.endswith("list"):
        wanted = (str, *lists) if kind.startswith("str") else lists
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind != "bool"):
        raise ValueError(f"{path}: {key} is {value!r}; it must be {' or '.join(kind.__name__ for kind in wanted)}")
    if isinstance(value, lists) and key != "valid" and not all(isinstance(item, str) for item in value):
        raise ValueError(f"{path}: {key} is {value!r}; it must hold strings only")


class Files(NamedTuple):
    """What a run reads besides weights, checked: the model's sizes and vocabulary, data, validation streams."""

    sizes: ModelConfig
    tokenizer: WorldTokenizer | None
    data: Data
    validation: dict[str, Held]


def open_files(recipe: Recipe) -> Files:
    """Open and check everything that a run reads, but no weights. Raises ValueError for what does not fit together."""
    sizes, vocabulary = sizes_of(recipe.model), recipe.vocabulary
    count_parameters(sizes, recipe.adapter)  # names of parts that do not exist
    own = None if recipe.model in PRESETS else Path(recipe.model)
    tokenizer = WorldTokenizer.from_file(vocabulary) if vocabulary else tokenizer_of(sizes.vocab_size, own)
    if recipe.sample and tokenizer is None:
        raise ValueError(f"sample is {recipe.sample!r}, but this model's vocabulary is not known: name its file")
    data = open_data(
        recipe.task,
        recipe.data,
        tokenizer,
        ctx=recipe.ctx,
        batch=recipe.batch,
        vocab_size=sizes.vocab_size,
        seed=recipe.config.seed,
        order=recipe.order,
        packing=recipe.packing,
    )
    check_parts("rows", recipe.batch, recipe.config.accumulate)
    return Files(sizes, tokenizer, data, held_out(recipe.valid, tokenizer, sizes.vocab_size))


def run_recipe(
    path: str | os.PathLike[str],
    overrides: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    device: torch.device | str = "cpu",
    progress: Callable[[Progress], None] | None = None,
    notice: Callable[[str], None] | None = None,
    reduce: Callable[[RWKV], Reducer] | None = None,
) -> Path:
    """Train as the recipe says and return the path of the final model; see `read_recipe` and `train` for errors.

    `notice` is told in one line what became of the lines of a text, which out/data.json keeps whole. `reduce` makes the
    ranks of a run on several devices from the model.
    """
    recipe, place = read_recipe(path, overrides), usable_device(device)
    config, adapter = recipe.config, recipe.adapter
    files = open_files(recipe)
    if recipe.model in PRESETS and adapter and adapter.adapter != "full":
        raise ValueError(
            f"{path}: model = {recipe.model!r} is a fresh model of that size, and an adapter needs a trained one: name"
            " its file (roost convert nestling nestling.pth writes the one that ships)"
        )
    check_precision(config, place)
    out = check_start(config.out, resume=resume)
    check_packages(config)
    if notice and isinstance(files.data, (SftLoader, PairLoader)):
        notice(summary(files.data))
    model = open_model(recipe, place)
    data, objective = begin(recipe.task, files.data, model, config, recipe.ctx)
    identity: dict[str, int | float | str] = {"segment": recipe.segment, "truncate": recipe.truncate}
    adapted = prepare_model(model, adapter, seed=config.seed) if adapter else None
    if adapter:
        identity.update(adapter.identity)
    save_final = None if adapted is None or adapted.config.adapter == "full" else adapted.save_final
    reducer = reduce(model) if reduce else None
    if isinstance(data, (SftLoader, PairLoader)) and (reducer is None or reducer.is_main):
        _write_report(out / "data.json", recipe.data, data)
    prompted = partial(write_on, tokenizer=files.tokenizer, prompt=recipe.sample) if files.tokenizer else None
    return train(
        model,
        data,
        config,
        objective=_segmented(objective, recipe),
        validation=files.validation,
        sample=prompted if recipe.sample else None,
        save_final=save_final,
        reduce=reducer,
        identity=identity,
        resume=resume,
        progress=progress,
    )


def open_model(recipe: Recipe, device: torch.device) -> RWKV:
    """The weights that a run starts from, fp32."""
    if recipe.model in PRESETS:
        return RWKV(PRESETS[recipe.model], init=recipe.config.init, seed=recipe.config.seed, device=device)
    return load(recipe.model, device=device, dtype=torch.float32)[0]


def _write_report(path: Path, files: Sequence[str], data: SftLoader | PairLoader) -> None:
    content = json.dumps({"files": list(files), **asdict(data.documents.report)}, indent=1, ensure_ascii=False)
    with replacing(path) as temporary:
        temporary.write_text(content + "\n", encoding="utf-8")


def write_on(model: RWKV, tokenizer: WorldTokenizer, prompt: str, tokens: int = 64) -> str:
    """A short text, the same for the same weights."""
    found = stream(model, tokenizer, prompt.encode(), Sampling(temperature=1.0, top_p=0.9, seed=0), max_tokens=tokens)
    return prompt + "".join(found)


def _segmented(objective: Objective, recipe: Recipe) -> Objective:
    if not recipe.segment:
        return objective
    return partial(segmented_sums, segment=recipe.segment, truncate=recipe.truncate or None, objective=objective)


def sizes_of(model: str) -> ModelConfig:
    """The sizes of a preset or a checkpoint, without its weights."""
    if model in PRESETS:
        return PRESETS[model]
    if not Path(model).exists():
        raise ValueError(f"model {model!r} is neither a file nor a preset; did you mean {nearest(model, PRESETS)!r}?")
    return info(model).config
