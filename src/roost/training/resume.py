"""What a killed run needs to go on exactly: checkpoints, and a log that ends where the checkpoint does.

Owns: the file step-N.pt (trained parameters, optimiser, position, loss scale, and the settings that decide the run),
what "holds a run" means, and the refusal to resume with other settings.
Refuses to know: how a step is made.
"""

from __future__ import annotations

import pickle
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from roost.files import clear_abandoned, disk_errors, replacing
from roost.models.rwkv import RWKV
from roost.training.metrics import trim

Settings = Mapping[str, Any]
"""Everything that decides the losses of a run: numbers, model and data, by name."""


_UNREADABLE = (RuntimeError, EOFError, KeyError, TypeError, AttributeError, OSError, zipfile.BadZipFile)

UNFINISHED = "unfinished.dcp"
"""The name of a sharded checkpoint while it is being written."""

FINAL = ("final.safetensors", "final.pth", "adapter.safetensors")
"""What a finished run leaves."""


class Position(NamedTuple):
    """Where a run is: steps made, and how many of them were skipped as bad."""

    step: int = 0
    bad: int = 0


class Trained(NamedTuple):
    """What a run changes."""

    model: RWKV
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}


def checkpoints(out: Path, ending: str = "pt") -> list[Path]:
    """The complete checkpoints of a run, oldest first; ending "dcp": those of a sharded one."""
    named = (path for path in out.glob(f"step-*.{ending}") if path.stem.removeprefix("step-").isdecimal())
    return sorted(named, key=lambda path: int(path.stem.removeprefix("step-")))


def trace_of_a_run(out: Path) -> Path | None:
    """A file that shows that `out` holds a run, or None."""
    written = (out / name for name in (*FINAL, "log.jsonl"))
    candidates = [*checkpoints(out), *checkpoints(out, "dcp"), *written]
    return next((path for path in candidates if path.exists()), None)


def save(out: Path, position: Position, trained: Trained, settings: Settings, keep: int) -> Path:
    """Write step-N.pt atomically, then drop all but the newest `keep`. Raises OSError when the disk is full.

    A directory that has vanished is made again.
    """
    content = {
        "step": position.step,
        "bad": position.bad,
        "settings": dict(settings),
        "model": {name: value.detach() for name, value in trained.parameters().items()},
        "optimiser": trained.optimiser.state_dict(),
        "moments": len(trained.optimiser.state),
        "scaler": trained.scaler.state_dict(),
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"step-{position.step}.pt"
    with replacing(path) as temporary, disk_errors(path):
        torch.save(content, temporary)
    for old in checkpoints(out)[:-keep]:
        old.unlink()
    return path


def same_settings(path: Path, stored: Settings, settings: Settings) -> None:
    """Raise ValueError, naming the first difference, unless a checkpoint was made by a run with the same settings."""
    for name in sorted({*stored, *settings}):
        if stored.get(name) != settings.get(name):
            raise ValueError(
                f"{path} was trained with {name} = {stored.get(name)}, not {settings.get(name)}: a resume keeps it"
            )


def damaged(saved: list[Path], error: Exception) -> ValueError:
    """What to say when the newest of these checkpoints cannot be read."""
    before = f"; the run then goes on from {saved[-2].name}" if len(saved) > 1 else "; the run then starts anew"
    return ValueError(f"{saved[-1]} is damaged: delete it{before} ({error})")


def restore(out: Path, trained: Trained, settings: Settings) -> Position:
    """Load the newest checkpoint of `out`, if any, and return its position (the start without one).

    Raises ValueError when the checkpoint is damaged, or when a setting differs from the one it was trained with.
    """
    saved = checkpoints(out)
    if not saved and checkpoints(out, "dcp"):
        raise ValueError(f"{out} holds a sharded run: resume it sharded, or choose another directory")
    return _load(saved, trained, settings) if saved else Position()


def tidy(out: Path, position: Position) -> None:
    """Clear what a killed process left half-written, and the log after `position`."""
    clear_abandoned(out)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    trim(out / "log.jsonl", position.step)


def _load(saved: list[Path], trained: Trained, settings: Settings) -> Position:
    path = saved[-1]
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch does not look at the checksums
                raise RuntimeError("its checksums do not match")
        content: dict[str, Any] = torch.load(path, map_location=trained.model.device, weights_only=True)
        stored, weights, moments = (content[key] for key in ("settings", "model", "optimiser"))
        position, scale = Position(content["step"], content["bad"]), content["scaler"]
        if path.stem != f"step-{position.step}" or not all(isinstance(x, dict) for x in (stored, weights, moments)):
            raise RuntimeError(f"its contents are not those of a checkpoint of step {path.stem.removeprefix('step-')}")
        same_settings(path, stored, settings)
        parameters = trained.parameters()
        if {name: value.shape for name, value in weights.items()} != {n: p.shape for n, p in parameters.items()}:
            odd = sorted(weights.keys() ^ parameters.keys()) or ["a shape"]
            raise ValueError(f"{path} holds other trained parameters than this run: {odd[0]} differs")
        if len(moments["state"]) != content["moments"]:
            raise RuntimeError("the optimiser's moments are not in it")
        trained.optimiser.load_state_dict(moments)
        trained.scaler.load_state_dict(scale)
    except (*_UNREADABLE, pickle.UnpicklingError) as error:
        raise damaged(saved, error) from error
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return position
