"""Before the first step and after the last: what can be refused is refused here, and the final model is written.

Owns: the checks of a run, how long it is, the settings that a resume must keep.
Refuses to know: how a step is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import import_module
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from roost.checks import instance
from roost.data.batch import Batches
from roost.models.rwkv import RWKV, check_storable, fingerprint_of
from roost.training.config import FREE, TrainConfig
from roost.training.reducer import Reducer
from roost.training.resume import FINAL, trace_of_a_run
from roost.training.validation import Held


class Length(NamedTuple):
    """steps to make; the exact length in steps, that the rate follows; tokens in a step of all ranks (a mean)."""

    steps: int
    exact: float
    tokens: float


def length_of(data: Batches, config: TrainConfig) -> Length:
    """How long a run is.

    Raises ValueError for epochs of data that has no `windows` and `batch`, and for an empty batch.
    """
    tokens = float(getattr(data, "tokens_per_step", 0) or data.batch_at(0).inputs.numel())
    if tokens == 0:
        raise ValueError("the first batch of the data is empty")
    if config.steps:
        return _length(config.steps, tokens)
    if config.tokens:
        return _length(config.tokens / tokens, tokens)
    windows, batch = getattr(data, "windows", None), getattr(data, "batch", None)
    if not windows or not batch:
        raise ValueError(f"epochs = {config.epochs:g}, but this data does not know its length: give steps or tokens")
    return _length(config.epochs * (windows / batch), tokens)


def _length(exact: float, tokens: float) -> Length:
    if not exact <= 1e15:
        raise ValueError("the run would make more than 1e15 steps: lower steps, tokens or epochs")
    return Length(ceil(exact), exact, tokens)


def check_run(
    model: RWKV, data: object, config: object, validation: Mapping[str, Held] | None, *, storable: bool
) -> None:
    """Raise ValueError for what cannot be trained; `storable`: the final model is a checkpoint of the whole model."""
    instance("data", data, Batches, "such as roost.TokenLoader(path, ctx, batch)")
    instance("config", config, TrainConfig)
    assert isinstance(config, TrainConfig)
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    if trained - {torch.float32, torch.float64}:
        raise ValueError(f"the weights are {model.dtype}: training needs fp32; precision='bf16' is for products")
    check_precision(config, model.device)
    if storable:
        check_storable(model.config)
    for name, held in (validation or {}).items():
        if len(held.tokens) < 2:
            raise ValueError(f"the validation stream {name} has {len(held.tokens)} token(s); at least 2 are needed")


def check_precision(config: TrainConfig, device: torch.device) -> None:
    """Raise ValueError for a precision that is not for this device."""
    if config.precision == "fp16" and device.type == "cpu":
        raise ValueError("precision is 'fp16' on a CPU, which gains nothing and loses range: choose 'bf16' or 'fp32'")


def check_packages(config: TrainConfig) -> None:
    """Raise ValueError when the log goes where a package that is not installed would take it."""
    wanted = (config.tensorboard, "tensorboard", "torch.utils.tensorboard"), (config.wandb, "wandb", "wandb")
    for value, package, module in wanted:
        try:
            if value:
                import_module(module)
        except ImportError as error:
            raise ValueError(f"{package} = {value!r} needs a package: pip install {package}") from error


def check_start(out: str, *, resume: bool) -> Path:
    """Make the directory of a run.

    Raises ValueError when it is a file, when it holds a run and `resume` is false, and when it holds a finished one
    without a checkpoint, which a resume would begin anew.
    """
    path = Path(out)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"out is {out}, which is not a directory") from None
    trace = trace_of_a_run(path)
    finished = trace is not None and trace.name in FINAL
    if trace and not resume and not finished:
        raise ValueError(f"{path} already holds a run ({trace.name}): resume it, or choose another directory")
    if trace and finished:
        raise ValueError(
            f"{path} holds a finished run ({trace.name}) and no checkpoint, so there is nothing to resume: choose"
            " another directory"
        )
    return path


def settings_of(model: RWKV, data: Batches, config: TrainConfig, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides the losses of a run: numbers, sizes, data, and the weights that stay as they are."""
    numbers = {name: value for name, value in asdict(config).items() if name not in FREE}
    frozen = {name: value for name, value in model.named_parameters() if not value.requires_grad}
    base = {"frozen_weights": fingerprint_of(model.config, frozen)[:16]} if frozen else {}
    groups = (numbers, asdict(model.config), base, identity, data.identity)
    settings = {name: value for group in groups for name, value in group.items()}
    if len(settings) < sum(map(len, groups)):
        names = [name for group in groups for name in group]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two parts of the run have a setting called {twice}: give the identity another name")
    for name, value in settings.items():
        if type(value) not in (int, float, str, bool):  # a checkpoint holds plain values only
            raise ValueError(
                f"{name} is a {type(value).__name__}; the identity of the data must be plain numbers or text"
            )
    return settings


def save_model(
    model: RWKV, out: Path, config: TrainConfig, save_final: Callable[[Path], Path] | None, reduce: Reducer
) -> Path:
    """Write what was trained, and with config.pth also final.pth. Raises OSError when the disk is full."""

    def write() -> Path:
        if save_final is not None:
            return save_final(out)
        final = out / "final.safetensors"
        model.save(final)
        if config.pth:
            model.save(final.with_suffix(".pth"))
        return final

    return reduce.export(write)
