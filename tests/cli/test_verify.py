"""`roost verify`: the verdict in words and in the exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints import make_checkpoint
from roost.cli import main
from roost.evaluation import verify
from roost.evaluation.verify import Compared, Verdict


@pytest.mark.parametrize("vocab", [257, 300])
def test_verify(vocab: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "m.pth"
    torch.save(make_checkpoint("6", vocab=vocab), file)
    assert main(["verify", str(file), "--tokens", "5"]) == 0
    out = capsys.readouterr().out
    assert "blocks.1.att" in out and "agree with the oracle over 5 tokens" in out


@pytest.mark.parametrize(("differs", "line"), [(True, "the first tensor that differs is b"), (False, "does not")])
def test_verify_says_what_differs(
    differs: bool, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "m.pth"
    torch.save(make_checkpoint("6"), file)
    tensors = [Compared("a", 0.0, True), Compared("b", 1.0, not differs)]
    verdict = Verdict(tensors, tensors[1] if differs else None, argmax_agrees=False)
    monkeypatch.setattr(verify, "verify", lambda *_: verdict)
    assert main(["verify", str(file)]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith(line)
