"""What a run says about itself: one JSON object a line, and speed.

Owns: log.jsonl and its copies for TensorBoard and Weights & Biases; FLOPs of a token (training.md: every matrix product
once forward and twice backward, and 7 N A L for the recurrence each time); tokens/s, the share of the device, memory.
Refuses to know: what is trained and why.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

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

    A full disk costs no line: what could not be written is written with the next one.
    Raises ValueError when TensorBoard or Weights & Biases are wanted and not installed.
    """

    def __init__(self, config: TrainConfig, *, active: bool = True) -> None:
        self.path, self.active, self.pending = Path(config.out) / "log.jsonl", active, ""
        self.board = _tensorboard(config.out) if active and config.tensorboard else None
        self.wandb = _wandb(config) if active and config.wandb else None

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
        if self.board is not None:
            for key, value in numbers.items():
                self.board.add_scalar(key, value, line["step"])
        if self.wandb is not None:
            self.wandb.log(numbers, step=line["step"])

    def close(self) -> None:
        """Finish the copies."""
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def trim(path: Path, step: int) -> None:
    """Drop the lines of a log after `step`, which will be written again, and a last line that was cut short."""
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


def _shorten(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _tensorboard(out: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter  # pyright: ignore[reportPrivateImportUsage]
    except ImportError as error:
        raise ValueError("tensorboard = true needs TensorBoard: pip install tensorboard") from error
    return SummaryWriter(out)


def _wandb(config: TrainConfig) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"wandb = {config.wandb!r} needs Weights & Biases: pip install wandb") from error
    from dataclasses import asdict

    return wandb.init(project=config.wandb, dir=config.out, config=asdict(config), name=Path(config.out).name)
