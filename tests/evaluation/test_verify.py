"""`roost verify`: agrees with the oracle on sound files and names the first tensor of a broken model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints import VERSIONS, Version, make_checkpoint
from roost.evaluation import verify as module
from roost.evaluation.verify import verify
from roost.models.finch import TimeMix

TEXT = list(b"All human beings are born free and equal.")


@pytest.fixture(params=VERSIONS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    version: Version = request.param
    path = tmp_path / f"v{version}.pth"
    torch.save(make_checkpoint(version, n_embd=64, head_size=32), path)
    return path


def test_every_layer_agrees(checkpoint: Path) -> None:
    verdict = verify(checkpoint, TEXT)
    names = [tensor.name for tensor in verdict.tensors]
    assert names[:4] == ["emb", "ln0", "blocks.0.att", "blocks.0.ffn"] and names[-2:] == ["ln_out", "logits"]
    assert verdict.first is None and verdict.argmax_agrees
    assert max(tensor.error for tensor in verdict.tensors) < 1e-4
    exact = 1e-6 if checkpoint.stem == "v5.0" else 1e-11  # the exponential of 5.0's time_first is kept in fp32
    assert max(tensor.error for tensor in verify(checkpoint, TEXT, torch.float64).tensors) < exact


def test_names_the_first_wrong_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "v6.pth"
    torch.save(make_checkpoint("6", n_embd=64, head_size=32), path)
    right = TimeMix.log_decay

    def wrong(self: TimeMix, x: torch.Tensor) -> torch.Tensor:
        return right(self, x) * (1 + (self.layer == 1))

    monkeypatch.setattr(TimeMix, "log_decay", wrong)
    verdict = verify(path, TEXT)
    assert verdict.first is not None and verdict.first.name == "blocks.1.att"


def test_nan_is_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "v6.pth"
    torch.save(make_checkpoint("6", n_embd=64, head_size=32), path)
    monkeypatch.setattr(TimeMix, "log_decay", lambda self, x: x[..., :64] * torch.nan)
    verdict = verify(path, TEXT)
    assert verdict.first is not None and verdict.first.name == "blocks.0.att" and not verdict.argmax_agrees


def test_refuses(tmp_path: Path) -> None:
    path = tmp_path / "v6.pth"
    torch.save(make_checkpoint("6", n_embd=64, head_size=32), path)
    with pytest.raises(ValueError, match="at least one token"):
        verify(path, [])
    with pytest.raises(ValueError, match="300"):
        verify(path, [300])
    assert module.TOLERANCE[torch.float32] == 2e-4
