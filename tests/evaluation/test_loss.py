"""Bits per byte: every token counted once, whatever the chunk."""

from __future__ import annotations

import math

import pytest
import torch

from roost.evaluation.loss import bits_per_byte
from roost.inference.stream import read
from roost.tokenizer import WorldTokenizer
from tiny import tiny_model

BYTES = WorldTokenizer.byte_level()
TEXT = "Alle Menschen sind frei und gleich an Würde und Rechten geboren.\x00"


def test_equals_the_definition_token_by_token() -> None:
    model = tiny_model()
    tokens, context, bits = BYTES.encode(TEXT), [0], 0.0
    for token in tokens:
        logits, _ = read(model, context)
        bits -= float(torch.log_softmax(logits.double(), 0)[token]) / math.log(2)
        context.append(token)
    score = bits_per_byte(model, BYTES, TEXT)
    assert score.bits == pytest.approx(bits, rel=1e-5)
    assert (score.bytes, score.tokens) == (len(TEXT.encode()), len(tokens))
    assert score.bits_per_byte == pytest.approx(bits / len(TEXT.encode()), rel=1e-5)


@pytest.mark.parametrize("name", ["dove-tiny", "eagle-tiny", "finch-tiny"])
def test_chunks_do_not_matter(name: str) -> None:
    model = tiny_model(name)
    whole = bits_per_byte(model, BYTES, TEXT)
    _, expected = read(model, [0, *BYTES.encode(TEXT)])
    for chunk in (1, 7, len(TEXT.encode()), len(TEXT.encode()) + 1):
        calls: dict[int, int] = {}
        part = bits_per_byte(model, BYTES, TEXT, chunk=chunk, progress=calls.__setitem__)
        assert part.bits == pytest.approx(whole.bits, rel=1e-5)
        torch.testing.assert_close(part.state.layers[-1].wkv, expected.layers[-1].wkv, atol=1e-4, rtol=1e-4)
        assert part.state.tokens == (part.tokens + 1,)
        assert list(calls.items())[-1] == (part.tokens, part.tokens)


def test_fresh_head_knows_nothing() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.head.weight.zero_()
    assert bits_per_byte(model, BYTES, b"\xff\x00abc").bits_per_byte == pytest.approx(math.log2(257))


def test_state_is_context_and_is_not_changed() -> None:
    model = tiny_model()
    _, context = read(model, BYTES.encode(TEXT))
    before = context.layers[0].wkv.clone()
    with_context = bits_per_byte(model, BYTES, TEXT, context)
    assert with_context.bits != bits_per_byte(model, BYTES, TEXT).bits
    assert torch.equal(context.layers[0].wkv, before)
    assert not with_context.state.layers[0].wkv.requires_grad


def test_bad_calls() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="the text is empty"):
        bits_per_byte(model, BYTES, "")
    with pytest.raises(ValueError, match="chunk is 0"):
        bits_per_byte(model, BYTES, "a", chunk=0)
