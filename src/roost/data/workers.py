"""Several threads or processes that make shards.

Owns: handing out units, starting workers, and their end. Threads share the work of a few cores: the native tokenizer
lets others run Python meanwhile, and they need not load torch. More cores, or a tokenizer in Python, need processes: a
worker process is this Python with `shards.serve`, which reads its
input until it ends: it cannot outlive the process that started it, however that one dies. Not multiprocessing, whose
workers run the caller's script again and stay when it is killed.
Refuses to know: what a shard is made of.
"""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from roost import native
from roost.data.shards import Unit, make
from roost.tokenizer import WorldTokenizer

_SERVE = "import sys; sys.path[:] = {!r}; from roost.data.shards import serve; serve()"


MOST_THREADS = 4
"""Beyond, parsing (one thread at a time) would hold up encoding."""


WORTH_A_PROCESS = 1 << 26
"""Bytes of text below which starting a process, which loads torch, takes longer than it helps."""


def threaded(workers: int) -> bool:
    """Whether so many workers are threads."""
    return native.available() and workers <= MOST_THREADS


class _Stopped(Exception):
    """Another worker failed: what this one makes is not needed."""


class _Queue:
    """Units to be handed out, what each thread is at, and the first error."""

    def __init__(self, units: Iterator[Unit], finished: Callable[[Unit], object]) -> None:
        self._units, self._finished = units, finished
        self._lock = threading.Lock()
        self._read: dict[Unit, int] = {}
        self.error: BaseException | None = None
        self.workers: list[subprocess.Popen[bytes]] = []

    def next(self) -> Unit | None:
        with self._lock:
            return None if self.error else next(self._units, None)

    def heard(self, unit: Unit, read: int) -> None:
        with self._lock:
            if self.error:
                raise _Stopped
            self._read[unit] = min(read, unit.size)

    def done(self, unit: Unit) -> None:
        with self._lock:
            self._read[unit] = unit.size
            self._finished(unit)

    def fail(self, error: BaseException) -> None:
        with self._lock:
            self.error = self.error or error

    @property
    def read(self) -> int:
        with self._lock:
            return sum(self._read.values())


def run(
    units: Iterator[Unit],
    tokenizer: WorldTokenizer,
    folder: Path,
    workers: int,
    size: int,
    tell: Callable[[int], None],
    finished: Callable[[Unit], object],
) -> None:
    """Make the shards of all units in `folder` with `workers` threads or processes, of which this one is the first.

    size      bytes of all units: little text starts no processes
    tell      hears in this thread how many bytes are read by now
    finished  is called after each unit, before another is taken from `units`; never twice at once

    Raises the first error of any of them; the others are stopped, and what they had finished stays.
    """
    queue = _Queue(units, finished)
    if not threaded(workers) and size < WORTH_A_PROCESS:
        workers = 1
    work = _make if threaded(workers) else _drive
    threads = [threading.Thread(target=work, args=(queue, tokenizer, folder)) for _ in range(workers - 1)]
    for thread in threads:
        thread.start()
    try:
        while unit := queue.next():

            def heard(read: int, unit: Unit = unit) -> None:
                queue.heard(unit, read)
                tell(queue.read)

            make(unit, tokenizer, folder, heard)
            queue.done(unit)
            tell(queue.read)
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
                tell(queue.read)
    except _Stopped:
        pass
    except BaseException as error:
        queue.fail(error)
        for worker in queue.workers:
            worker.kill()
        raise
    finally:
        for thread in threads:
            thread.join()
    if queue.error:
        raise queue.error


def _make(queue: _Queue, tokenizer: WorldTokenizer, folder: Path) -> None:
    """One thread of this process."""
    try:
        while unit := queue.next():
            make(unit, tokenizer, folder, partial(queue.heard, unit))
            queue.done(unit)
    except _Stopped:
        pass
    except Exception as error:
        queue.fail(error)


def _drive(queue: _Queue, tokenizer: WorldTokenizer, folder: Path) -> None:
    """One worker process, fed until there are no units left."""
    command, worker = [sys.executable, "-c", _SERVE.format(sys.path)], None
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
            queue.workers.append(worker)
            assert worker.stdin and worker.stdout
            pickle.dump((tokenizer, folder), worker.stdin)
            while unit := queue.next():
                pickle.dump(unit, worker.stdin)
                worker.stdin.flush()
                answer: Any = 0
                while isinstance(answer, int):
                    queue.heard(unit, answer)
                    answer = pickle.load(worker.stdout)
                if answer is not None:
                    raise answer
                queue.done(unit)
    except _Stopped:
        pass
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        code = worker.returncode if worker else 0
        why = f"{signal.Signals(-code).name}; out of memory?" if code < 0 else f"exit code {code}"
        text = f"a worker process died ({why}): run again with fewer workers, what is finished is kept"
        queue.fail(ValueError(text))
    except Exception as error:
        queue.fail(error)
