"""The training loop, visible in full: batch, loss, gradients, step, log, validation, checkpoint.

    for each part of the step's batch:   (objective(model, part).loss / targets in the whole step).backward()
    clip, AdamW at the rate of the step

Owns: the order of a step, and exact resume: a run that is killed and resumed on the same machine gives the same losses
and weights, because a batch, the rate and every random draw are pure functions of the step and a checkpoint holds
everything else.
Refuses to know: recipes, command lines, how documents became tokens, what the objective is, process groups.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from roost.data.batch import Batch, Batches
from roost.files import locked
from roost.models.rwkv import RWKV
from roost.training.blocks import prepared
from roost.training.config import TrainConfig
from roost.training.guards import Interrupted, Signals, catching, drawing, dump
from roost.training.loss import Objective, next_token_sums
from roost.training.metrics import Log, Meter, flops_per_token, measured_peak
from roost.training.optim import learning_rate, optimiser
from roost.training.reducer import Alone, Reducer
from roost.training.resume import Position, Trained, tidy
from roost.training.start import Length, check_packages, check_run, check_start, length_of, save_model, settings_of
from roost.training.validation import Held, validate_all

LOST = -(2**40)
"""The count of a rank that has no data: no other ranks' counts make the sum positive."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Progress(NamedTuple):
    """Where a run is, and the line that its log got: of a step, a validation, a sample or a warning."""

    step: int
    steps: int
    line: Mapping[str, Any]


class Loaded(NamedTuple):
    """The inputs of one step: the parts of this rank, the targets of all ranks, the seconds that reading took."""

    parts: list[Batch]
    targets: int
    waited: float


class StepResult(NamedTuple):
    """One step: nats per token, gradient norm before clipping (where finite), whether it was skipped, its inputs."""

    loss: float
    norm: float
    skipped: bool
    parts: list[Batch]


def train(
    model: RWKV,
    data: Batches,
    config: TrainConfig,
    *,
    objective: Objective | None = None,
    validation: Mapping[str, Held] | None = None,
    sample: Callable[[RWKV], str] | None = None,
    save_final: Callable[[Path], Path] | None = None,
    reduce: Reducer | None = None,
    identity: Mapping[str, int | float | str] | None = None,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Train `model` in place to the end that `config` names, and write the final model; returns its path.

    objective   what is minimised; default: cross-entropy of the next token, and L2Wrap
    validation  held-out streams by name
    sample      writes a short text with the model; logged after every validation
    save_final  out -> path of what was written; default: model.save(out / "final.safetensors")
    reduce      the ranks of a run on several devices
    identity    what else decides the run, by name (of an adapter, say); a resumed run must have the same
    progress    called with every line of the log, where the log is written: on the main rank

    Trains the parameters that require a gradient. Writes to config.out: log.jsonl (one object per log line, validation
    or warning), step-N.pt (the newest `keep`), bad-step-N.pt (the batch of a skipped step) and the final model. With
    `resume` the run goes on from the newest checkpoint, or starts if there is none.

    Raises ValueError, before any work, when config.out already holds a run and `resume` is false, when another process
    writes there, when a resume changes what decides the run, when the weights are 16-bit (use precision "bf16" with
    fp32 weights); later when more than max_bad_steps steps had a loss or gradient that is not finite. An error of the
    data, such as a file that changed, leaves after a checkpoint. Raises Interrupted, a KeyboardInterrupt, after SIGINT
    or SIGTERM (in the main thread): the step is finished and saved. A checkpoint that the disk refuses is a warning in
    the log, and so is a directory that vanished; a final model that the disk refuses raises OSError.
    """
    check_run(model, data, config, validation, storable=save_final is None)
    check_packages(config)
    run = _Run(model, data, config, objective, reduce or Alone(), identity or {})
    out = check_start(config.out, resume=resume)
    with locked(out / ".lock", out) if run.reduce.is_main else nullcontext():
        run.restore(out, resume=resume)
        listener = partial(_tell, progress, run.length.steps) if progress else None
        log = Log(config, step=run.position.step, active=run.reduce.is_main, listener=listener)
        validating = partial(_validate, run, log, validation or {}, sample)
        model.train()
        model.fingerprint = ""  # the weights change from here on

        try:
            with prepared(model, config), catching() as signals:
                _steps(run, out, log, signals, validating)
            model.eval()
            out.mkdir(parents=True, exist_ok=True)  # should it have vanished
            return save_model(model, out, config, save_final, run.reduce)
        finally:
            model.eval()
            log.close()


def _steps(
    run: _Run,
    out: Path,
    log: Log,
    signals: Signals,
    validating: Callable[[], None],
) -> None:
    """All steps that are left, with what belongs after each. Raises Interrupted."""
    config, model = run.config, run.model
    dtype = model.dtype if config.precision == "fp32" else DTYPES[config.precision]
    peak = (config.peak_flops or measured_peak(model.device, dtype)) * run.reduce.ranks
    meter, saved = Meter(model.device, flops_per_token(model.config), peak), time.monotonic()
    while run.position.step < run.length.steps:
        try:
            loaded = run.load()
        except (ValueError, OSError):
            if run.position.step:
                run.save(out, log)
            raise
        result = run.step(loaded)
        step, last = run.position.step, run.position.step == run.length.steps
        meter.tokens, meter.waited = meter.tokens + run.length.tokens, meter.waited + loaded.waited
        if result.skipped:
            run.figures()  # dropped: the step may have left NaN in them
            run.guard(out, log, result)
        elif step % config.log_every == 0 or last:
            figures = meter.figures()
            norm = {"gradient_norm": result.norm} if isfinite(result.norm) else {}  # fp16 looks for its scale
            line = {"loss": result.loss, "lr": run.rate(step - 1), **norm}
            log.write({"step": step, "tokens": round(step * run.length.tokens), **line, **run.figures(), **figures})
        if last or (config.validate_every and step % config.validate_every == 0):
            validating()
            meter.restart()
        asked = run.reduce.max_counts(signals.caught)
        timed = int(time.monotonic() - saved >= 60 * config.save_minutes > 0)
        due = step % config.save_every == 0 or bool(config.save_minutes and run.reduce.max_counts(timed))
        if not last and (asked or due):
            path = run.save(out, log)
            saved = time.monotonic()
            meter.restart()
            if asked:
                raise Interrupted(asked, step, path)


class _Run:
    """What does not change during a run, and its position."""

    def __init__(
        self,
        model: RWKV,
        data: Batches,
        config: TrainConfig,
        objective: Objective | None,
        reduce: Reducer,
        identity: Mapping[str, int | float | str],
    ) -> None:
        self.model, self.config, self.reduce = model, config, reduce
        self.data = reduce.shares(data, config)
        self.objective: Objective = objective or partial(next_token_sums, l2wrap=config.l2wrap)
        self.count: Callable[[Batch], int] = getattr(self.objective, "count", _targets)
        self.length: Length = length_of(data, config)
        self.position = Position()
        scaler = torch.amp.GradScaler(model.device.type, enabled=config.precision == "fp16")
        self.trained = Trained(model, optimiser(model, config), scaler)
        self.settings = settings_of(model, data, config, identity)

    def restore(self, out: Path, *, resume: bool) -> None:
        """Go where the newest checkpoint is."""
        if resume:
            self.position = self.reduce.restore(out, self.trained, self.settings)
            if self.reduce.is_main:
                tidy(out, self.position)
            self.reduce.barrier()

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(step, self.config, self.length.exact)

    def figures(self) -> dict[str, float]:
        """The objective's own, of all ranks since the last call, where finite. Every rank calls it."""
        ask = getattr(self.objective, "figures", None)
        found: dict[str, float] = ask(self.reduce.sum_values) if ask else {}
        return {name: value for name, value in found.items() if isfinite(value)}

    def load(self) -> Loaded:
        """What the next step needs of the data. Where one rank fails, all raise ValueError or OSError."""
        shares, failed = self.config.accumulate * self.reduce.ranks, None
        first, parts, count = self.config.accumulate * self.reduce.rank, list[Batch](), 0
        start = time.perf_counter()
        try:
            parts = [self.data.batch_at(self.position.step, first + i, shares) for i in range(self.config.accumulate)]
            count = sum(self.count(part) for part in parts)
        except (ValueError, OSError) as error:
            failed = error
        waited = time.perf_counter() - start
        total = self.reduce.sum_counts(LOST if failed else count)
        if total < 0:
            raise failed or ValueError(f"another rank could not read its data of step {self.position.step}")
        return Loaded(parts, max(total, 1), waited)

    def step(self, loaded: Loaded) -> StepResult:
        """One optimiser step, or none where the loss or a gradient is not finite. Moves the position on."""
        config, step, (model, adam, scaler) = self.config, self.position.step, self.trained
        parts, count, first = loaded.parts, loaded.targets, config.accumulate * self.reduce.rank
        adam.zero_grad(set_to_none=True)
        device, totals = model.device, torch.zeros(2, device=model.device)  # objective, cross-entropy
        for i, part in enumerate(parts):
            with drawing(device, config.seed, step, first + i):
                with torch.autocast(device.type, DTYPES[config.precision], enabled=config.precision != "fp32"):
                    sums = self.objective(model, part.to(device))
                scaler.scale(sums.loss / count).backward()
            totals += torch.stack([sums.loss.detach(), sums.entropy.detach()]).to(totals.dtype) / count
        parameters = [parameter for group in adam.param_groups for parameter in group["params"]]
        self.reduce.reduce_gradients(parameters)
        totals = self.reduce.sum_values(totals)
        scaler.unscale_(adam)
        norm = _whole(torch.nn.utils.clip_grad_norm_(parameters, config.clip)).item()
        total, loss = totals.tolist()
        finite = isfinite(norm) and isfinite(total)
        for group in adam.param_groups:
            group["lr"] = self.rate(step) * group["scale"]
        if finite:
            scaler.step(adam)
        scale = scaler.get_scale()
        scaler.update()
        searching = isfinite(total) and scale > 1 and scaler.get_scale() < scale  # fp16 looks for its scale
        skipped = not finite and not searching
        self.position = Position(step + 1, self.position.bad + skipped)
        return StepResult(loss, norm, skipped, parts)

    def guard(self, out: Path, log: Log, result: StepResult) -> None:
        """Note a skipped step and keep its batch. Raises ValueError at one too many."""
        step, (loss, norm) = self.position.step - 1, (result.loss, result.norm)
        found = f"loss {loss}, gradient norm {norm}"
        log.write({"step": self.position.step, "warning": f"step {step} was skipped: {found}"})
        rank = f"-rank-{self.reduce.rank}" if self.reduce.ranks > 1 else ""
        path = out / f"bad-step-{step}{rank}.pt"
        try:
            dump(path, result.parts, {"step": step, "loss": loss, "gradient_norm": norm})
        except (OSError, ValueError) as error:  # a full disk; a directory that vanished
            log.write({"step": self.position.step, "warning": f"the batch of step {step} was not kept: {error}"})
        if self.position.bad > self.config.max_bad_steps:
            raise ValueError(
                f"step {step}: {found}; that is bad step {self.position.bad} (max_bad_steps ="
                f" {self.config.max_bad_steps}, its batch is {path}). The weights are as they were before it: lower lr"
                f" (now {self.rate(step):g}) or raise eps, and resume from the last checkpoint"
            )

    def save(self, out: Path, log: Log) -> Path | None:
        """Write a checkpoint; None, and a warning in the log, when the disk refuses it."""
        if not out.is_dir():
            log.write({"step": self.position.step, "warning": f"{out} vanished with all it held; it is made again"})
        try:
            return self.reduce.save(out, self.position, self.trained, self.settings, self.config.keep)
        except OSError as error:
            log.write({"step": self.position.step, "warning": f"no checkpoint: {error}"})
            return None


def _tell(progress: Callable[[Progress], None], steps: int, line: dict[str, Any]) -> None:
    progress(Progress(line["step"], steps, line))


def _targets(part: Batch) -> int:
    return int((part.targets >= 0).sum())


def _whole(norm: Tensor) -> Tensor:
    """A norm of sharded gradients, added up over the ranks."""
    full: Callable[[], Tensor] | None = getattr(norm, "full_tensor", None)
    return full() if full else norm


def _validate(run: _Run, log: Log, streams: Mapping[str, Held], sample: Callable[[RWKV], str] | None) -> None:
    run.model.eval()
    for line in validate_all(run.model, streams):
        log.write({"step": run.position.step, **line})
    if sample:
        log.write({"step": run.position.step, "sample": sample(run.model)})
    run.model.train()
