"""The golden curve, short: a fresh Finch L6 D256 learns as it did when the curve was stored."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

CURVE = Path(__file__).parent / "golden" / "short.json"
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_golden_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model, corpus, order, initialisation, loss, gradients and optimiser together: each of ten losses within 0.003."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    golden = importlib.import_module("golden")
    stored, found = json.loads(CURVE.read_text()), golden.curve("short", tmp_path)
    for key in found.keys() - {"losses"}:
        assert found[key] == stored[key], key
    assert stored["losses"][0] > 5 and stored["losses"][-1] < 4
    assert found["losses"] == pytest.approx(stored["losses"], abs=0.003)
