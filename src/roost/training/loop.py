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

from roost.checks import instance
from roost.models.rwkv import RWKV, check_storable
from roost.training.config import TrainConfig
from roost.training.loss import next_token_loss
from roost.training.optim import learning_rate, optimiser
from roost.training.resume import restore, save, trace_of_a_run
from roost.training.validation import Held, validate


@runtime_checkable
class Batches(Protocol):
    """What the loop needs of data: a pure function from step to (inputs, targets), both (B, T) int64."""

    @property
    def identity(self) -> Mapping[str, int | str]:
        """What decides the batches, by name; a resumed run must have the same."""
        ...

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
    model. With `resume` the run goes on from the newest checkpoint, or starts if there is none.

    Raises ValueError when config.out already holds a run and `resume` is false, when a resume changes what decides the
    run, when the weights are 16-bit (use precision "bf16" with fp32 weights), and when the loss or a gradient is not
    finite.
    """
    _check(model, data, config)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    adam = optimiser(model, config)
    for name, held in (validation or {}).items():
        if len(held.tokens) < 2:
            raise ValueError(f"the validation stream {name} has {len(held.tokens)} token(s); at least 2 are needed")
    trace = trace_of_a_run(out)
    if trace and not resume:
        raise ValueError(f"{out} already holds a run ({trace.name}): resume it, or choose another directory")
    settings = _settings(model, data, config)
    step = restore(out, model, adam, settings) if resume else 0
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
            save(out, step, model, adam, settings, config.keep)
            clock, logged = time.perf_counter(), step

    model.eval()
    final = out / "final.safetensors"
    model.save(final)
    return final


def _check(model: RWKV, data: object, config: object) -> None:
    instance("data", data, Batches, "such as roost.TokenLoader(path, ctx, batch)")
    instance("config", config, TrainConfig)
    if model.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the weights are {model.dtype}: training needs fp32; precision='bf16' is for products")
    check_storable(model.config)


def _settings(model: RWKV, data: Batches, config: TrainConfig) -> dict[str, Any]:
    """Everything that decides the losses of a run."""
    free = ("out", "save_every", "keep", "validate_every", "log_every")
    numbers = {name: value for name, value in asdict(config).items() if name not in free}
    settings = {**numbers, **asdict(model.config), **data.identity}
    for name, value in settings.items():
        if type(value) not in (int, float, str, bool):  # a checkpoint holds plain values only
            raise ValueError(
                f"{name} is a {type(value).__name__}; the identity of the data must be plain numbers or text"
            )
    return settings


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


def _log(out: Path, line: dict[str, Any]) -> None:
    with (out / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
