"""What a killed run needs to go on exactly: checkpoints, and a log that ends where the checkpoint does.

Owns: the file step-N.pt (weights, optimiser, step, and the settings that decide the run), what "holds a run" means, and
the refusal to resume with other settings.
Refuses to know: how a step is made.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from roost.files import clear_abandoned, disk_errors, replacing
from roost.models.rwkv import RWKV

Settings = Mapping[str, Any]
"""Everything that decides the losses of a run: numbers, model and data, by name."""


def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    named = (path for path in out.glob("step-*.pt") if path.stem.removeprefix("step-").isdecimal())
    return sorted(named, key=lambda path: int(path.stem.removeprefix("step-")))


def trace_of_a_run(out: Path) -> Path | None:
    """A file that shows that `out` holds a run, or None."""
    candidates = [*checkpoints(out), out / "final.safetensors", out / "log.jsonl"]
    return next((path for path in candidates if path.exists()), None)


def save(out: Path, step: int, model: RWKV, optimiser: torch.optim.Optimizer, settings: Settings, keep: int) -> None:
    """Write step-N.pt atomically, then drop all but the newest `keep`. Raises OSError when the disk is full."""
    content = {
        "step": step,
        "settings": dict(settings),
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    path = out / f"step-{step}.pt"
    with replacing(path) as temporary, disk_errors(path):
        torch.save(content, temporary)
    for old in checkpoints(out)[:-keep]:
        old.unlink()


def restore(out: Path, model: RWKV, optimiser: torch.optim.Optimizer, settings: Settings) -> int:
    """Load the newest checkpoint of `out`, if any, and return its step (0 without one).

    Clears what a killed process left half-written, here and in the log. Raises ValueError when the checkpoint is
    damaged, or when a setting differs from the one it was trained with.
    """
    clear_abandoned(out)
    saved = checkpoints(out)
    step = _load(saved, model, optimiser, settings) if saved else 0
    _trim(out / "log.jsonl", step)
    return step


def _load(saved: list[Path], model: RWKV, optimiser: torch.optim.Optimizer, settings: Settings) -> int:
    path = saved[-1]
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch does not look at the checksums
                raise RuntimeError("its checksums do not match")
        content: dict[str, Any] = torch.load(path, map_location=model.device, weights_only=True)
        stored, weights, moments, step = (content[key] for key in ("settings", "model", "optimiser", "step"))
    except (RuntimeError, EOFError, KeyError, TypeError, OSError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        before = f"; the run then goes on from {saved[-2].name}" if len(saved) > 1 else "; the run then starts anew"
        raise ValueError(f"{path} is damaged: delete it{before} ({error})") from error
    for name in sorted({*stored, *settings}):
        if stored.get(name) != settings.get(name):
            raise ValueError(
                f"{path} was trained with {name} = {stored.get(name)}, not {settings.get(name)}: a resume keeps it"
            )
    model.load_state_dict(weights)
    optimiser.load_state_dict(moments)
    return step


def _trim(path: Path, step: int) -> None:
    """Drop the lines after `step`, which will be written again, and a last line that was cut short."""
    if not path.is_file():
        return
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            break
    with replacing(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
