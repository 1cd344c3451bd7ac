"""What every benchmark shares: the stamp of the machine, fair timing, and the file that results go to.

Owns: the form of a result, {"benchmark", "stamp", "rows"}, and the rule that variants are timed in turn, so that a
machine that slows down slows all of them. Refuses to know: what is measured.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def stamp() -> dict[str, Any]:
    """Where and with what the figures were measured: processor, cores, memory, accelerator, versions, commit, time."""
    return {
        "cpu": _proc("cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(int((_proc("meminfo", "MemTotal") or "0 kB").split()[0]) / 2**20, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "load": round(os.getloadavg()[0], 2),
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def alternate(
    variants: Mapping[str, Callable[[], object]], *, rounds: int, sync: Callable[[], object] = lambda: None
) -> dict[str, dict[str, float]]:
    """Time each variant `rounds` times, in turn, after one unmeasured call each; seconds: median, min, max.

    `sync` is called before every reading of the clock (torch.cuda.synchronize on a GPU).
    Raises ValueError when rounds is not positive.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; at least one is needed")
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            sync()
            start = time.perf_counter()
            run()
            sync()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "median_s": round(statistics.median(taken), 7),
            "min_s": round(min(taken), 7),
            "max_s": round(max(taken), 7),
        }
        for name, taken in seconds.items()
    }


def write(name: str, rows: Sequence[Mapping[str, Any]], out: str | os.PathLike[str] | None) -> None:
    """Write the rows with the stamp as JSON to `out`, or to standard output when it is None.

    Raises ValueError when the directory of `out` does not exist.
    """
    text = json.dumps({"benchmark": name, "stamp": stamp(), "rows": rows}, indent=1, ensure_ascii=False) + "\n"
    if out is None:
        sys.stdout.write(text)
        return
    from roost.files import replacing

    with replacing(out) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _proc(file: str, key: str) -> str | None:
    path = Path("/proc") / file
    if not path.is_file():
        return None
    values = (line.split(":", 1)[1].strip() for line in path.read_text().splitlines() if line.startswith(key))
    return next(values, None)


def _commit() -> str | None:
    """The commit of the working tree, "-dirty" when it differs from it; None outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
