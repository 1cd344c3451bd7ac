"""The cost of rounding: zero for the same model, what a hand calculation says for another, and the order of formats."""

from __future__ import annotations

import math

import pytest
import torch

import roost
from roost import native
from roost.evaluation.quantisation import compare
from tiny import tiny_model


def test_a_model_is_its_own_exact_form() -> None:
    model = tiny_model()
    quality = compare(model, model, list(range(40)), chunk=7)
    assert (quality.kl, quality.top1, quality.tokens) == (0.0, 1.0, 40)
    assert quality.bits == quality.exact_bits


@torch.no_grad()
def test_the_figures_are_those_of_the_definition() -> None:
    exact, other = tiny_model(), tiny_model(seed=1)
    ids = [int(x) for x in torch.randint(0, 257, (30,), generator=torch.Generator().manual_seed(0))]
    p, q = (model(torch.tensor([[0, *ids[:-1]]]))[0][0].double().softmax(-1) for model in (exact, other))
    kl = [
        sum(a * math.log(a / b) for a, b in zip(x, y, strict=True)) for x, y in zip(p.tolist(), q.tolist(), strict=True)
    ]
    quality = compare(exact, other, ids, chunk=11)
    assert quality.kl == pytest.approx(sum(kl) / 30, rel=1e-5)
    assert quality.kl_99 == pytest.approx(sorted(kl)[29], rel=1e-4)  # the 99th percentile of 30 is the largest
    assert quality.top1 == sum(bool(a.argmax() == b.argmax()) for a, b in zip(p, q, strict=True)) / 30
    assert quality.bits == pytest.approx(-sum(math.log2(q[i, t]) for i, t in enumerate(ids)), rel=1e-6)
    assert quality.exact_bits == pytest.approx(-sum(math.log2(p[i, t]) for i, t in enumerate(ids)), rel=1e-6)


@pytest.mark.skipif(not native.available(), reason=native.why_not())
def test_formats_of_nestling_keep_their_promises() -> None:
    exact, tokenizer = roost.load("nestling")
    assert tokenizer is not None
    text = tokenizer.encode("In the beginning God created the heaven and the earth. " * 3 + "It is a truth universally")
    found = {}
    for weights in ("fp32", "bf16", "int8", "int4"):
        model, _ = roost.load("nestling", backend="native", weights=weights, threads=1)
        found[weights] = compare(exact, model, text)
    assert found["fp32"].kl < 1e-9 < found["bf16"].kl < found["int8"].kl < found["int4"].kl
    assert found["bf16"].kl < 5e-5 and found["int8"].kl < 5e-4 and found["int4"].kl < 5e-2
    assert found["fp32"].top1 == 1.0


def test_bad_input() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="empty"):
        compare(model, model, [])
    with pytest.raises(ValueError, match="vocabularies"):
        compare(model, roost.RWKV(roost.ModelConfig("finch", 1, 64, vocab_size=70, head_size=32)), [1])
