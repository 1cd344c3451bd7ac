"""Checkpoints of sharded runs: every rank writes and reads its own shards, through torch.distributed.checkpoint.

The directory step-N.dcp holds the parameters that are trained and the moments of the optimiser under their official
names, and run.json the position, the loss scale and the settings. It is written under another name and renamed when all
ranks have finished, so a killed run leaves the one before. Any number of ranks can read it.

Owns: that directory. Refuses to know: how a model is sharded and how a step is made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from roost.files import replacing
from roost.training.resume import UNFINISHED, Position, Settings, Trained, checkpoints, damaged, same_settings

OnMain = Callable[[Callable[[], Path]], Path]
"""Calls a function on the main rank and returns its answer, or raises its error, on every rank."""


def save_sharded(
    out: Path, position: Position, trained: Trained, settings: Settings, keep: int, on_main: OnMain
) -> Path:
    """Write step-N.dcp, then drop all but the newest `keep`; every rank calls it. Raises OSError on every rank."""
    unfinished = out / UNFINISHED

    def begin() -> Path:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)  # also where `out` has vanished
        return unfinished

    def finish() -> Path:
        path = out / f"step-{position.step}.dcp"
        content = {**position._asdict(), "scaler": trained.scaler.state_dict(), "settings": dict(settings)}
        with replacing(unfinished / "run.json") as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)
        for old in checkpoints(out, "dcp")[:-keep]:
            shutil.rmtree(old)
        return path

    on_main(begin)
    try:
        save(_tensors(trained), checkpoint_id=unfinished)
    except CheckpointException as error:
        raise OSError(f"could not write a checkpoint of step {position.step} to {out}: {error}") from error
    return on_main(finish)


def restore_sharded(out: Path, trained: Trained, settings: Settings) -> Position:
    """Load the newest step-N.dcp of `out`, if any, and return its position; every rank calls it.

    Raises ValueError when it is damaged, when a setting or a trained parameter differs, and when the run was saved
    unsharded.
    """
    saved = checkpoints(out, "dcp")
    if not saved:
        if checkpoints(out):
            raise ValueError(f"{checkpoints(out)[-1]} was saved unsharded: resume it so, or choose another directory")
        return Position()
    path = saved[-1]
    try:
        content = json.loads((path / "run.json").read_text(encoding="utf-8"))
        stored, position = content["settings"], Position(content["step"], content["bad"])
        names = FileSystemReader(path).read_metadata().state_dict_metadata.keys()
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise damaged(saved, error) from error
    same_settings(path, stored, settings)
    parameters = trained.parameters()
    odd = sorted({f"model.{name}" for name in parameters} ^ {name for name in names if name.startswith("model.")})
    if odd:
        raise ValueError(f"{path} holds other trained parameters than this run: {odd[0]} differs")
    _load(saved, trained, parameters, list(names))
    trained.scaler.load_state_dict(content["scaler"])
    return position


def _tensors(trained: Trained) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained.parameters().items():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in trained.optimiser.state[parameter].items():
            tensors[f"optimiser.{name}.{key}"] = value
    return tensors


def _load(saved: list[Path], trained: Trained, parameters: dict[str, torch.nn.Parameter], names: list[str]) -> None:
    tensors: dict[str, Tensor] = {}
    for name in names:
        kind, _, rest = name.partition(".")
        if kind == "model":
            tensors[name] = parameters[rest].detach()  # the same memory
            continue
        owner, _, key = rest.rpartition(".")
        parameter = parameters[owner]
        value = torch.zeros((), device=parameter.device) if key == "step" else torch.zeros_like(parameter).detach()
        tensors[name] = trained.optimiser.state[parameter][key] = value
    try:
        load(tensors, checkpoint_id=saved[-1])
    except CheckpointException as error:  # no Exception: it holds those of all ranks
        raise damaged(saved, RuntimeError(error)) from error
