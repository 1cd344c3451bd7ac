"""The benchmark scripts run, compare before they time, and stamp what they write."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest

from roost import native

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def common() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_common", FOLDER / "common.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_wkv_quick(tmp_path: Path) -> None:
    out = tmp_path / "wkv.json"
    command = [sys.executable, str(FOLDER / "wkv.py"), "--quick", "--threads", "1", "--out", str(out)]
    subprocess.run(command, check=True, cwd=tmp_path)
    result = json.loads(out.read_text())
    assert result["benchmark"] == "wkv"
    assert {"cpu", "cores", "threads", "torch", "commit"} <= set(result["stamp"])
    assert [(row["generation"], row["pass"]) for row in result["rows"]] == [
        ("finch", "forward"),
        ("finch", "forward_backward"),
        ("eagle", "forward"),
        ("eagle", "forward_backward"),
    ]
    for row in result["rows"]:
        assert row["difference"] < 1e-4
        assert row["speedup"] == pytest.approx(row["reference"]["median_s"] / row["chunked"]["median_s"], rel=0.01)


@pytest.mark.skipif(not native.available(), reason=f"no native library: {native.why_not()}")
def test_wkv_native_quick(tmp_path: Path) -> None:
    out = tmp_path / "wkv.json"
    command = [sys.executable, str(FOLDER / "wkv_native.py"), "--quick", "--out", str(out)]
    subprocess.run(command, check=True, cwd=tmp_path)
    rows = json.loads(out.read_text())["rows"]
    assert [row["what"] for row in rows[:4]] == [row["what"] for row in rows[4:8]] and len(rows) == 10
    assert rows[0]["threads"] == 1 and rows[0]["chunked_over_native"] > 0


def test_generate_quick(tmp_path: Path) -> None:
    out = tmp_path / "generate.json"
    command = [sys.executable, str(FOLDER / "generate.py"), "--quick", "--threads", "1", "--out", str(out)]
    subprocess.run(command, check=True, cwd=tmp_path)
    result = json.loads(out.read_text())
    assert result["benchmark"] == "generate" and result["rows"] and result["stamp"]["torch"]


def test_tokenizer_quick(tmp_path: Path) -> None:
    out, text = tmp_path / "tokenizer.json", tmp_path / "own.txt"
    text.write_text("今天是美好的一天。 " * 600)
    command = [sys.executable, str(FOLDER / "tokenizer.py"), "--quick", "--text", f"own={text}", "--out", str(out)]
    subprocess.run(command, check=True, cwd=tmp_path)
    *rows, last = json.loads(out.read_text())["rows"]
    assert len(rows) == 5 and all(row["bytes"] > 15_000 and row["roost_over_rwkv"] > 0 for row in rows)
    assert rows[-1]["text"] == "own" and rows[-1]["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert last["construction"]["roost"]["median_s"] > 0


def test_train_quick(tmp_path: Path) -> None:
    out = tmp_path / "train.json"
    parts = ["wkv", "gpt", "share"]
    command = [sys.executable, str(FOLDER / "train.py"), *parts, "--quick", "--threads", "1", "--out", str(out)]
    subprocess.run(command, check=True, cwd=tmp_path)
    rows = json.loads(out.read_text())["rows"]
    assert [row["part"] for row in rows] == ["wkv"] * 2 + ["gpt"] * 8 + ["share"] * 4
    for row in rows[:2]:
        slow, fast = row["times"]["reference, torch's products"], row["times"]["native"]
        assert max(row["gradients_apart"].values()) < 5e-2
        assert row["over_recurrence_with_torchs_products"] > 0 and slow["median_s"] > 0 and fast["median_s"] > 0
    assert all(0 < row["share"] < 1 for row in rows[10:])


@pytest.mark.slow
def test_long_context_quick(tmp_path: Path) -> None:
    out = tmp_path / "long.json"
    command = [sys.executable, str(FOLDER / "long_context.py"), "--quick", "--threads", "1", "--out", str(out)]
    subprocess.run(command, check=True, cwd=tmp_path)
    *rows, growth = json.loads(out.read_text())["rows"]
    assert [(row["way"], row["tokens"]) for row in rows] == [("segments", 256), ("segments", 512), ("whole", 256)]
    assert all(row["peak_mib"] > 50 for row in rows) and growth["longest_over_shortest"] > 0


class FakePeer:
    """Takes a second for everything; "llama" of the q4_K kind cannot start."""

    alive: ClassVar[list[FakePeer]] = []
    load_s = 1.0

    def __init__(self, kind: str, path: str, *_: str) -> None:
        if "q4_K" in path:
            raise RuntimeError("the peer ended")
        self.kind = kind
        self.alive.append(self)

    def __enter__(self) -> FakePeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.alive.remove(self)

    def run(self, what: str, tokens: int) -> float:
        return 1.0

    def peak_bytes(self) -> int:
        return 1


@pytest.mark.parametrize("installed", [False, True])
def test_cpu_with_and_without_peers(installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratios where the peers are installed; and whoever was started ends, also when a later one cannot start."""
    monkeypatch.syspath_prepend(FOLDER)
    cpu, peers = importlib.import_module("cpu"), importlib.import_module("peers")
    made = {kind: tmp_path / f"m.{kind}.gguf" for kind in ("fp16", "bf16", "q8_0", "q4_0", "q4_K")}
    monkeypatch.setattr(cpu, "here", lambda package: installed)
    for module in (cpu, peers):
        monkeypatch.setattr(module, "Peer", FakePeer)
    monkeypatch.setattr(peers, "files", lambda *_: {"pth": tmp_path / "m.pth", **made})
    monkeypatch.setattr(FakePeer, "alive", [])
    for weights in cpu.RIVALS:
        (tmp_path / f"m.{weights}.roost").touch()
    options = SimpleNamespace(directory=tmp_path, threads=1, steps=2, rounds=1)
    if installed:
        with pytest.raises(RuntimeError, match="the peer ended"):
            list(cpu.decode("m", options))
        assert not FakePeer.alive
        del made["q4_K"]
    for part, key in ((cpu.decode, "dense_ratio"), (cpu.prefill, "ratios"), (cpu.package, "ratio")):
        rows = list(part("m", options))
        assert rows and all((key in row) == installed and row["tokens_per_s"] for row in rows) and not FakePeer.alive


@pytest.mark.slow
def test_peers_quick(tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    command = [sys.executable, str(FOLDER / "peers.py"), str(tmp_path), "--presets", "nestling", "--formats", "q8_0"]
    subprocess.run([*command, "--quick", "--threads", "1", "--out", str(out)], check=True, cwd=tmp_path)
    rows = json.loads(out.read_text())["rows"]
    assert {"cpu fp32", "cpu bf16"} <= {row["format"] for row in rows}
    assert all(row["prefill_32"] > 0 and row["decode_4"] > 0 and row["peak_bytes"] > 1e7 for row in rows)
    made = importlib.import_module("roost.checkpoint").info(tmp_path / "nestling.q8_0.gguf")
    assert made.config.n_layer == 4 and "q8_0" in made.dtypes


def test_variants_take_turns_and_the_first_call_is_not_measured(common: ModuleType) -> None:
    calls: list[str] = []
    times = common.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3
    assert set(times) == {"a", "b"} and times["a"]["min_s"] <= times["a"]["median_s"] <= times["a"]["max_s"]
    with pytest.raises(ValueError, match="rounds is 0"):
        common.alternate({}, rounds=0)


def test_without_a_file_the_result_is_printed(common: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    common.write("x", [{"value": 1}], None)
    result = json.loads(capsys.readouterr().out)
    assert result["rows"] == [{"value": 1}] and result["stamp"]["cores"] >= 1
