"""`roost demo`: read, save, write on in a second process, compare with xz."""

from __future__ import annotations

import lzma
from importlib.resources import files
from pathlib import Path

import pytest

from roost.checkpoint import load
from roost.cli import main
from roost.cli.demo import PROMPT
from roost.evaluation.loss import bits_per_byte
from roost.inference.sampling import Sampling
from roost.inference.stream import generate
from roost.tokenizer import WorldTokenizer
from tiny import tiny_model


def test_demo(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, text = tmp_path / "tiny.pth", tmp_path / "text"
    tiny_model().save(model)
    text.write_bytes((files("roost") / "assets" / "example.txt").read_bytes()[:3000])
    assert main(["demo", "--model", str(model), "--file", str(text)]) == 0
    out, err = capfd.readouterr()
    network, tokenizer = load(str(model))
    assert isinstance(tokenizer, WorldTokenizer)
    score = bits_per_byte(network, tokenizer, text.read_bytes())
    packed = len(lzma.compress(text.read_bytes(), preset=9 | lzma.PRESET_EXTREME))
    assert f"{score.bits_per_byte:.3f}" in out and f"{8 * packed / 3000:.3f}" in out and err == ""
    params = Sampling(top_p=0.7, seed=1)
    written = generate(network, tokenizer, PROMPT, params, max_tokens=200, state=score.state)
    assert written.text.splitlines()[0] in out


def test_demo_passes_errors_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", str(tmp_path / "none.pth")]) == 2
    assert capsys.readouterr().err.startswith("roost: error: ")
