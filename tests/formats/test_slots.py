"""What becomes of every tensor in a packed model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import pytest
import torch
from torch import Tensor

from roost.config import PRESETS, ModelConfig
from roost.formats.slots import WeightsFormat, skeleton, slots
from roost.models.rwkv import RWKV
from tiny import tiny_model

CONFIGS = {
    "finch": PRESETS["finch-tiny"],
    "eagle": PRESETS["eagle-tiny"],
    "one layer": ModelConfig("finch", 1, 64, vocab_size=10, head_size=32),
    "tuned": ModelConfig("eagle", 4, 64, vocab_size=10, head_size=32, time_state=True),
    "5.0": ModelConfig("eagle", 2, 64, vocab_size=10, head_size=32, gate=False),
}


def kinds(config: ModelConfig, weights: WeightsFormat) -> dict[str, tuple[str, ...]]:
    return {slot.name: slot.kinds for slot in slots(config, weights)}


@pytest.mark.parametrize("name", CONFIGS)
def test_skeleton_is_the_state_dict(name: str) -> None:
    made = RWKV(CONFIGS[name], device="meta").state_dict()
    found = skeleton(CONFIGS[name])
    assert list(found) == list(made)
    assert all(found[one].shape == made[one].shape for one in made)


@pytest.mark.parametrize("weights", get_args(WeightsFormat))
@pytest.mark.parametrize("name", ["finch-tiny", "eagle-tiny"])
def test_every_number_is_there_once(name: str, weights: WeightsFormat) -> None:
    model = tiny_model(name)
    state: Mapping[str, Tensor] = model.state_dict()
    found = slots(model.config, weights)
    assert len({slot.name for slot in found}) == len(found)
    values = [slot.values(state) for slot in found]
    assert sum(value.numel() for value in values) == model.config.parameters
    for slot, value in zip(found, values, strict=True):
        assert tuple(size for size in value.shape if size > 1 or len(slot.shape) == 2) == slot.shape


def test_low_rank_matrices_are_turned_round() -> None:
    model = tiny_model()
    state = model.state_dict()
    by_name = {slot.name: slot for slot in slots(model.config, "int8")}
    stem = "blocks.1.att.time_maa_w2"
    x = torch.randn(8)
    for i, letter in enumerate("wkvrg"):
        slot = by_name[f"{stem}.{letter}"]
        assert slot.shape == (64, 8)
        torch.testing.assert_close(slot.values(state) @ x, x @ state[stem][i])
    for part, shape in (("time_maa_w1", (40, 64)), ("time_decay_w1", (16, 64)), ("time_decay_w2", (64, 16))):
        slot = by_name[f"blocks.2.att.{part}"]
        assert slot.shape == shape and torch.equal(slot.values(state), state[slot.name].T)
    key = by_name["blocks.0.ffn.key.weight"]
    assert key.shape == (224, 64) and torch.equal(key.values(state), state[key.name])


def test_formats_by_role() -> None:
    finch = CONFIGS["finch"]
    exact, low = (
        ("w16", "f32"),
        ("blocks.0.att.time_maa_w1", "blocks.2.att.time_maa_w2.g", "blocks.1.att.time_decay_w2"),
    )
    attention = [f"blocks.1.att.{part}.weight" for part in ("receptance", "key", "value", "gate")]
    channel = [f"blocks.0.ffn.{part}.weight" for part in ("key", "receptance", "value")]
    expected: dict[WeightsFormat, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
        "fp32": (exact, exact, exact, ("rows16", "rows32")),
        "bf16": (("bf16",), ("bf16",), ("bf16",), ("rows16",)),
        "int8": (("i8",), ("i8 fine",), ("i8 fine",), ("rows16",)),
        "int4": (("i4",), ("i4",), ("i8 fine",), ("rows16",)),
    }
    for weights, (projection, output, head, embedding) in expected.items():
        found = kinds(finch, weights)
        assert {found[name] for name in (*attention, *channel)} == {projection}
        assert found["blocks.2.att.output.weight"] == output and found["head.weight"] == head
        assert found["emb.weight"] == embedding and {found[name] for name in low} == {exact}
        for name in ("blocks.0.ln0.bias", "blocks.1.att.ln_x.weight", "blocks.0.att.time_decay", "ln_out.weight"):
            assert found[name] == ("vector",)
        assert found["blocks.0.att.time_faaaa"] == found["blocks.0.ffn.time_maa_k"] == ("vector",)
    assert kinds(CONFIGS["tuned"], "int4")["blocks.3.att.time_state"] == ("vector",)
    assert "blocks.0.att.gate.weight" not in kinds(CONFIGS["5.0"], "int8")
