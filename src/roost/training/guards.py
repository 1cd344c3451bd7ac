"""What keeps a run from ending badly: signals that wait for the end of a step, and the batch behind a bad one.

Owns: SIGINT and SIGTERM during a run (the second one takes effect at once), the file bad-step-N.pt, randomness as a
function of (seed, step, part), so that a resumed run needs no generator's state.
Refuses to know: how a step is made and what is saved.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from roost.data.batch import Batch
from roost.files import disk_errors, replacing


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop; it finished its step, and `path` (None: the save failed) is what it goes on from."""

    def __init__(self, signum: int, step: int, path: Path | None) -> None:
        self.signum, self.step, self.path = signum, step, path
        kept = f"saved {path}: resume to go on" if path else "it could not be saved: the checkpoint before it stands"
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}; {kept}")


class Signals:
    """Which signal has asked the run to stop; 0 = none yet."""

    def __init__(self) -> None:
        self.caught = 0


@contextmanager
def catching() -> Generator[Signals, None, None]:
    """Note SIGINT and SIGTERM inside the block in place of unwinding; a second one does what it did before.

    Only the main thread can; elsewhere nothing is caught. A signal that was ignored stays ignored.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before: dict[int, Any] = {}

    def note(signum: int, _frame: FrameType | None) -> None:
        signals.caught = signum
        for other, handler in before.items():
            signal.signal(other, handler)

    for signum in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(signum)
        if handler is not signal.SIG_IGN and handler is not None:
            before[signum] = handler
    for signum in before:
        signal.signal(signum, note)
    try:
        yield signals
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def drawing(device: torch.device, seed: int, step: int, part: int) -> Generator[None, None, None]:
    """Inside, torch's generators begin from a function of (seed, step, part); afterwards they are as before."""
    mixed = int(np.random.SeedSequence([seed, step, part]).generate_state(1, np.uint64)[0])
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(mixed)  # torch.manual_seed would seed every GPU, and one is put back
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index  # pyright: ignore[reportUnnecessaryComparison]
            torch.cuda.default_generators[index].manual_seed(mixed)
        yield


def dump(path: Path, parts: Sequence[Batch], content: dict[str, Any]) -> None:
    """Write the parts of a batch, and what is known of its step, with torch.save. Raises OSError from the disk."""
    batches = [{field.name: getattr(part, field.name) for field in fields(part)} for part in parts]
    with replacing(path) as temporary, disk_errors(path):
        torch.save({**content, "parts": batches}, temporary)
