"""What a run says about itself: one JSON object a line, and speed.

Owns: log.jsonl and its copies for TensorBoard and Weights & Biases; FLOPs of a token (training.md: every matrix product
once forward and twice backward, and 7 N A L for the recurrence each time); tokens/s, the share of the device, memory.
Refuses to know: what is trained and why.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from roost.config import ModelConfig
from roost.files import replacing
from roost.training.config import TrainConfig


def flops_per_token(config: ModelConfig) -> int:
    """FLOPs of forward and backward for one token: 6 (L (13 D^2 + rho D) + V D) + 21 N A L; rho = 448 for Finch.

    Elementwise work, recomputation and the embedding are not counted. 13 D^2 is 5 D A + 2 D F + D^2 in general.
    """
    D, A, F, L = config.n_embd, config.dim_att, config.dim_ffn, config.n_layer
    matrices = (5 if config.gate and config.generation != "dove" else 4) * D * A + 2 * D * F + D * D
    if config.generation == "finch":
        matrices += 10 * D * config.shift_rank + (D + A) * config.decay_rank
    return 6 * (L * matrices + config.vocab_size * D) + 21 * config.head_size * A * L


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two square matrices on this device, the best of five; on meta 0."""
    if device.type == "meta":
        return 0.0
    n = 512 if device.type == "cpu" else 8192
    a, b = (torch.full((n, n), 0.5, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        torch.matmul(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def memory(device: torch.device) -> int:
    """Bytes at the peak: of tensors on an accelerator, of the process on a CPU; 0 where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Meter:
    """Speed since the last line. Saving, validation and their kind do not count: `restart` after them."""

    def __init__(self, device: torch.device, flops: int, peak: float) -> None:
        self.device, self.flops, self.peak = device, flops, peak
        self.restart()

    def restart(self) -> None:
        """Forget what was counted."""
        self.start, self.tokens, self.waited = time.perf_counter(), 0.0, 0.0

    def figures(self) -> dict[str, float | int]:
        """Tokens/s, FLOP/s, their share of the peak, bytes of memory and the share of the time that data took."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        speed = self.tokens / seconds
        found = {
            "tokens_per_second": round(speed),
            "flops_per_second": round(speed * self.flops),
            "peak_share": round(speed * self.flops / self.peak, 4) if self.peak else 0.0,
            "memory_bytes": memory(self.device),
            "data_wait": round(self.waited / seconds, 4),
        }
        self.restart()
        return found


class Log:
    """Lines of a run, in out/log.jsonl at once, and elsewhere as the config says; nothing anywhere when not `active`.

    `step` is where the run goes on: TensorBoard hides what a killed run wrote after it, and Weights & Biases go on with
    the run of this directory. A full disk costs no line: what could not be written is written with the next one.
    TensorBoard or Weights & Biases that fail later get no more lines, which is a warning. `listener` is called with
    every line.
    Whether they are installed is for `start.check_packages` to say.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        step: int = 0,
        active: bool = True,
        listener: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.path, self.active, self.pending, self.listener = Path(config.out) / "log.jsonl", active, "", listener
        self.step, self.copies = step, dict[str, _Copy]()
        if active and config.tensorboard:
            self.copies["TensorBoard"] = _TensorBoard(config.out, step)
        if active and config.wandb:
            self.copies["Weights & Biases"] = _Wandb(config)

    def write(self, line: dict[str, Any]) -> None:
        """Add one object; it has a "step". Numbers also go to TensorBoard and Weights & Biases."""
        if not self.active:
            return
        self.pending += json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n"
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self.pending)
            self.pending = ""
        except OSError:  # kept in `pending`, for the next line
            if self.path.exists():
                _shorten(self.path, before)
        name = line.get("validation")
        numbers = {key: value for key, value in line.items() if type(value) in (int, float) and key != "step"}
        numbers = {f"{name}/{key}" if name else f"train/{key}": value for key, value in numbers.items()}
        self.step = line["step"]
        if numbers:
            self._copies(lambda copy: copy.write(numbers, self.step))
        if self.listener:
            self.listener(line)

    def close(self) -> None:
        """Finish the copies."""
        self._copies(lambda copy: copy.close())

    def _copies(self, act: Callable[[_Copy], None]) -> None:
        for name, copy in list(self.copies.items()):
            try:
                act(copy)
            except Exception as error:  # wandb has its own kinds; reported, and no reason to end a run
                del self.copies[name]
                self.write({"step": self.step, "warning": f"{name} failed and gets no more lines: {error}"})


def trim(path: Path, step: int) -> None:
    """Drop the lines of a log after `step`, which will be written again, and whatever was cut short."""
    if not path.is_file():
        return
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # a sample may hold other line ends
        with suppress(json.JSONDecodeError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    with replacing(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _shorten(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Copy(Protocol):
    """Where numbers go besides log.jsonl."""

    def write(self, numbers: dict[str, int | float], step: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, out: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # pyright: ignore[reportPrivateImportUsage]

        self._writer: Any = SummaryWriter(out, purge_step=step + 1)

    def write(self, numbers: dict[str, int | float], step: int) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """The run's name there lies in out/wandb-id: another run in the same place, or elsewhere of the same name, has its
    own. Lines that a killed run had sent are ignored there when the resumed one sends them again."""

    def __init__(self, config: TrainConfig) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        out = Path(config.out)
        path = out / "wandb-id"
        if not path.exists():
            with replacing(path) as temporary:
                temporary.write_text(secrets.token_hex(8), encoding="utf-8")
        names = {"project": config.wandb, "id": path.read_text(encoding="utf-8"), "name": out.name}
        self._run: Any = wandb.init(**names, resume="allow", dir=config.out, config=asdict(config))

    def write(self, numbers: dict[str, int | float], step: int) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()
