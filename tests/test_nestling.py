"""The model that ships: small, byte-level, sound in every layer, and better than a compressor on what it never saw."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest
import torch

import roost
from roost.evaluation.verify import verify

ASSETS = Path(roost.__file__).parent / "assets"
WEIGHTS = ASSETS / "nestling.safetensors"
ROOT = Path(__file__).parents[1]


def test_sizes() -> None:
    model, tokenizer = roost.load("nestling")
    assert model.config == roost.PRESETS["nestling"] and model.dtype == torch.float32
    assert 3e6 <= model.config.parameters <= 8e6 and WEIGHTS.stat().st_size <= 16e6
    assert tokenizer == roost.WorldTokenizer.byte_level() and tokenizer.vocab_size == 257
    assert roost.load("nestling", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_every_layer_agrees_with_the_oracle() -> None:
    verdict = verify("nestling", [byte + 1 for byte in b"All human beings are born free"])
    assert verdict.first is None and verdict.argmax_agrees


@pytest.mark.slow
def test_predicts_the_held_out_document_better_than_xz() -> None:
    text = (ASSETS / "example.txt").read_bytes()
    packed = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    score = roost.bits_per_byte(*roost.load("nestling"), text)  # type: ignore[arg-type]
    assert score.bits_per_byte < 2.0 < packed
    card = (ROOT / "docs" / "nestling.md").read_text(encoding="utf-8")
    assert f"| example.txt | {len(text):,} | **{score.bits_per_byte:.3f}** | {packed:.3f} |" in card


def test_the_card_shows_its_figures() -> None:
    card = (ROOT / "docs" / "nestling.md").read_text(encoding="utf-8")
    _, found, measured = card.partition("<!-- measured -->")
    assert found and measured.count("\n| ") >= 6 and "## Samples" in measured
    assert f"{roost.PRESETS['nestling'].parameters:,} parameters" in card
