"""The training loop, visible in full: batch, loss, gradients, step, log, checkpoint, validation.

Owns: the order of a step, and exact resume: a run that is killed and resumed on the same machine gives the same losses
and weights, because a batch is a pure function of the step and a checkpoint holds everything else.
Refuses to know: recipes, command lines and how documents became tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from roost.files import replacing
from roost.models.rwkv import RWKV
from roost.training.config import TrainConfig
from roost.training.loss import next_token_loss
from roost.training.optim import learning_rate, optimiser
from roost.training.validation import Held, validate


@runtime_checkable
class Batches(Protocol):
    """What the loop needs of data: a pure function from step to (inputs, targets), both (B, T) int64."""

    def batch_at(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of one step, the same every time."""
        ...


class Progress(NamedTuple):
    """Where a run is, after a step: for a progress bar."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float


def train(
    model: RWKV,
    data: Batches,
    config: TrainConfig,
    *,
    validation: Mapping[str, Held] | None = None,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Train `model` in place until `config.steps`, and write `final.safetensors`; returns its path.

    Writes to config.out: log.jsonl (one object per log line or validation), step-N.pt (the newest `keep`) and the final
    model. With `resume` the run goes on from the newest checkpoint, or starts if there is none. Raises ValueError when
    config.out already holds a run and `resume` is false, and when the loss or a gradient is not finite.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    adam = optimiser(model, config)
    saved = checkpoints(out)
    if saved and not resume:
        raise ValueError(f"{out} already holds a run up to {saved[-1].name}: resume it, or choose another directory")
    step = _restore(saved[-1], model, adam, config) if saved else 0
    _trim_log(out / "log.jsonl", step)
    model.train()
    model.fingerprint = ""  # the weights change from here on
    clock, logged = time.perf_counter(), step

    while step < config.steps:
        inputs, targets = (x.to(model.device) for x in data.batch_at(step))
        rate = learning_rate(step, config)
        loss, norm = _step(model, adam, inputs, targets, rate, config, step)
        step += 1

        if step % config.log_every == 0 or step == config.steps:
            speed = (step - logged) * inputs.numel() / (time.perf_counter() - clock)
            line = {"step": step, "loss": loss, "lr": rate, "gradient_norm": norm, "tokens_per_second": round(speed)}
            _log(out, line)
            if progress:
                progress(Progress(step, config.steps, loss, speed))
            clock, logged = time.perf_counter(), step
        if validation and (step == config.steps or (config.validate_every and step % config.validate_every == 0)):
            for name, held in validation.items():
                nats, bits = validate(model, held)
                _log(out, {"step": step, "validation": name, "loss": nats, "bits_per_byte": bits})
            clock, logged = time.perf_counter(), step
        if step % config.save_every == 0 and step < config.steps:
            _save(out, step, model, adam, config)
            clock, logged = time.perf_counter(), step

    model.eval()
    final = out / "final.safetensors"
    model.save(final)
    return final


def _step(
    model: RWKV, adam: torch.optim.AdamW, inputs: Tensor, targets: Tensor, rate: float, config: TrainConfig, step: int
) -> tuple[float, float]:
    """One optimiser step: (cross-entropy in nats per token, gradient norm before clipping)."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        logits, _ = model(inputs)
    objective, entropy = next_token_loss(logits, targets, config.l2wrap)
    adam.zero_grad(set_to_none=True)
    objective.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    if not (torch.isfinite(norm) and torch.isfinite(objective)):
        raise ValueError(
            f"step {step}: loss {entropy.item()}, gradient norm {norm.item()}; the weights are as they were before"
            f" this step: lower lr (now {rate:g}) or raise eps and resume from the last checkpoint"
        )
    for group in adam.param_groups:
        group["lr"] = rate * group["scale"]
    adam.step()
    return entropy.item(), norm.item()


def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(out.glob("step-*.pt"), key=lambda path: int(path.stem.split("-")[1]))


def _save(out: Path, step: int, model: RWKV, adam: torch.optim.AdamW, config: TrainConfig) -> None:
    content = {
        "step": step,
        "config": asdict(config),
        "model": model.state_dict(),
        "optimiser": adam.state_dict(),
    }
    with replacing(out / f"step-{step}.pt") as temporary:
        torch.save(content, temporary)
    for old in checkpoints(out)[: -config.keep]:
        old.unlink()


def _restore(path: Path, model: RWKV, adam: torch.optim.AdamW, config: TrainConfig) -> int:
    content: dict[str, Any] = torch.load(path, map_location=model.device, weights_only=True)
    free = {"steps", "out", "save_every", "keep", "validate_every", "log_every"}
    for name, value in content["config"].items():
        if name not in free and value != getattr(config, name):
            raise ValueError(
                f"{path} was trained with {name} = {value}, not {getattr(config, name)}: a resume keeps it"
            )
    model.load_state_dict(content["model"])
    adam.load_state_dict(content["optimiser"])
    return content["step"]


def _log(out: Path, line: dict[str, Any]) -> None:
    with (out / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _trim_log(path: Path, step: int) -> None:
    """Drop the lines after `step`, which the resumed run will write again."""
    if not path.is_file():
        return
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step]
    with replacing(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
