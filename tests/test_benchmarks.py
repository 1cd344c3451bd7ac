"""The benchmark scripts run, compare before they time, and stamp what they write."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

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


def test_generate_quick(tmp_path: Path) -> None:
    out = tmp_path / "generate.json"
    command = [sys.executable, str(FOLDER / "generate.py"), "--quick", "--threads", "1", "--out", str(out)]
    subprocess.run(command, check=True, cwd=tmp_path)
    result = json.loads(out.read_text())
    assert result["benchmark"] == "generate" and result["rows"] and result["stamp"]["torch"]


def test_tokenizer_quick(tmp_path: Path) -> None:
    out = tmp_path / "tokenizer.json"
    subprocess.run(
        [sys.executable, str(FOLDER / "tokenizer.py"), "--quick", "--out", str(out)], check=True, cwd=tmp_path
    )
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 3 and all(row["bytes"] > 15_000 and row["roost_over_rwkv"] > 0 for row in rows)


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
