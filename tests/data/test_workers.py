"""Kills, crashes and errors while shards are made."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from corpora import BYTES, jsonl, made, texts
from roost.data import prepare as module
from roost.data import shards, workers
from roost.data.prepare import Progress, prepare

KILLED = """
import sys
from pathlib import Path
from roost import WorldTokenizer
from roost.data.prepare import prepare
folder = Path(sys.argv[1])
print("ready", flush=True)
prepare([folder / "x.jsonl"], folder / "out", WorldTokenizer.byte_level(), workers=2, shard_bytes=100_000)
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """SIGKILL while shards are made: nothing half-written is visible, finished shards are kept."""
    (tmp_path / "x.jsonl").write_text(jsonl(*(f"document {i} " * 400 for i in range(2500))))
    prepare([tmp_path / "x.jsonl"], tmp_path / "wanted", BYTES)
    run = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
    assert run.stdout and run.stdout.readline() == b"ready\n"
    parts = tmp_path / "out.parts"
    while not list(parts.glob("*.npz")) and run.poll() is None:
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert run.returncode == -signal.SIGKILL and not list(tmp_path.glob("out.*n"))
    finished = {path: path.stat().st_mtime_ns for path in parts.glob("*.npz")}
    assert finished
    told: list[Progress] = []

    def check(now: Progress) -> None:
        told.append(now)
        if now.done < now.total:
            assert all(path.stat().st_mtime_ns == changed for path, changed in finished.items())

    prepare([tmp_path / "x.jsonl"], tmp_path / "out", BYTES, shard_bytes=100_000, progress=check)
    assert 0 < told[0].done < told[0].total == told[-1].done
    for ending in ("bin", "idx"):
        assert (tmp_path / f"out.{ending}").read_bytes() == (tmp_path / f"wanted.{ending}").read_bytes()
    assert not parts.exists()


BUSY = """
import sys
from pathlib import Path
from roost import WorldTokenizer
from roost.data.prepare import prepare
folder = Path(sys.argv[1])
def wait(now):
    if not now.done:
        print("busy", flush=True)
        sys.stdin.read()
prepare([folder / "x.txt"], folder / "out", WorldTokenizer.byte_level(), progress=wait)
"""


@pytest.mark.slow
def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    """The second is refused at once, whatever it would write; the first one finishes."""
    (tmp_path / "x.txt").write_text("first")
    (tmp_path / "y.txt").write_text("second")
    command = [sys.executable, "-c", BUSY, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"busy\n"
        with pytest.raises(ValueError, match=r"another run is writing .*out\.bin"):
            prepare([tmp_path / "y.txt"], tmp_path / "out", BYTES)
        prepare([tmp_path / "y.txt"], tmp_path / "own", BYTES)
    assert other.returncode == 0 and texts(tmp_path / "out") == [b"first"] and texts(tmp_path / "own") == [b"second"]
    prepare([tmp_path / "y.txt"], tmp_path / "out", BYTES)
    assert texts(tmp_path / "out") == [b"second"] and not list(tmp_path.glob(".*.lock"))


def test_a_worker_that_dies_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()

    def leave(unit: shards.Unit, *rest: Any) -> None:
        """To the worker, all shards but the first."""
        shards.make(unit, *rest)
        while threading.current_thread() is threading.main_thread() and threading.active_count() > before:
            time.sleep(0.01)

    monkeypatch.setattr(workers, "WORTH_A_PROCESS", 0)
    monkeypatch.setattr(workers, "MOST_THREADS", 0)
    monkeypatch.setattr(workers, "make", leave)
    for death, why in (("os.kill(os.getpid(), 9)", r"SIGKILL; out of memory\?"), ("sys.exit(3)", "exit code 3")):
        monkeypatch.setattr(workers, "_SERVE", f"import os, sys; sys.stdin.buffer.read(9); {death}")
        with pytest.raises(ValueError, match=rf"a worker process died \({why}\): run again with fewer workers"):
            prepare(made(tmp_path, {}, {}, {}), tmp_path / "out", BYTES, workers=2, shard_bytes=40)
    assert list((tmp_path / "out.parts").glob("*.npz"))  # what was finished is kept
    assert not (tmp_path / "out.bin").exists()


def test_a_shard_that_a_crash_cut_short_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    manifest = made(tmp_path, {}, {})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_write", stop)
        prepare(manifest, tmp_path / "out", BYTES)
    first, second = sorted((tmp_path / "out.parts").glob("*.npz"))
    first.write_bytes(first.read_bytes()[:100])
    second.with_suffix(".bin").write_bytes(b"")
    prepare(manifest, tmp_path / "out", BYTES)
    assert len(texts(tmp_path / "out")) == 20


@pytest.mark.parametrize("threads", [0, 4])
def test_a_worker_makes_shards_and_its_error_is_that_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """A worker process, and a thread."""
    before = threading.active_count()

    def first_only(unit: shards.Unit, *rest: Any) -> None:
        """The first thread makes one shard and leaves the others to the worker."""
        shards.make(unit, *rest)
        while threading.current_thread() is threading.main_thread() and threading.active_count() > before:
            time.sleep(0.01)

    manifest = made(tmp_path, {}, {}, {})
    (tmp_path / "s2.jsonl").write_text("{\n")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"s2.jsonl, line 1"):
        patch.setattr(workers, "WORTH_A_PROCESS", 0)
        patch.setattr(workers, "MOST_THREADS", threads)
        patch.setattr(workers, "make", first_only)
        prepare(manifest, tmp_path / "out", BYTES, workers=2, shard_bytes=40)
    assert len(list((tmp_path / "out.parts").glob("*.npz"))) == 8  # four of s0 and four of s1
    prepare(made(tmp_path, {}, {}, {}), tmp_path / "out", BYTES, shard_bytes=40)
    prepare(made(tmp_path, {}, {}, {}), tmp_path / "wanted", BYTES)
    assert texts(tmp_path / "out") == texts(tmp_path / "wanted")
