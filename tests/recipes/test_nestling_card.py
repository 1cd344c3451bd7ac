"""The baselines of nestling's card, against values worked out by hand."""

from __future__ import annotations

import lzma
import math
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import pytest

from roost.data.binidx import write_tokens

card = SimpleNamespace(**run_path(str(Path(__file__).parents[2] / "recipes" / "nestling_card.py")))


@pytest.mark.parametrize(
    "text,order,probabilities",
    [
        (b"a", 0, [1 / 256]),
        (b"aaaa", 0, [0.5 / 128, 1.5 / 129, 2.5 / 130, 3.5 / 131]),
        (b"ab", 0, [0.5 / 128, 0.5 / 129]),
        (b"abab", 1, [0.5 / 128, 0.5 / 128, 0.5 / 128, 1.5 / 129]),  # contexts: none, a, b, a
        (b"aaaa", 2, [0.5 / 128, 0.5 / 128, 0.5 / 128, 1.5 / 129]),  # contexts: none, a, aa, aa
    ],
)
def test_adaptive(text: bytes, order: int, probabilities: list[float]) -> None:
    bits = -sum(math.log2(p) for p in probabilities)
    assert math.isclose(card.adaptive(text, order), bits / len(text), rel_tol=1e-12)


def test_adaptive_learns_only_what_its_order_sees() -> None:
    """Two letters in turn: a coin to order 0, certain to order 1."""
    text = b"ab" * 20_000
    assert card.adaptive(text, 0) > 1 and card.adaptive(text, 1) < 0.1


def test_xz_counts_the_container() -> None:
    data = b"a" * 1000
    packed = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    assert card.xz(data) == 8 * len(packed) / 1000 and lzma.decompress(packed) == data
    assert card.xz(b"a") > 400  # header, footer and checksums alone are more than 50 bytes


def test_documents_are_read_back_without_their_boundaries(tmp_path: Path) -> None:
    write_tokens(tmp_path / "valid-x", ([98, 99], [1]), vocab_size=257)
    write_tokens(tmp_path / "train", ([98],), vocab_size=257)
    found = card.documents(tmp_path)
    assert list(found) == ["valid-x", "example.txt"] and found["valid-x"] == [b"ab", b"\0"]
