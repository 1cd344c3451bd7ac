"""Token files against their reports and the model's vocabulary; validation streams and what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from corpora import made
from roost.data.binidx import TokenFile, write_tokens
from roost.data.prepare import prepare
from roost.tokenizer import WorldTokenizer
from roost.training.streams import Valid, check_vocabulary, held_out
from roost.training.validation import Figures

BYTES = WorldTokenizer.byte_level()


def test_a_file_of_another_vocabulary(tmp_path: Path) -> None:
    """All its ids exist in the model: only the report tells."""
    prepare(made(tmp_path, {}), tmp_path / "corpus", BYTES, workers=1)
    file = TokenFile(tmp_path / "corpus")
    assert check_vocabulary(file, BYTES, 257)["vocab_size"] == 257
    assert check_vocabulary(file, None, 257)
    other = WorldTokenizer({i + 1: bytes([255 - i]) for i in range(256)})
    for tokenizer in (WorldTokenizer(), other):
        mine, theirs = (f"{one.vocab_size} ids .*{one.fingerprint[:9]}" for one in (BYTES, tokenizer))
        with pytest.raises(ValueError, match=f"corpus.bin was made with a vocabulary of {mine}.*{theirs}"):
            check_vocabulary(file, tokenizer, 65536)
    report = tmp_path / "corpus.report.json"
    for text, message in (("{", "is damaged"), ("[]", "is not a report")):
        report.write_text(text)
        with pytest.raises(ValueError, match=f"report.json {message}"):
            check_vocabulary(file, BYTES, 257)
    report.unlink()
    assert check_vocabulary(file, WorldTokenizer(), 65536) == {}


def test_ids_that_the_model_does_not_know(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", [[5] * 9, [300]], vocab_size=65536)
    with pytest.raises(ValueError, match=r"tokens.bin holds token id 300 \(token 10 of the file\)"):
        check_vocabulary(TokenFile(tmp_path / "tokens"), BYTES, 257)
    TokenFile(tmp_path / "tokens").path.write_bytes(b"\xff\xff" * 12)
    index = tmp_path / "tokens.idx"
    index.write_bytes(index.read_bytes()[:17] + b"\x03" + index.read_bytes()[18:])  # int16
    with pytest.raises(ValueError, match="holds token id -1"):
        check_vocabulary(TokenFile(tmp_path / "tokens"), BYTES, 257)


def test_streams_take_domain_and_language_from_the_report(tmp_path: Path) -> None:
    one, two, plain = (str(tmp_path / name / "valid") for name in ("one", "two", "plain"))
    for path, sources in ((one, [{"domain": "law", "language": "en"}]), (two, [{"domain": "law"}, {"domain": "code"}])):
        Path(path).parent.mkdir()
        prepare(made(tmp_path, *sources), path, BYTES, workers=1)
    write_tokens(tmp_path / "third", [[1, 2, 3]], vocab_size=257)
    third = str(tmp_path / "third")
    found = held_out([Valid(one), Valid(two, language="de"), Valid(third, "maps")], BYTES, 257)
    assert {name: held[2:] for name, held in found.items()} == {
        one: ("law", "en"),
        two: ("", "de"),
        "third": ("maps", ""),
    }
    assert found["third"].tokens.tolist() == [1, 2, 3, 0] and found["third"].byte_lengths[:3].tolist() == [0, 1, 1]
    write_tokens(plain.replace("/plain", ""), [[]], vocab_size=257)
    with pytest.raises(ValueError, match="has 1 token"):
        held_out([Valid(plain.replace("/plain", ""))], BYTES, 257)


def test_without_a_vocabulary_no_bits_per_byte(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", [[1, 2, 3]], vocab_size=300)
    (held,) = held_out([Valid(str(tmp_path / "tokens"))], None, 300).values()
    assert held.byte_lengths.equal(torch.zeros(300, dtype=torch.int64))
    line = Figures(3.0, 3, 0).line("x")
    assert line["bits_per_byte"] is None and line["loss"] == 1.0
