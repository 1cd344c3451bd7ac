"""`roost info` alone: what this installation can do, and why it cannot do more."""

from __future__ import annotations

import pytest
import torch

from roost import native
from roost.cli import main


@pytest.mark.parametrize("reason", ["", "no compiler was found"])
def test_info_alone_tells_of_the_backends(
    reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "why_not", lambda: reason)
    monkeypatch.setattr(native, "available", lambda: not reason)
    monkeypatch.setattr(native, "isa", lambda: "avx2")
    monkeypatch.setattr(native, "supported_isas", lambda: ("scalar", "avx2"))
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out and "chunked    active" in out
    if reason:
        assert out.count("native     not active") == 3 and out.count(reason) == 1
    else:
        assert out.count("native     active") == 3 and "avx2 (of scalar, avx2)" in out and "why not" not in out
