"""The benchmark scripts run, compare before they time, and stamp what they write."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

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


@pytest.mark.slow
def test_long_context_quick(tmp_path: Path) -> None:
    out = tmp_path / "long.json"
    command = [sys.executable, str(FOLDER / "long_context.py"), "--quick", "--threads", "1", "--out", str(out)]
    subprocess.run(command, check=True, cwd=tmp_path)
    *rows, growth = json.loads(out.read_text())["rows"]
    assert [(row["way"], row["tokens"]) for row in rows] == [("segments", 256), ("segments", 512), ("whole", 256)]
    assert all(row["peak_mib"] > 50 for row in rows) and growth["longest_over_shortest"] > 0


ABSENT = """
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("llama_cpp", "rwkv") else find(name, *rest)
sys.path.insert(0, sys.argv[1])
sys.argv = [sys.argv[1] + "/cpu.py", *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(not native.available(), reason=f"no native library: {native.why_not()}")
def test_cpu_without_peers(tmp_path: Path) -> None:
    """Speeds without ratios where neither peer is installed."""
    out = tmp_path / "cpu.json"
    command = [sys.executable, "-c", ABSENT, str(FOLDER), str(tmp_path), "--models", "nestling", "--threads", "1"]
    command += ["--parts", "decode", "package", "--steps", "2", "--rounds", "1", "--out", str(out)]
    subprocess.run(command, check=True, cwd=tmp_path)
    rows = json.loads(out.read_text())["rows"]
    assert [row["part"] for row in rows] == ["decode"] * 3 + ["rwkv package"] * 2
    assert all(set(row["tokens_per_s"]) == {"dense", "sparse"} and "dense_ratio" not in row for row in rows[:3])
    assert all(row["tokens_per_s"]["bf16"] > 0 and "ratio" not in row for row in rows[3:])


def test_prepare_quick(tmp_path: Path) -> None:
    out = tmp_path / "prepare.json"
    command = [sys.executable, str(FOLDER / "prepare.py"), "--quick", "--workers", "1", "--out", str(out)]
    subprocess.run(command, check=True, cwd=tmp_path)
    rows = json.loads(out.read_text())["rows"]
    assert [row["workers"] for row in rows] == [1] and rows[0]["share_of_tokenizer"] > 0


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
